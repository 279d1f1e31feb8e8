// model/ddpm.h over the classes of this folder.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <limits>
#include <memory>
#include <mutex>
#include <new>
#include <utility>
#include <variant>

#include "engine/checkpoint.h"
#include "model/ddpm.h"
#include "model/device.h"
#include "model/forward.h"
#include "model/generator.h"
#include "model/pipeline.h"
#include "model/trainer.h"

namespace ddpm {
namespace {

static_assert(DDPM_OK == static_cast<int>(Status::kOk) &&
              DDPM_USAGE == static_cast<int>(Status::kUsage) &&
              DDPM_CONFIG == static_cast<int>(Status::kConfig) &&
              DDPM_FILE == static_cast<int>(Status::kFile) &&
              DDPM_MEMORY == static_cast<int>(Status::kMemory) &&
              DDPM_DEVICE == static_cast<int>(Status::kDevice) &&
              DDPM_NONFINITE == static_cast<int>(Status::kNonFinite) &&
              DDPM_PEER == static_cast<int>(Status::kPeer) &&
              DDPM_BUG == static_cast<int>(Status::kBug) &&
              DDPM_STOPPED == static_cast<int>(Status::kStopped));

constexpr int kMaxBatch = 1 << 16;

// In place, so that saying what failed cannot fail.
thread_local char last_error[1024];

ddpm_status failed(Status status, const char* text) {
  std::snprintf(last_error, sizeof last_error, "%s", text);
  return static_cast<ddpm_status>(status);
}

template <typename F>
ddpm_status guarded(F f) noexcept {
  try {
    f();
    return DDPM_OK;
  } catch (const Error& e) {
    return failed(e.status(), e.what());
  } catch (const std::bad_alloc&) {
    return failed(Status::kMemory, "out of host memory");
  } catch (const std::exception& e) {
    return failed(Status::kBug, e.what());
  } catch (...) {
    return failed(Status::kBug, "unknown exception");
  }
}

void require(bool condition, const char* what) {
  if (!condition) fail(Status::kUsage, "%s", what);
}

// What a model and its sessions share.
struct Core {
  Pipeline pipeline;
  std::unique_ptr<Backend> backend;
  std::mutex turn;

