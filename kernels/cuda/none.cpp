// The CUDA backend of a build without CUDA.
#include "kernels/backend.h"

namespace ddpm {

std::unique_ptr<Backend> make_cuda_backend(const BackendOptions&, int) {
  fail(Status::kDevice, "no CUDA device: this build has no CUDA backend; use --device cpu");
}

}  // namespace ddpm
