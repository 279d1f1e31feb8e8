// The backend that runs the CUDA kernels in the tests: the host's execution of them, or, with
// `ddpm_tests --device cuda`, a GPU, which then runs the same cases over whole grids.
#pragma once

#include <memory>

#include "kernels/backend.h"

namespace ddpm::test {

enum class KernelDevice { kHost, kGpu };
KernelDevice& kernel_device();

// compute_type kF32 (exact on a GPU as well) or kBF16. A GPU's is batch-invariant in any case: then
// our own convolutions are used, rather than a library's.
std::unique_ptr<Backend> make_kernel_backend(DType compute_type, bool batch_invariant = false);
// bf16, with our own convolutions by wgmma where that kernel takes them, in so many blocks (on a
// GPU as many as it has multiprocessors). Throws Error(kDevice) on a GPU that has no wgmma.
std::unique_ptr<Backend> make_wgmma_backend(int blocks);

}  // namespace ddpm::test
