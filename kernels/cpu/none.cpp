// The CPU backend of a build without oneDNN and Highway.
#include "kernels/backend.h"

namespace ddpm {

std::unique_ptr<Backend> make_cpu_backend(const BackendOptions&) {
  fail(Status::kDevice,
       "no CPU backend: this build has none; use --device cuda, or build with oneDNN and Highway");
}

std::string cpu_libraries() { return {}; }

}  // namespace ddpm
