// The CUDA backend's own kernels, run on the host. What a GPU leaves to libraries (matrix
// products) is computed by the double-precision reference instead.
#pragma once

#include <memory>

#include "kernels/backend.h"

namespace ddpm::test {

// compute_type kF32 or kBF16. batch_invariant: as BackendOptions'.
std::unique_ptr<Backend> make_simt_backend(DType compute_type, bool batch_invariant = false);

}  // namespace ddpm::test
