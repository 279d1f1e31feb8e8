// model/ddpm.h: samplers, whole images on a backend of their own.
#include <algorithm>
#include <atomic>
#include <cstddef>

#include "model/c_api.h"
#include "model/generator.h"

namespace ddpm::c {
namespace {

constexpr int kDefaultBatch = 8;

[[noreturn]] void stopped(const char* by) { fail(Status::kStopped, "stopped by %s", by); }

}  // namespace
}  // namespace ddpm::c

using namespace ddpm;
using namespace ddpm::c;

struct ddpm_sampler {
  ddpm_sampler(std::shared_ptr<const Core> c, const ddpm_sampler_options& o)
      : core(std::move(c)), options(o) {
    if (options.batch_size == 0) options.batch_size = kDefaultBatch;
    if (options.preview_every == 0) options.preview_every = 1;
    device.backend = open_backend(core->options);
  }

  size_t image_size() const { return static_cast<size_t>(core->images(1).count()); }
  Executor& executor() { return generator->executor(); }
  void build();
  void drop();
  void run(const ddpm_sample_task& task);
  void run_batch(const ddpm_sample_task& task, size_t done, size_t count);
  void run_chain(const ddpm_sample_task& task, size_t done, size_t count);
  void write_images(const ddpm_sample_task& task, size_t done, size_t count);
  void check_finite();

  // Weights and memory go before the backend they came from.
  std::shared_ptr<const Core> core;
  ddpm_sampler_options options;
  Device device;
  std::unique_ptr<ParamStore> store;
  std::unique_ptr<Memory> bytes;  // (batch, H, W, C), what was asked for as bytes
  Call to_bytes;
  std::unique_ptr<Generator> generator;
  std::optional<float> guidance;  // of tasks that give none; absent: not guided
  std::vector<float> host;        // (batch, H, W, C): a start that is not whole, or a preview
  std::vector<int32_t> classes;   // of the batch
  std::vector<uint64_t> seeds;    // of the batch
  std::atomic<bool> cancelled{false};
  std::atomic<bool> busy{false};
  ErrorText error;
};

void ddpm_sampler::build() {
  Backend& backend = *device.backend;
  const auto load = [&](const Params& params) {
    store = load_store(backend, core->weights, params);
    return store->arenas();
  };
  guidance = usual_guidance(*core, options.guidance);
  const SchedulerConfig& scheduler = core->pipeline.scheduler;
  generator = std::make_unique<Generator>(
      backend, core->unet(), core->timesteps(),
      sampler_rows(Schedule(scheduler), scheduler,
                   chain_options(options.sampler, options.spacing, options.steps, options.eta)),
      options.batch_size, load, guidance);
  generator->weights_final();
  const int64_t values = generator->shape().count();
  bytes = backend.allocate(static_cast<size_t>(values));
  to_bytes = backend.image_to_uint8(values, In{0}, Out{1});
  host.resize(static_cast<size_t>(values));
  classes.resize(static_cast<size_t>(options.batch_size));
  seeds.resize(static_cast<size_t>(options.batch_size));
  core->say(format("sampler of %d images, %d steps%s, %.1f MB", options.batch_size,
                   generator->steps(), guidance ? ", guided" : "",
                   static_cast<double>(executor().bytes() + store->bytes()) / 1e6));
}

// What lies in the backend's memory, while it is entered.
void ddpm_sampler::drop() {
  generator.reset();
  bytes.reset();
  store.reset();
}

void ddpm_sampler::run(const ddpm_sample_task& t) {
  generator->set_guidance(guidance_or(t.guidance, guidance));
  const size_t batch = static_cast<size_t>(options.batch_size);
  for (size_t done = 0; done < t.n; done += batch) {
    if (cancelled.exchange(false)) stopped("ddpm_cancel");
    run_batch(t, done, std::min(batch, t.n - done));
  }
}

