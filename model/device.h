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
  bool wgmma = false;  // as BackendOptions'; Error(kUsage) on a CPU
  Allocator allocator;
};

// Throws Error(kUsage) for an unknown word, Error(kDevice) where there is no such device. What an
// earlier start measured on this device (keep_plans) is used again.
std::unique_ptr<Backend> open_backend(const DeviceOptions&);

// Keeps the backend's plans for later starts, by chip and library versions, in plans.json under
// $XDG_CACHE_HOME/ddpm or ~/.cache/ddpm, and uses those that are there. Without such a folder, or
// where the file cannot be written or read, plans are measured again.
void keep_plans(const Backend&);
void recall_plans(Backend&);

}  // namespace ddpm
