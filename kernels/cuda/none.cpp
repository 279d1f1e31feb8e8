// The CUDA backend of a build without CUDA.
#include "kernels/backend.h"

namespace ddpm {

std::unique_ptr<Backend> make_cuda_backend(const BackendOptions&, int) {
  fail(Status::kDevice,
       "no CUDA device: this build has no CUDA backend; use --device cpu, or build with nvcc 13, "
       "cuBLASLt and cuDNN 9");
}

int cuda_device_count() { return 0; }
std::string cuda_libraries() { return {}; }

}  // namespace ddpm
