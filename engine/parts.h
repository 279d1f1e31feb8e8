// A step's batch in parts: over ranks, and on a rank one after the other.
#pragma once

#include <cstdint>
#include <vector>

#include "engine/comm.h"
#include "engine/graph.h"

namespace ddpm {

struct Parts {
  int total = 1;  // equal parts of the batch, over all ranks; rank r runs those from r own on
  int own = 1;    // of a rank
  // Sum gradients as a binary tree over the parts, so that the result does not depend on which rank
  // ran which. `total` and `own` are powers of two then.
  bool in_order = false;
  Communicator* ranks = nullptr;  // null where one process runs them all
  int64_t bucket = 1 << 20;       // parameters whose gradients are summed over ranks at a time
  DType sum_type = DType::kF32;   // of these sums where they are not in order; or bf16

  bool split() const { return total > 1; }
  int first() const { return ranks == nullptr ? 0 : ranks->rank() * own; }
};

// Gradients that are summed over ranks together: a range of their arena, and the number of calls of
// a training step after which the last of them is written.
struct Bucket {
  int64_t begin = 0, end = 0;
  size_t closed = 0;
  Tensor first;  // the gradient at `begin`
};
// Of some `size` parameters each, in the arena's order, which is that in which the backward pass
// finishes gradients.
std::vector<Bucket> gradient_buckets(const Graph& g, int64_t size);

// Lists what a step in parts is besides its calls on a part: after each part, its loss kept and its
// gradient added to those before; sums over ranks, which begin in the last part's backward pass
// where they are not in order and there is one part; and the sum of losses. Call it behind
// backward() where parts.split(); the optimizer follows in Phase::kUpdate.
void add_parts(Graph& g, const Parts& parts, int images_per_part);

}  // namespace ddpm