void ddpm_sampler::run_batch(const ddpm_sample_task& t, size_t done, size_t count) {
  Executor& e = executor();
  // The slots without an image run along.
  if (t.labels != nullptr) {
    std::fill(classes.begin(), classes.end(), 0);
    std::copy_n(t.labels + done, count, classes.begin());
  }
  if (t.seeds != nullptr) std::copy_n(t.seeds + done, count, seeds.begin());
  generator->begin(t.seed, t.seeds != nullptr ? t.first : t.first + done,
                   t.labels != nullptr ? classes.data() : nullptr,
                   t.seeds != nullptr ? seeds.data() : nullptr);
  e.run(Phase::kStart);
  if (t.x_T != nullptr) {
    void* x = e.address(generator->x());
    const float* from = t.x_T + done * image_size();
    const size_t size = count * image_size() * sizeof(float);
    if (t.on_device != 0)
      device.backend->transfer(x, from, size);
    else
      device.backend->upload(x, from, size);
  }
  run_chain(t, done, count);
  write_images(t, done, count);
  // The last batch on a stream is looked at by ddpm_sampler_wait.
  if (t.stream == nullptr || done + count < t.n) check_finite();
}

void ddpm_sampler::run_chain(const ddpm_sample_task& t, size_t done, size_t count) {
  Executor& e = executor();
  const int steps = generator->steps();
  if (t.stream != nullptr) return e.steps(steps);
  struct {
    ddpm_sampler* self;
    size_t done, count;
    int before, steps;
  } at{this, done, count, 0, steps};
  // One pointer, so that std::function holds it without allocating.
  const Executor::Progress progress = [&at](int now) {
    const ddpm_sampler_options& o = at.self->options;
    if (at.self->cancelled.exchange(false)) stopped("ddpm_cancel");
    if (o.progress != nullptr &&
        o.progress(o.user, at.done, at.count, at.before + now, at.steps) != 0)
      stopped("the progress callback");
  };
  if (options.preview == nullptr) return e.steps(steps, progress);
  while (at.before < steps) {
    const int part = std::min(options.preview_every, steps - at.before);
    e.steps(part, progress);
    at.before += part;
    device.backend->download(host.data(), e.address(generator->x0()),
                             count * image_size() * sizeof(float));
    if (options.preview(options.user, done, count, at.before, steps, host.data()) != 0)
      stopped("the preview callback");
  }
}

void ddpm_sampler::write_images(const ddpm_sample_task& t, size_t done, size_t count) {
  Backend& backend = *device.backend;
  void* x = executor().address(generator->x());
  const size_t begin = done * image_size(), size = count * image_size();
  if (t.bytes != nullptr) {
    void* const slots[] = {x, bytes->data()};
    to_bytes.run({slots, nullptr, backend.stream()});
    if (t.on_device != 0)
      backend.transfer(t.bytes + begin, bytes->data(), size);
    else
      backend.download(t.bytes + begin, bytes->data(), size);
  }
  if (t.floats == nullptr) return;
  float* floats = t.floats + begin;
  if (t.on_device != 0) return backend.transfer(floats, x, size * sizeof(float));
  backend.download(floats, x, size * sizeof(float));
  for (size_t i = 0; i < size; ++i) floats[i] = std::clamp(floats[i], -1.0f, 1.0f);
}

void ddpm_sampler::check_finite() {
  const StepState state = executor().state();
  if (state.nonfinite != 0)
    fail(Status::kNonFinite,
         "sampling produced values that are not finite at step %llu of %d: the weights are damaged "
         "or the training diverged",
         static_cast<unsigned long long>(state.bad_step), generator->steps());
}

namespace {

ErrorText* error_of(ddpm_sampler* sampler) {
  return sampler == nullptr ? nullptr : &sampler->error;
}

// Runs f with the sampler for this thread alone.
template <typename F>
ddpm_status with(ddpm_sampler* sampler, void* stream, F f) {
  if (sampler == nullptr) return failed(Status::kUsage, "sampler is NULL", nullptr);
  // Another thread's call owns the sampler's text.
  if (sampler->busy.exchange(true))
    return failed(Status::kUsage, "sampler: another thread's call is running", nullptr);
  const ddpm_status status = guarded(&sampler->error, [&] { in_turn(sampler->device, stream, f); });
  sampler->busy = false;
  return status;
}

void check(const ddpm_sample_task& t, const ddpm_sampler& s) {
  require(t.on_device == 0 || t.on_device == 1, "task: on_device must be 0 or 1");
  require(t.stream == nullptr || t.on_device == 1, "task: a stream is for device pointers");
  require(t.bytes != nullptr || t.floats != nullptr, "task: bytes and floats are NULL");
  check_images(*s.core, t.first, t.n, t.labels);
}

ddpm_status run_task(ddpm_sampler* sampler, const ddpm_sample_task& task) {
  return with(sampler, task.stream, [&] {
    check(task, *sampler);
    sampler->run(task);
  });
}

}  // namespace

