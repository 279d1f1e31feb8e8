#include "tests/kernel_backend.h"

#include "tests/simt/simt_backend.h"

namespace ddpm::test {

KernelDevice& kernel_device() {
  static KernelDevice device = KernelDevice::kHost;  // set once, by main
  return device;
}

std::unique_ptr<Backend> make_kernel_backend(DType compute_type, bool batch_invariant) {
  if (kernel_device() == KernelDevice::kHost)
    return make_simt_backend(compute_type, {.batch_invariant = batch_invariant});
  const bool narrow = compute_type == DType::kBF16;
  return make_cuda_backend(
      {.precision = narrow ? Precision::kBf16 : Precision::kFp32, .batch_invariant = true}, 0);
}

std::unique_ptr<Backend> make_wgmma_backend(int blocks) {
  if (kernel_device() == KernelDevice::kHost)
    return make_simt_backend(DType::kBF16, {.wgmma_blocks = blocks});
  return make_cuda_backend({.precision = Precision::kBf16, .batch_invariant = true, .wgmma = true},
                           0);
}

}  // namespace ddpm::test
