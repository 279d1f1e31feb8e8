// The CUDA backend's own kernels, run on the host. What a GPU leaves to libraries (matrix
// products) is computed by the double-precision reference instead.
#pragma once

#include <memory>

#include "kernels/backend.h"

namespace ddpm::test {

struct SimtOptions {
  bool batch_invariant = false;  // as BackendOptions'
  size_t shared_bytes = 0;  // what a block may have of shared memory; 0 = as much as a Hopper's
  int wgmma_blocks = 0;     // as ConvChip's
  bool composed = false;    // of a convolution, nothing is taken but what every backend must
};

// compute_type kF32 or kBF16.
std::unique_ptr<Backend> make_simt_backend(DType compute_type, SimtOptions options = {});

}  // namespace ddpm::test
