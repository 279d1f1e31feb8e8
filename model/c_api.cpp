// model/ddpm.h: errors and models.
#include "model/c_api.h"

#include <cstddef>
#include <cstdio>
#include <limits>

#include "model/forward.h"

namespace ddpm::c {
namespace {

static_assert(DDPM_OK == static_cast<int>(Status::kOk) &&
              DDPM_USAGE == static_cast<int>(Status::kUsage) &&
              DDPM_CONFIG == static_cast<int>(Status::kConfig) &&
              DDPM_FILE == static_cast<int>(Status::kFile) &&
              DDPM_MEMORY == static_cast<int>(Status::kMemory) &&
              DDPM_DEVICE == static_cast<int>(Status::kDevice) &&
              DDPM_NONFINITE == static_cast<int>(Status::kNonFinite) &&
              DDPM_PEER == static_cast<int>(Status::kPeer) &&
              DDPM_FULL == static_cast<int>(Status::kFull) &&
              DDPM_TIMEOUT == static_cast<int>(Status::kTimeout) &&
              DDPM_BUG == static_cast<int>(Status::kBug) &&
              DDPM_STOPPED == static_cast<int>(Status::kStopped));

static_assert(std::string_view(DDPM_VERSION) == kVersion);

thread_local ErrorText last_error;

Allocator allocator_of(const ddpm_model_options& o) {
  constexpr uintptr_t kAlignment = 256;
  const auto release = [release = o.release, user = o.user](void* memory, size_t bytes) {
    release(user, memory, bytes);
  };
  const auto allocate = [allocate = o.allocate, user = o.user, release](size_t bytes) {
    void* memory = allocate(user, bytes);
    if (reinterpret_cast<uintptr_t>(memory) % kAlignment == 0) return memory;
    release(memory, bytes);
    fail(Status::kUsage, "options: allocate gave memory that is not aligned to 256");
  };
  return {allocate, release};
}

DeviceOptions device_options(const ddpm_model_options& o) {
  require(o.threads >= 0 && o.threads <= 4096, "options: threads must be 0 to 4096");
  require(o.batch_invariant == 0 || o.batch_invariant == 1,
          "options: batch_invariant must be 0 or 1");
  DeviceOptions options;
  if (o.device != nullptr) options.device = o.device;
  if (o.precision != nullptr) options.precision = o.precision;
  options.threads = o.threads;
  options.batch_invariant = o.batch_invariant != 0;
  require((o.allocate == nullptr) == (o.release == nullptr),
          "options: allocate and release must both be given, or neither");
  if (o.allocate != nullptr) options.allocator = allocator_of(o);
  return options;
}

// The model of a core that lacks its device only.
ddpm_model* make_model(std::shared_ptr<Core> core, const ddpm_model_options& o) {
  core->options = device_options(o);
  core->log = o.log;
  core->user = o.user;
  core->device.backend = open_backend(core->options);
  core->say(format("model %s on %s", core->weights.path().c_str(),
                   core->device.backend->description().c_str()));
  return new ddpm_model{std::move(core)};
}

void check_guidance(double guidance) {
  require(guidance >= 0 && guidance <= 1000, "guidance must be 0 to 1000");
}

Pipeline pipeline_of(const ddpm_model_files& files) {
  Pipeline p;
  p.folder = "memory";
  p.weights = "weights in memory";
  p.unet = parse_unet_config(files.unet_config, "unet_config");
  if (files.scheduler_config != nullptr)
    p.scheduler = parse_scheduler_config(files.scheduler_config, "scheduler_config");
  return p;
}

}  // namespace

ddpm_status failed(Status status, const char* text, ErrorText* handle) {
  std::snprintf(last_error.text, sizeof last_error.text, "%s", text);
  if (handle != nullptr) std::snprintf(handle->text, sizeof handle->text, "%s", text);
  return static_cast<ddpm_status>(status);
}

void require(bool condition, const char* what) {
  if (!condition) fail(Status::kUsage, "%s", what);
}

void check_indices(const char* what, const int32_t* values, size_t count, int limit) {
  for (size_t i = 0; i < count; ++i)
    if (values[i] < 0 || values[i] >= limit)
      fail(Status::kUsage, "%s: %d, allowed are 0 to %d", what, values[i], limit - 1);
}

void check_batch(int batch_size) {
  require(batch_size >= 1 && batch_size <= kMaxBatch, "batch_size must be 1 to 65536");
}

void check_images(const Core& core, uint64_t first, size_t n, const int32_t* labels) {
  const auto size = static_cast<size_t>(core.images(1).count());
  require(n <= std::numeric_limits<size_t>::max() / sizeof(float) / size, "n is too large");
  require(n <= std::numeric_limits<uint64_t>::max() - first, "first + n is too large");
  if (labels == nullptr) return;
  const std::optional<int> classes = core.unet().num_class_embeds;
  require(classes.has_value(), "labels are given, but the model has no classes");
  check_indices("labels", labels, n, *classes);
}

std::optional<float> usual_guidance(const Core& core, double guidance) {
  check_guidance(guidance);
  if (guidance == 0) return {};
  if (!core.unet().null_class)
    fail(Status::kUsage,
         "options: guidance %g: the model %s; train one with train.label_dropout, 0.1 say, and "
         "unet.num_class_embeds = classes + 1",
         guidance,
         core.unet().classes() == 0 ? "has no classes" : "was not trained without its classes too");
  return static_cast<float>(guidance);
}

float guidance_or(double given, std::optional<float> usual) {
  check_guidance(given);
  if (given == 0) return usual.value_or(1);
  if (!usual && given != 1)
    fail(Status::kUsage,
         "guidance %g: the sampler or pool is not guided; make it with a guidance in its options",
         given);
  return static_cast<float>(given);
}

SamplerOptions chain_options(const char* sampler, const char* spacing, int steps, double eta) {
  require(steps >= 0, "steps must not be negative");
  SamplerOptions options;
  if (sampler != nullptr) options.kind = parse_sampler(sampler);
  if (spacing != nullptr) options.spacing = parse_spacing(spacing);
  if (steps > 0) options.steps = steps;
  options.eta = eta;
  return options;
}

}  // namespace ddpm::c

