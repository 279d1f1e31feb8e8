// A backend by the words a user gives for it.
#pragma once

#include <memory>
#include <string>

#include "kernels/backend.h"

namespace ddpm {

struct DeviceOptions {
  std::string device = "auto";     // auto, cpu, cuda, cuda:I
  std::string precision = "auto";  // auto, fp32, tf32, bf16
  int threads = 0;                 // 0 = all this process may use
  bool batch_invariant = false;
};

// Throws Error(kUsage) for an unknown word, Error(kDevice) where there is no such device.
std::unique_ptr<Backend> open_backend(const DeviceOptions&);

}  // namespace ddpm
