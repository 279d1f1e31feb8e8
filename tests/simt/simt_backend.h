// The CUDA backend's own kernels, run on the host. What a GPU leaves to libraries (matrix
// products) is computed by the double-precision reference instead.
#pragma once

#include <memory>

#include "tests/simt/host_lane.h"

namespace ddpm::test {

struct SimtOptions {
  bool batch_invariant = false;  // as BackendOptions'
  size_t shared_bytes = 0;  // what a block may have of shared memory; 0 = as much as a Hopper's
  int wgmma_blocks = 0;     // as ConvChip's
  bool composed = false;    // of a convolution, nothing is taken but what every backend must
  // Gets the lane that the backend makes, and is HostLane's stuck_after.
  HostLane** lane = nullptr;
  int64_t stuck_after = 0;
};

// compute_type kF32 or kBF16.
std::unique_ptr<Backend> make_simt_backend(DType compute_type, SimtOptions options = {});

}  // namespace ddpm::test
