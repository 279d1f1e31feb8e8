// A network and what is computed over it, built once: a flat list of steps over named tensors.
//
// A model calls op functions (engine/ops.h). Each works out its output's shape, appends its forward
// step, and puts its backward on a tape; backward() pops the tape, and the closures append their
// backward steps. There is no autograd at run time and no rewriting: what is listed is what runs.
#pragma once

#include <array>
#include <functional>
#include <map>
#include <optional>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "engine/params.h"
#include "kernels/backend.h"

namespace ddpm {

// A tensor of a graph: a handle. Also the slot of its pointer in a Run.
struct Tensor {
  int id = -1;
  explicit operator bool() const { return id >= 0; }
  operator In() const { return {id}; }   // NOLINT: reads as the backend's argument it is
  operator Out() const { return {id}; }  // NOLINT
  friend bool operator==(const Tensor&, const Tensor&) = default;
};

// The first five are a ParamStore's. The shadow, the weights in the compute type where that is not
// fp32, belongs to the executor.
enum class Arena { kWeights, kGradients, kM, kV, kEma, kShadow };
inline constexpr int kArenas = 5;

enum class TensorKind {
  kPlanned,     // lives in the planned arena from its first writer to its last reader
  kPersistent,  // has memory of its own, kept between steps
  kArena,       // a slice of a parameter arena
  kHeld,        // bytes that Executor::hold() is given, and nothing writes
};

struct TensorSpec {
  Shape shape;
  DType dtype = DType::kF32;
  std::string name;
  TensorKind kind = TensorKind::kPlanned;
  size_t bytes = 0;
  Arena arena = Arena::kWeights;  // kArena only
  int param = -1;                 // kArena only; -1 = the whole arena
  bool requires_grad = false;
};

struct Step {
  Call call;
  std::string scope;
};

// Where a gradient goes, and whether it is the first to go there.
struct GradOut {
  Tensor tensor;
  Write write = Write::kOverwrite;
};

enum class Mode { kTraining, kInference };

// When steps run. A planned tensor lives within one phase.
enum class Phase {
  kSetup,   // after a change of the weights: packing of filters, what follows from weights alone
  kStart,   // before the first step of a chain
  kStep,    // every step, or every part of one
  kUpdate,  // the end of a step that has parts
};
inline constexpr int kPhases = 4;
inline constexpr std::array<Phase, kPhases> kAllPhases{Phase::kSetup, Phase::kStart, Phase::kStep,
                                                       Phase::kUpdate};

class Graph {
 public:
  Graph(Backend& backend, Mode mode);

  Backend& backend() const { return *backend_; }
  Mode mode() const { return mode_; }
  bool training() const { return mode_ == Mode::kTraining; }
  Params& params() { return params_; }
  const Params& params() const { return params_; }

  // ---- tensors ----
  Tensor tensor(const Shape&, DType = DType::kF32);
  Tensor activation(const Shape& s) { return tensor(s, backend().compute_type()); }
  Tensor bytes(size_t);  // a planned tensor of raw bytes
  Tensor persistent(const Shape&, DType, const std::string& name);
  Tensor persistent_bytes(size_t, const std::string& name);
  Tensor held(const Shape&, DType, const std::string& name);
  // A persistent tensor (rows,1,1,columns) of fp32 that holds `values` from the start.
  Tensor constant(std::vector<float> values, int columns, const std::string& name);
  const std::map<int, std::vector<float>>& constants() const { return constants_; }  // by tensor
  // The weight of a new parameter in the current scope; in training its gradient exists too.
  Tensor parameter(const std::string& name, const Shape&, int rank, std::vector<ParamPiece>);
  // A parameter as convolutions and products of activations read it: its shadow, or itself where
  // the compute type is fp32.
  Tensor compute_weight(Tensor weight);
  // A whole arena, for the optimizer; kShadow is absent where the compute type is fp32. The
  // parameters must be laid out.
  Tensor arena(Arena);

  const TensorSpec& info(Tensor t) const { return tensors_.at(static_cast<size_t>(t.id)); }
  const Shape& shape(Tensor t) const { return info(t).shape; }
  const std::vector<TensorSpec>& tensors() const { return tensors_; }
  bool requires_grad(Tensor t) const { return t && info(t).requires_grad; }
  void set_requires_grad(Tensor t, bool value);
  // Gives a planned tensor memory of its own, so that other phases find what it holds.
  void keep(Tensor t);

