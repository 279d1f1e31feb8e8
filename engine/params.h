// The parameters of a network: names, shapes, their place in flat arenas, and their checkpoint
// form.
//
// Arenas (weights, gradients, Adam's m and v, EMA) share one layout, in reverse definition order:
// the backward pass finishes gradients from the front of the arena to its end, so that buckets of
// gradients are contiguous and close in order. In memory a filter is (K,R,S,C); in a checkpoint it
// is PyTorch's (K,C,R,S). One parameter may hold several checkpoint tensors as consecutive rows of
// K (q, k and v are one matrix).
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "kernels/shape.h"

namespace ddpm {

// DDPM's initialisation: Glorot uniform, with scale 1e-10 for layers that start at (almost) zero.
enum class Init { kGlorot, kNearZero, kZeros, kOnes, kNormal };

struct ParamPiece {
  std::string key;  // in checkpoints, e.g. "conv_in.weight"
  int rows = 0;     // of K
  Init init = Init::kZeros;
};

struct Param {
  std::string name;
  Shape shape;   // vectors (1,1,1,K); matrices and filters (K,R,S,C)
  int rank = 1;  // of the checkpoint tensors: 1, 2 or 4
  std::vector<ParamPiece> pieces;
  int64_t offset = 0;  // in an arena, elements; set by lay_out()

  int rows() const { return rank == 1 ? shape.c : shape.n; }
  int64_t row_size() const { return rank == 1 ? 1 : shape.count() / shape.n; }
};

class Params {
 public:
  // Returns the number of the new parameter. Throws if its pieces do not cover its rows.
  int add(Param param);
  // Assigns offsets; call once, after the last add().
  void lay_out();

  const std::vector<Param>& all() const { return params_; }
  const Param& operator[](int index) const { return params_.at(static_cast<size_t>(index)); }
  int64_t arena_size() const { return arena_size_; }  // elements, padding included
  int64_t count() const;                              // elements, padding excluded

  // Initial values of one parameter, in the arena's layout; equal seeds give equal weights.
  std::vector<float> initial_values(uint64_t seed, int param) const;
  // Lets the layers that start at (almost) zero start as the others do. A network at its initial
  // weights is no measure of speed: zeros compute faster.
  void activate_zero_layers();

 private:
  std::vector<Param> params_;
  int64_t arena_size_ = 0;
};

// One checkpoint tensor: `piece` of a parameter.
struct CheckpointTensor {
  std::string key;
  std::vector<uint64_t> shape;  // PyTorch's
  int param = 0, row = 0;       // the rows of which parameter it is
  int rows = 0;

  int64_t count() const;
};

// All of them, in definition order.
std::vector<CheckpointTensor> checkpoint_tensors(const Params&);

// Between the arena's layout of these rows and PyTorch's.
void to_checkpoint(const Params&, const CheckpointTensor&, const float* rows, float* tensor);
void from_checkpoint(const Params&, const CheckpointTensor&, const float* tensor, float* rows);

}  // namespace ddpm
