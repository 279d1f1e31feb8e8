#include "model/device.h"

#include <algorithm>

#include "engine/nearest_name.h"

namespace ddpm {
namespace {

Precision parse_precision(const std::string& name) {
  if (name == "auto") return Precision::kAuto;
  if (name == "fp32") return Precision::kFp32;
  if (name == "tf32") return Precision::kTf32;
  if (name == "bf16") return Precision::kBf16;
  fail(Status::kUsage, "--precision %s: allowed are auto, fp32, tf32, bf16", name.c_str());
}

}  // namespace

std::unique_ptr<Backend> open_backend(const DeviceOptions& o) {
  BackendOptions options;
  options.precision = parse_precision(o.precision);
  options.threads = o.threads;
  options.batch_invariant = o.batch_invariant;
  if (o.device == "cpu" || (o.device == "auto" && !cuda_device_found()))
    return make_cpu_backend(options);
  if (o.device == "cuda" || o.device == "auto") return make_cuda_backend(options, 0);
  if (o.device.starts_with("cuda:")) {
    const std::string index = o.device.substr(5);
    if (!index.empty() && index.size() < 4 &&
        std::all_of(index.begin(), index.end(), [](char c) { return c >= '0' && c <= '9'; }))
      return make_cuda_backend(options, std::stoi(index));
  }
  fail(Status::kUsage, "--device %s%s: allowed are auto, cpu, cuda, cuda:I", o.device.c_str(),
       did_you_mean(o.device, {"auto", "cpu", "cuda"}).c_str());
}

}  // namespace ddpm
