// The CUDA backend of a build without CUDA.
#include "kernels/backend.h"

namespace ddpm {

std::unique_ptr<Backend> make_cuda_backend(const BackendOptions&, int) {
  fail(Status::kDevice,
       "no CUDA device: this build has no CUDA backend; use --device cpu, or build with nvcc 13, "
       "cuBLASLt and cuDNN 9");
}

bool cuda_device_found() { return false; }
std::string cuda_libraries() { return {}; }

}  // namespace ddpm
