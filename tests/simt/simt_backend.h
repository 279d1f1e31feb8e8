// The CUDA backend's own kernels, run on the host. What a GPU leaves to libraries (matrix
// products) is computed by the double-precision reference instead.
#pragma once

#include <memory>

#include "kernels/backend.h"

namespace ddpm::test {

// compute_type kF32 or kBF16. batch_invariant: as BackendOptions'. shared_bytes: what a block may
// have of shared memory; 0 = as much as on a Hopper.
std::unique_ptr<Backend> make_simt_backend(DType compute_type, bool batch_invariant = false,
                                           size_t shared_bytes = 0);

}  // namespace ddpm::test
