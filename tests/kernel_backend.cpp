#include "tests/kernel_backend.h"

#include "tests/simt/simt_backend.h"

namespace ddpm::test {

KernelDevice& kernel_device() {
  static KernelDevice device = KernelDevice::kHost;  // set once, by main
  return device;
}

std::unique_ptr<Backend> make_kernel_backend(DType compute_type) {
  if (kernel_device() == KernelDevice::kHost) return make_simt_backend(compute_type);
  const bool narrow = compute_type == DType::kBF16;
  // Batch-invariant: our own convolutions, rather than a library's.
  return make_cuda_backend(
      {.precision = narrow ? Precision::kBf16 : Precision::kFp32, .batch_invariant = true}, 0);
}

}  // namespace ddpm::test
