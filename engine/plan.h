// Where every planned tensor and workspace lies in one arena: liveness, then offsets. Two tensors
// overlap only if they are never alive at the same step.
#pragma once

#include <cstddef>
#include <vector>

#include "engine/graph.h"

namespace ddpm {

struct Placement {
  size_t offset = 0, bytes = 0;
  int first = -1, last = -1;  // steps: written first, used last; -1 = never
};

struct Plan {
  std::vector<Placement> tensors;     // by tensor id; only planned ones that are used
  std::vector<Placement> workspaces;  // by step
  size_t bytes = 0;                   // of the arena
  size_t lower_bound = 0;             // the most bytes alive at one step
};

// Throws Error(kBug) if a step reads a planned tensor that no earlier step wrote.
Plan make_plan(const std::vector<TensorSpec>& tensors, const std::vector<Step>& steps);

}  // namespace ddpm