ddpm_status ddpm_sampler_create(ddpm_model* model, const ddpm_sampler_options* options,
                                ddpm_sampler** sampler) {
  return guarded(nullptr, [&] {
    require(model != nullptr, "model is NULL");
    require(sampler != nullptr, "sampler is NULL");
    const ddpm_sampler_options o = options_of(options, offsetof(ddpm_sampler_options, guidance));
    require(o.batch_size >= 0 && o.batch_size <= kMaxBatch,
            "options: batch_size must be 0 to 65536");
    require(o.preview_every >= 0, "options: preview_every must not be negative");
    auto made = std::make_unique<ddpm_sampler>(model->core, o);
    in_turn(made->device, nullptr, [&] {
      try {
        made->build();
      } catch (...) {
        made->drop();
        throw;
      }
    });
    *sampler = made.release();
  });
}

void ddpm_sampler_destroy(ddpm_sampler* sampler) {
  if (sampler == nullptr) return;
  std::unique_ptr<ddpm_sampler> owned(sampler);
  (void)guarded(nullptr, [&] {
    in_turn(owned->device, nullptr, [&] {
      owned->device.backend->synchronize();
      owned->drop();
    });
  });
}

const char* ddpm_sampler_last_error(const ddpm_sampler* sampler) {
  return sampler == nullptr ? "" : sampler->error.text;
}

ddpm_status ddpm_sampler_get_info(ddpm_sampler* sampler, ddpm_sampler_info* info) {
  return guarded(error_of(sampler), [&] {
    require(sampler != nullptr, "sampler is NULL");
    require(info != nullptr, "info is NULL");
    require(info->struct_size == sizeof *info, "info: struct_size is not this library's");
    *info = {sizeof *info, sampler->options.batch_size, sampler->generator->steps(),
             sampler->image_size(),
             sampler->store->bytes() + sampler->executor().bytes() + sampler->bytes->size()};
  });
}

namespace {

ddpm_sample_task task_of(uint64_t seed, uint64_t first, size_t n) {
  ddpm_sample_task task{};
  task.seed = seed;
  task.first = first;
  task.n = n;
  return task;
}

}  // namespace

ddpm_status ddpm_sample(ddpm_sampler* sampler, uint64_t seed, uint64_t first, size_t n,
                        uint8_t* nhwc) {
  ddpm_sample_task task = task_of(seed, first, n);
  task.bytes = nhwc;
  return run_task(sampler, task);
}

ddpm_status ddpm_sample_float(ddpm_sampler* sampler, uint64_t seed, uint64_t first, size_t n,
                              float* nhwc) {
  ddpm_sample_task task = task_of(seed, first, n);
  task.floats = nhwc;
  return run_task(sampler, task);
}

ddpm_status ddpm_sample_device(ddpm_sampler* sampler, uint64_t seed, uint64_t first, size_t n,
                               float* nhwc, void* stream) {
  ddpm_sample_task task = task_of(seed, first, n);
  task.on_device = 1;
  task.floats = nhwc;
  task.stream = stream;
  return run_task(sampler, task);
}

ddpm_status ddpm_sample_run(ddpm_sampler* sampler, const ddpm_sample_task* task) {
  ddpm_sample_task t;
  const ddpm_status status = guarded(nullptr, [&] {
    require(task != nullptr, "task is NULL");
    t = options_of(task, offsetof(ddpm_sample_task, seeds));
  });
  return status == DDPM_OK ? run_task(sampler, t) : status;
}

ddpm_status ddpm_sampler_wait(ddpm_sampler* sampler) {
  return with(sampler, nullptr, [&] { sampler->check_finite(); });
}

void ddpm_cancel(ddpm_sampler* sampler) {
  if (sampler != nullptr) sampler->cancelled = true;
}