  const UNetConfig& unet() const { return pipeline.unet; }
  Shape images(int n) const {
    return {n, unet().sample_height, unet().sample_width, unet().in_channels};
  }
};

// Runs f on the backend, in order with the caller's stream.
template <typename F>
void in_turn(Core& core, void* stream, F f) {
  const std::lock_guard<std::mutex> lock(core.turn);
  require(stream == nullptr || core.backend->stream() != nullptr, "stream: the CPU has none");
  core.backend->enter(stream);
  try {
    f();
  } catch (...) {
    try {
      core.backend->leave(stream);
    } catch (const Error&) {  // the first failure is the one to report
    }
    throw;
  }
  core.backend->leave(stream);
}

struct Network {
  Tensor sample, timestep, labels, output;
  std::unique_ptr<ParamStore> store;
  std::unique_ptr<Executor> executor;
};

struct Training {
  std::unique_ptr<Trainer> trainer;
  int batch_size;
  uint64_t seed;
};

struct Sampling {
  std::unique_ptr<ParamStore> store;
  std::unique_ptr<Generator> generator;
  int done = -1;  // rows of the chain; -1: not started
};

Network make_network(Core& core, int batch_size) {
  ForwardGraph f = build_forward_graph(*core.backend, core.unet(),
                                       core.pipeline.scheduler.num_train_timesteps, batch_size);
  Network n{f.sample, f.timestep, f.class_labels, f.output, {}, {}};
  n.store = load_store(*core.backend, core.pipeline, f.graph.params());
  n.executor = std::make_unique<Executor>(std::move(f.graph), n.store->arenas());
  n.executor->setup_for_good();
  return n;
}

Dataset make_data(const Core& core, const uint8_t* images, const int32_t* labels, int64_t count) {
  Dataset data = make_dataset(count, core.images(1));
  std::copy_n(images, data.images.size(), data.images.begin());
  if (const auto classes = core.unet().num_class_embeds) {
    data.labels.assign(labels, labels + count);
    for (int32_t label : data.labels)
      if (label < 0 || label >= *classes)
        fail(Status::kUsage, "labels: %d, allowed are 0 to %d", label, *classes - 1);
  }
  return data;
}

Training make_training(Core& core, const ddpm_train_options& o, Dataset data) {
  TrainerOptions options;
  options.batch_size = o.batch_size;
  options.flip = o.flip != 0;
  options.adam.learning_rate = o.learning_rate;
  options.adam.warmup_steps = o.warmup_steps;
  options.adam.grad_clip = o.grad_clip;
  options.adam.ema_decay = o.ema_decay;
  Training t{std::make_unique<Trainer>(*core.backend, core.unet(), core.pipeline.scheduler, options,
                                       std::move(data)),
             o.batch_size, o.seed};
  const SafetensorsReader weights(core.pipeline.weights);
  load_weights(weights, t.trainer->store(), Arena::kWeights);
  load_weights(weights, t.trainer->store(), Arena::kEma);
  t.trainer->weights_changed();
  StepState state;
  state.seed = o.seed;
  t.trainer->set_state(state);
  return t;
}

Sampling make_sampling(Core& core, int batch_size, const SamplerOptions& options) {
  Sampling s;
  s.generator = std::make_unique<Generator>(*core.backend, core.unet(), core.pipeline.scheduler,
                                            options, batch_size, [&](const Params& params) {
                                              s.store =
                                                  load_store(*core.backend, core.pipeline, params);
                                              return s.store->arenas();
                                            });
  s.generator->weights_final();
  return s;
}

void check(const ddpm_train_options& o) {
  require(o.struct_size == sizeof o, "options: struct_size is not this library's");
  require(o.batch_size >= 1 && o.batch_size <= kMaxBatch, "options: batch_size must be 1 to 65536");
  require(o.flip == 0 || o.flip == 1, "options: flip must be 0 or 1");
  require(std::isfinite(o.learning_rate) && o.learning_rate > 0,
          "options: learning_rate must be positive");
  require(o.warmup_steps >= 0, "options: warmup_steps must not be negative");
  require(std::isfinite(o.grad_clip) && o.grad_clip >= 0,
          "options: grad_clip must not be negative");
  require(o.ema_decay >= 0 && o.ema_decay < 1, "options: ema_decay must be in [0, 1)");
}

// The CPU can look at indices without waiting for anything.
void check_indices(const Core& core, const char* what, const int32_t* values, int count,
                   int limit) {
  if (core.backend->stream() != nullptr) return;
  for (int i = 0; i < count; ++i)
    if (values[i] < 0 || values[i] >= limit)
      fail(Status::kUsage, "%s: %d, allowed are 0 to %d", what, values[i], limit - 1);
}

void check_batch(int batch_size) {
  require(batch_size >= 1 && batch_size <= kMaxBatch, "batch_size must be 1 to 65536");
}

}  // namespace
}  // namespace ddpm

using namespace ddpm;

struct ddpm_model {
  std::shared_ptr<Core> core;
};

struct ddpm_session {
  std::shared_ptr<Core> core;
  std::variant<Network, Training, Sampling> work;

  Executor& executor() {
    if (auto* n = std::get_if<Network>(&work)) return *n->executor;
    if (auto* t = std::get_if<Training>(&work)) return t->trainer->executor();
    return std::get<Sampling>(work).generator->executor();
  }
  size_t store_bytes() const {
    if (auto* n = std::get_if<Network>(&work)) return n->store->bytes();
    if (auto* t = std::get_if<Training>(&work)) return t->trainer->store().bytes();
    return std::get<Sampling>(work).store->bytes();
  }
};

namespace {

template <typename Work>
Work& work_of(ddpm_session* session, const char* what) {
  require(session != nullptr, "session is NULL");
  Work* work = std::get_if<Work>(&session->work);
  require(work != nullptr, what);
  return *work;
}

// make() returns the session's work; it runs on the backend, nothing of it stays if it fails.
template <typename Make>
void open_session(ddpm_model* model, ddpm_session** session, Make make) {
  in_turn(*model->core, nullptr, [&] {
    *session = new ddpm_session{model->core, make(*model->core)};
  });
}

void copy_batch(Core& core, void* to, const void* from, const Shape& s) {
  core.backend->transfer(to, from, static_cast<size_t>(s.count()) * sizeof(float));
}

}  // namespace

const char* ddpm_last_error(void) { return last_error; }

ddpm_status ddpm_open(const char* folder, const char* device, const char* precision, int threads,
                      ddpm_model** model) {
  return guarded([&] {
    require(folder != nullptr, "folder is NULL");
    require(model != nullptr, "model is NULL");
    require(threads >= 0 && threads <= 4096, "threads must be 0 to 4096");
    DeviceOptions options;
    if (device != nullptr) options.device = device;
    if (precision != nullptr) options.precision = precision;
    options.threads = threads;
    auto core = std::make_shared<Core>();
    core->pipeline = open_pipeline(folder);
    core->backend = open_backend(options);
    *model = new ddpm_model{std::move(core)};
  });
}