  // ---- steps ----
  void add(Call call) { add(std::move(call), phase_); }
  void add(Call call, Phase phase);
  // One that is a product of that many multiply-adds.
  void add_product(Call call, int64_t macs) {
    call.macs = macs;
    add(std::move(call));
  }
  // Lists a call of Phase::kStep before the one that is at `index` now.
  void insert(size_t index, Call call);
  // A step may have parts, numbered from 0: then kStep runs for each, followed by the calls that
  // are listed here for it, and after all of them kUpdate. These calls have no workspace, and
  // their tensors are not planned.
  void add_part_end(size_t part, Call call);
  const std::vector<std::vector<Call>>& part_ends() const { return part_ends_; }
  // Bytes of the tensors that a step reads and writes, each counted once and whole: one that is
  // added to or updated in place counts as one pass over it, and one of which a step uses some
  // columns as all of it. Of a held tensor none, since a step reads a small part of it.
  size_t bytes_moved(const Step& step) const;
  const std::vector<Step>& steps(Phase phase = Phase::kStep) const {
    return steps_[static_cast<size_t>(phase)];
  }

  const std::string& scope() const { return scope_; }
  // Names the steps and parameters defined while it lives: "down.1.block.0.conv1".
  class Scope {
   public:
    Scope(Graph& graph, const std::string& name);
    ~Scope() { graph_.scope_.resize(length_); }
    Scope(const Scope&) = delete;
    Scope& operator=(const Scope&) = delete;

   private:
    Graph& graph_;
    size_t length_;
  };

  // What is listed while it lives runs in another phase.
  class PhaseScope {
   public:
    PhaseScope(Graph& graph, Phase phase) : graph_(graph), outer_(graph.phase_) {
      graph.phase_ = phase;
    }
    ~PhaseScope() { graph_.phase_ = outer_; }
    PhaseScope(const PhaseScope&) = delete;
    PhaseScope& operator=(const PhaseScope&) = delete;

   private:
    Graph& graph_;
    Phase outer_;
  };

  // ---- gradients ----
  using Backward = std::function<void(Graph&)>;
  void on_backward(Backward backward);
  // Pops the tape. The gradients of what was computed last must have been set.
  void backward();
  // The gradient of x as a destination: created on first use.
  GradOut grad_out(Tensor x);
  // The gradient of x as memory whose parts are written once each by their own steps.
  Tensor grad_buffer(Tensor x);
  // Declares that `gradient` is x's gradient and complete.
  void set_grad(Tensor x, Tensor gradient);
  // The gradient of y, or none if nothing wrote it.
  Tensor grad(Tensor y) const;
  // x's gradient (+)= y's. The first time y's buffer itself becomes x's, so call it after the last
  // step that reads y's gradient.
  void pass_grad(Tensor y, Tensor x);

  // Statistics of x for a group norm, computed once.
  Tensor statistics(Tensor x);
  void set_statistics(Tensor x, Tensor statistics);
  // Multiply-adds of a step's forward pass.
  int64_t macs() const;
  uint16_t next_dropout_layer() { return dropout_layers_++; }

  // The device's StepState of this graph; a persistent tensor.
  Tensor state() const { return state_; }

 private:
  Tensor define(TensorSpec info);

  Backend* backend_;
  Mode mode_;
  Params params_;
  std::vector<TensorSpec> tensors_;
  std::array<std::vector<Step>, kPhases> steps_;
  std::vector<std::vector<Call>> part_ends_;
  std::string scope_;
  Phase phase_ = Phase::kStep;
  struct TapeEntry {
    Backward backward;
    std::string scope;
  };
  std::vector<TapeEntry> tape_;
  std::map<int, Tensor> gradients_;
  std::vector<bool> passed_on_;  // by tensor: its gradient's buffer has become another tensor's
  std::set<int> complete_;       // tensors whose gradient takes no more
  std::vector<bool> written_;    // by tensor: a parameter's gradient that has its first writer
  std::map<int, Tensor> statistics_;
  uint16_t dropout_layers_ = 0;
  std::optional<size_t> forward_steps_;  // those of Phase::kStep before the backward pass, if any
  Tensor state_;
  std::map<int, Tensor> shadows_;  // by weight
  std::map<int, std::vector<float>> constants_;
};

}  // namespace ddpm
