// What the files of the C entry share: handles, and how a call becomes a status.
#pragma once

#include <cstring>
#include <memory>
#include <mutex>
#include <new>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "model/ddpm.h"
#include "model/device.h"
#include "model/pipeline.h"
#include "model/sampler.h"

namespace ddpm::c {

constexpr int kMaxBatch = 1 << 16;

// In place, so that saying what failed cannot fail.
struct ErrorText {
  char text[1024] = "";
};

// The text goes to the thread, and to the handle if there is one.
ddpm_status failed(Status status, const char* text, ErrorText* handle);

template <typename F>
ddpm_status guarded(ErrorText* handle, F f) noexcept {
  try {
    f();
    return DDPM_OK;
  } catch (const Error& e) {
    return failed(e.status(), e.what(), handle);
  } catch (const std::bad_alloc&) {
    return failed(Status::kMemory, "out of host memory", handle);
  } catch (const std::exception& e) {
    return failed(Status::kBug, e.what(), handle);
  } catch (...) {
    return failed(Status::kBug, "unknown exception", handle);
  }
}

void require(bool condition, const char* what);

// The caller's struct, or all defaults. `first_size`: that of the first header that had it. A field
// that is added must not lie in what was padding.
template <typename Options>
Options options_of(const Options* given, size_t first_size = sizeof(Options)) {
  Options options{};
  if (given == nullptr) return options;
  require(given->struct_size >= first_size && given->struct_size <= sizeof options,
          "options: struct_size is not this library's");
  std::memcpy(&options, given, given->struct_size);
  return options;
}

// A backend and who may use it now.
struct Device {
  std::unique_ptr<Backend> backend;
  std::mutex turn;
};

// What a model, its samplers and its sessions share.
struct Core {
  explicit Core(Pipeline p) : pipeline(std::move(p)), weights(pipeline.weights, Status::kConfig) {}
  Core(Pipeline p, std::vector<uint8_t> bytes)
      : pipeline(std::move(p)), weights(pipeline.weights, std::move(bytes)) {}

  Pipeline pipeline;
  SafetensorsReader weights;
  DeviceOptions options;
  ddpm_log_callback log = nullptr;
  void* user = nullptr;
  Device device;  // of the sessions

  const UNetConfig& unet() const { return pipeline.unet; }
  int timesteps() const { return pipeline.scheduler.num_train_timesteps; }
  Shape images(int n) const {
    return {n, unet().sample_height, unet().sample_width, unet().in_channels};
  }
  void say(const std::string& line) const {
    if (log != nullptr) log(user, line.c_str());
  }
};

// Runs f on the backend, in order with the caller's stream.
template <typename F>
void in_turn(Device& device, void* stream, F f) {
  const std::lock_guard<std::mutex> lock(device.turn);
  Backend& backend = *device.backend;
  require(stream == nullptr || backend.stream() != nullptr, "stream: the CPU has none");
  backend.enter(stream);
  try {
    f();
  } catch (...) {
    try {
      backend.leave(stream);
    } catch (const Error&) {  // the first failure is the one to report
    }
    throw;
  }
  backend.leave(stream);
}

// Throws Error(kUsage) for a value outside 0 to limit - 1.
void check_indices(const char* what, const int32_t* values, size_t count, int limit);
void check_batch(int batch_size);
// Images first, ..., first + n - 1 of a model, with a label each or NULL.
void check_images(const Core& core, uint64_t first, size_t n, const int32_t* labels);
// The guidance of an options struct, absent where it is 0. Throws Error(kUsage) for a model that
// cannot be guided.
std::optional<float> usual_guidance(const Core& core, double guidance);
// That of a task or request: as given, or where it is 0 the usual one of its sampler or pool.
float guidance_or(double given, std::optional<float> usual);
// Of the fields of those names in an options struct.
SamplerOptions chain_options(const char* sampler, const char* spacing, int steps, double eta);

}  // namespace ddpm::c

struct ddpm_model {
  std::shared_ptr<ddpm::c::Core> core;
};