void ddpm_close(ddpm_model* model) { delete model; }

ddpm_status ddpm_get_info(ddpm_model* model, ddpm_info* info) {
  return guarded([&] {
    require(model != nullptr, "model is NULL");
    require(info != nullptr, "info is NULL");
    require(info->struct_size == sizeof *info, "info: struct_size is not this library's");
    Core& core = *model->core;
    const UNetConfig& u = core.unet();
    const int timesteps = core.pipeline.scheduler.num_train_timesteps;
    in_turn(core, nullptr, [&] {
      const ForwardGraph f = build_forward_graph(*core.backend, u, timesteps, 1);
      *info = {sizeof *info,
               u.sample_height,
               u.sample_width,
               u.in_channels,
               u.out_channels,
               timesteps,
               u.num_class_embeds.value_or(0),
               f.graph.params().count(),
               f.graph.macs()};
    });
  });
}

void ddpm_session_close(ddpm_session* session) {
  if (session == nullptr) return;
  std::unique_ptr<ddpm_session> owned(session);
  const std::shared_ptr<Core> core = session->core;
  (void)guarded([&] {
    in_turn(*core, nullptr, [&] {
      core->backend->synchronize();
      owned.reset();
    });
  });
}

ddpm_status ddpm_session_bytes(ddpm_session* session, size_t* bytes) {
  return guarded([&] {
    require(session != nullptr, "session is NULL");
    require(bytes != nullptr, "bytes is NULL");
    *bytes = session->store_bytes() + session->executor().bytes();
  });
}

ddpm_status ddpm_wait(ddpm_session* session) {
  return guarded([&] {
    require(session != nullptr, "session is NULL");
    in_turn(*session->core, nullptr, [&] {
      const StepState state = session->executor().state();
      if (state.nonfinite != 0)
        fail(Status::kNonFinite, "values that are not finite at step %llu",
             static_cast<unsigned long long>(state.bad_step));
    });
  });
}

ddpm_status ddpm_forward_open(ddpm_model* model, int batch_size, ddpm_session** session) {
  return guarded([&] {
    require(model != nullptr, "model is NULL");
    require(session != nullptr, "session is NULL");
    check_batch(batch_size);
    open_session(model, session, [&](Core& core) { return make_network(core, batch_size); });
  });
}

ddpm_status ddpm_forward(ddpm_session* session, const float* sample, const int32_t* timestep,
                         const int32_t* labels, float* output, void* stream) {
  return guarded([&] {
    Network& n = work_of<Network>(session, "the session was not opened by ddpm_forward_open");
    Core& core = *session->core;
    const Graph& g = n.executor->graph();
    const Shape in = g.shape(n.sample);
    require(sample != nullptr, "sample is NULL");
    require(timestep != nullptr, "timestep is NULL");
    require(output != nullptr, "output is NULL");
    require((labels != nullptr) == static_cast<bool>(n.labels),
            n.labels ? "labels is NULL, but the model has classes"
                     : "labels are given, but the model has no classes");
    check_indices(core, "timestep", timestep, in.n, core.pipeline.scheduler.num_train_timesteps);
    if (n.labels) check_indices(core, "labels", labels, in.n, *core.unet().num_class_embeds);
    in_turn(core, stream, [&] {
      const Executor& e = *n.executor;
      copy_batch(core, e.address(n.sample), sample, in);
      copy_batch(core, e.address(n.timestep), timestep, {1, 1, 1, in.n});
      if (n.labels) copy_batch(core, e.address(n.labels), labels, {1, 1, 1, in.n});
      n.executor->step();
      copy_batch(core, output, e.address(n.output), g.shape(n.output));
    });
  });
}

ddpm_status ddpm_train_open(ddpm_model* model, const ddpm_train_options* options,
                            const uint8_t* images, const int32_t* labels, int64_t count,
                            ddpm_session** session) {
  return guarded([&] {
    require(model != nullptr, "model is NULL");
    require(options != nullptr, "options is NULL");
    require(images != nullptr, "images is NULL");
    require(session != nullptr, "session is NULL");
    require(count >= 1 && count <= std::numeric_limits<int>::max(),
            "count must be 1 to 2147483647");
    require((labels != nullptr) == model->core->unet().num_class_embeds.has_value(),
            "labels must be given where the model has classes, and nowhere else");
    check(*options);
    Dataset data = make_data(*model->core, images, labels, count);
    open_session(model, session,
                 [&](Core& core) { return make_training(core, *options, std::move(data)); });
  });
}

