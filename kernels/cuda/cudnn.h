// cuDNN's graph API with lifetimes: the GPU that is planned for, graphs of operations, the engines
// that can run them, and plans. cudnn.cpp alone includes cuDNN's headers.
//
// Plans can be made for a GPU that is not there, from its description, and are then never run.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "kernels/desc.h"
#include "kernels/dtype.h"

namespace ddpm::cuda {

std::string cudnn_version();  // "9.19.0", of the library that was loaded

// What a graph computes, as it was told to cuDNN.
struct CudnnTensor {
  Shape shape;
  DType type;
  bool is_virtual;
  int64_t row_stride;  // elements from (n,0,0,0) to (n+1,0,0,0)
};
struct CudnnOperation {
  enum Kind { kConvolution, kAdd, kIdentity } kind;
  std::array<int, 3> tensors;  // x, filter, y; or a, b, sum; or x, y
  ConvPass pass = ConvPass::kForward;
  ConvDesc desc{};
};
struct CudnnProgram {
  std::vector<CudnnTensor> tensors;
  std::vector<CudnnOperation> operations;
};

class CudnnTarget {
 public:
  // The device that is CUDA's current one. Its plans run.
  static CudnnTarget current_device();
  // The device of a JSON text as cuDNN's device property descriptor takes it. Its plans do not run;
  // in tests, what they were made from is handed to `stand_in`, with the pointers and `bytes` of
  // workspace.
  using StandIn = std::function<void(const CudnnProgram&, std::span<void* const> pointers,
                                     void* workspace, size_t bytes)>;
  static CudnnTarget described(const std::string& properties, StandIn stand_in = nullptr);

  bool live() const;

 private:
  friend class CudnnGraph;
  friend class CudnnPlan;
  struct State;
  std::shared_ptr<const State> state_;
};

// An engine and its settings: all that must be known to make the same plan again.
struct CudnnEngine {
  int64_t id = -1;
  std::vector<std::pair<int, int64_t>> knobs;  // type and value
  friend bool operator==(const CudnnEngine&, const CudnnEngine&) = default;
};

// What cuDNN says of an engine.
struct CudnnNotes {
  bool tensor_core = false;
  bool down_convert_inputs = false;
  bool reduced_precision_reduction = false;
  bool fft = false;
  bool winograd = false;
  bool nondeterministic = false;
  bool runtime_compiled = false;  // takes about a second to become a plan
};

struct CudnnCandidate {
  CudnnEngine engine;
  CudnnNotes notes;
};

class CudnnPlan {
 public:
  ~CudnnPlan();
  CudnnPlan(const CudnnPlan&) = delete;
  CudnnPlan& operator=(const CudnnPlan&) = delete;

  size_t workspace() const { return workspace_; }
  // pointers[i] is the tensor that the graph numbered i; a virtual tensor's is not looked at.
  void run(void* stream, std::span<void* const> pointers, void* workspace) const;

 private:
  friend class CudnnGraph;
  struct State;
  CudnnPlan(std::unique_ptr<State> state, size_t workspace);
  std::unique_ptr<State> state_;
  size_t workspace_;
};

enum class CudnnHeuristic { kAccurate, kFast, kFallback };  // modes B, A and fallback

class CudnnGraph {
 public:
  // `what` stands in error messages.
  CudnnGraph(const CudnnTarget& target, std::string what);
  ~CudnnGraph();
  CudnnGraph(const CudnnGraph&) = delete;
  CudnnGraph& operator=(const CudnnGraph&) = delete;

  // A tensor with channels innermost; its number, counted from 0. A virtual one is never in memory.
  int tensor(const Shape& shape, DType type, bool is_virtual = false);
  // (N,1,1,C) whose rows are `stride` elements apart, aligned to `alignment` bytes.
  int rows(int n, int c, DType type, int64_t stride, int64_t alignment);
  // The taps of a desc, accumulated in fp32: y from x and filter; dx, in x's place, from filter and
  // y; the filter's gradient from x and y.
  void convolution(ConvPass pass, const ConvDesc& desc, int x, int filter, int y);
  // sum = a + b in fp32; b may have one element where a has many.
  void add(int a, int b, int sum);
  void identity(int x, int y);
  // After the last operation, before the first question.
  void finish();

  // Engines that cuDNN expects to support the graph, the fastest first.
  std::vector<CudnnCandidate> candidates(CudnnHeuristic mode) const;
  CudnnNotes notes(const CudnnEngine& engine) const;
  // Null where the engine does not support the graph after all.
  std::shared_ptr<const CudnnPlan> plan(const CudnnEngine& engine) const;

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace ddpm::cuda