using namespace ddpm;
using namespace ddpm::c;

const char* ddpm_version(void) { return kVersion; }
const char* ddpm_last_error(void) { return last_error.text; }

const char* ddpm_status_string(ddpm_status status) {
  switch (status) {
    case DDPM_OK:
      return "success";
    case DDPM_USAGE:
      return "bad argument";
    case DDPM_CONFIG:
      return "missing or unusable model or setting";
    case DDPM_FILE:
      return "unreadable or damaged file";
    case DDPM_MEMORY:
      return "out of memory";
    case DDPM_DEVICE:
      return "no device or driver, or a failure of it";
    case DDPM_NONFINITE:
      return "values that are not finite";
    case DDPM_PEER:
      return "another process was lost";
    case DDPM_FULL:
      return "the queue has no room now";
    case DDPM_TIMEOUT:
      return "a deadline passed";
    case DDPM_BUG:
      return "internal error";
    case DDPM_STOPPED:
      return "stopped";
  }
  return "unknown status";
}

ddpm_status ddpm_model_load(const char* folder, const ddpm_model_options* options,
                            ddpm_model** model) {
  return guarded(nullptr, [&] {
    require(folder != nullptr, "folder is NULL");
    require(model != nullptr, "model is NULL");
    const ddpm_model_options o = options_of(options);
    *model = make_model(std::make_shared<Core>(open_pipeline(folder)), o);
  });
}

ddpm_status ddpm_model_load_memory(const ddpm_model_files* files, const ddpm_model_options* options,
                                   ddpm_model** model) {
  return guarded(nullptr, [&] {
    require(files != nullptr, "files is NULL");
    require(model != nullptr, "model is NULL");
    const ddpm_model_files f = options_of(files);
    require(f.unet_config != nullptr, "files: unet_config is NULL");
    require(f.weights != nullptr, "files: weights is NULL");
    const ddpm_model_options o = options_of(options);
    const auto* bytes = static_cast<const uint8_t*>(f.weights);
    std::vector<uint8_t> copy;
    require(f.weights_size <= copy.max_size(), "files: weights_size is too large");
    copy.assign(bytes, bytes + f.weights_size);
    *model = make_model(std::make_shared<Core>(pipeline_of(f), std::move(copy)), o);
  });
}

void ddpm_model_destroy(ddpm_model* model) { delete model; }

ddpm_status ddpm_get_info(ddpm_model* model, ddpm_info* info) {
  return guarded(nullptr, [&] {
    require(model != nullptr, "model is NULL");
    require(info != nullptr, "info is NULL");
    const size_t size = info->struct_size;
    require(size >= offsetof(ddpm_info, null_label) && size <= sizeof *info,
            "info: struct_size is not this library's");
    Core& core = *model->core;
    const UNetConfig& u = core.unet();
    in_turn(core.device, nullptr, [&] {
      const ForwardGraph f = build_forward_graph(*core.device.backend, u, core.timesteps(), 1);
      const ddpm_info all = {info->struct_size, u.sample_height,
                             u.sample_width,    u.in_channels,
                             u.out_channels,    core.timesteps(),
                             u.classes(),       f.graph.params().count(),
                             f.graph.macs(),    u.null_class ? u.classes() : -1};
      std::memcpy(info, &all, size);
    });
  });
}