ddpm_status ddpm_train_steps(ddpm_session* session, int steps, void* stream) {
  return guarded([&] {
    Training& t = work_of<Training>(session, "the session was not opened by ddpm_train_open");
    require(steps >= 0, "steps must not be negative");
    in_turn(*session->core, stream, [&] {
      for (int i = 0; i < steps; ++i) t.trainer->step();
    });
  });
}

ddpm_status ddpm_train_get_state(ddpm_session* session, ddpm_train_state* state) {
  return guarded([&] {
    Training& t = work_of<Training>(session, "the session was not opened by ddpm_train_open");
    require(state != nullptr, "state is NULL");
    require(state->struct_size == sizeof *state, "state: struct_size is not this library's");
    in_turn(*session->core, nullptr, [&] {
      const StepState s = t.trainer->state();
      *state = {sizeof *state, s.nonfinite, s.step,         s.loss_sum,
                s.loss,        s.grad_norm, s.learning_rate};
    });
  });
}

ddpm_status ddpm_train_save(ddpm_session* session, const char* folder) {
  return guarded([&] {
    Training& t = work_of<Training>(session, "the session was not opened by ddpm_train_open");
    require(folder != nullptr, "folder is NULL");
    const Core& core = *session->core;
    in_turn(*session->core, nullptr, [&] {
      save_checkpoint(folder, core.unet(), core.pipeline.scheduler, t.trainer->store(),
                      {.step = t.trainer->state().step,
                       .seed = t.seed,
                       .batch_size = t.batch_size,
                       .numerics = core.backend->numerics(),
                       .plans = core.backend->plans(),
                       .hashes = {}});
    });
  });
}

ddpm_status ddpm_sample_open(ddpm_model* model, int batch_size, const char* sampler, int steps,
                             double eta, ddpm_session** session) {
  return guarded([&] {
    require(model != nullptr, "model is NULL");
    require(sampler != nullptr, "sampler is NULL");
    require(session != nullptr, "session is NULL");
    require(steps >= 0, "steps must not be negative");
    check_batch(batch_size);
    SamplerOptions options;
    options.kind = parse_sampler(sampler);
    if (steps > 0) options.steps = steps;
    options.eta = eta;
    open_session(model, session,
                 [&](Core& core) { return make_sampling(core, batch_size, options); });
  });
}

ddpm_status ddpm_sample_chain(ddpm_session* session, int* steps) {
  return guarded([&] {
    const Sampling& s =
        work_of<Sampling>(session, "the session was not opened by ddpm_sample_open");
    require(steps != nullptr, "steps is NULL");
    *steps = s.generator->steps();
  });
}

ddpm_status ddpm_sample_start(ddpm_session* session, uint64_t seed, uint64_t first_image, float* x,
                              void* stream) {
  return guarded([&] {
    Sampling& s = work_of<Sampling>(session, "the session was not opened by ddpm_sample_open");
    in_turn(*session->core, stream, [&] {
      Executor& e = s.generator->executor();
      s.done = -1;
      s.generator->begin(seed, first_image);
      e.run(Phase::kStart);
      if (x != nullptr)
        copy_batch(*session->core, x, e.address(s.generator->x()), s.generator->shape());
      s.done = 0;
    });
  });
}

ddpm_status ddpm_sample_steps(ddpm_session* session, int steps, float* x, void* stream) {
  return guarded([&] {
    Sampling& s = work_of<Sampling>(session, "the session was not opened by ddpm_sample_open");
    require(s.done >= 0, "the chain has not been started: call ddpm_sample_start");
    if (steps < 0 || steps > s.generator->steps() - s.done)
      fail(Status::kUsage, "steps: %d, but %d of the chain's %d are left", steps,
           s.generator->steps() - s.done, s.generator->steps());
    Core& core = *session->core;
    in_turn(core, stream, [&] {
      Executor& e = s.generator->executor();
      void* own = e.address(s.generator->x());
      if (x != nullptr) copy_batch(core, own, x, s.generator->shape());
      e.steps(steps);
      s.done += steps;
      if (x != nullptr) copy_batch(core, x, own, s.generator->shape());
    });
  });
}
