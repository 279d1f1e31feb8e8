// model/ddpm.h: sessions, one kind of work on a batch of a fixed size.
#include <algorithm>
#include <cmath>
#include <limits>
#include <variant>

#include "engine/checkpoint.h"
#include "model/c_api.h"
#include "model/forward.h"
#include "model/generator.h"
#include "model/trainer.h"

namespace ddpm::c {
namespace {

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
  ForwardGraph f =
      build_forward_graph(*core.device.backend, core.unet(), core.timesteps(), batch_size);
  Network n{f.sample, f.timestep, f.class_labels, f.output, {}, {}};
  n.store = load_store(*core.device.backend, core.weights, f.graph.params());
  n.executor = std::make_unique<Executor>(std::move(f.graph), n.store->arenas());
  n.executor->setup_for_good();
  return n;
}

Dataset make_data(const Core& core, const uint8_t* images, const int32_t* labels, int64_t count) {
  Dataset data = make_dataset(count, core.images(1));
  std::copy_n(images, data.images.size(), data.images.begin());
  if (const auto classes = core.unet().num_class_embeds) {
    data.labels.assign(labels, labels + count);
    check_indices("labels", labels, data.labels.size(), *classes);
  }
  return data;
}

Training make_training(Core& core, const ddpm_train_options& o, Dataset data) {
  TrainerOptions options;
  options.batch_size = o.batch_size;
  options.flip = o.flip != 0;
  options.objective.loss = usual_loss(core.pipeline.scheduler.variance_type);
  options.adam.learning_rate = o.learning_rate;
  options.adam.warmup_steps = o.warmup_steps;
  options.adam.grad_clip = o.grad_clip;
  options.adam.ema_decay = o.ema_decay;
  Training t{std::make_unique<Trainer>(*core.device.backend, core.unet(), core.pipeline.scheduler,
                                       options, std::move(data)),
             o.batch_size, o.seed};
  load_weights(core.weights, t.trainer->store(), Arena::kWeights);
  load_weights(core.weights, t.trainer->store(), Arena::kEma);
  t.trainer->weights_changed();
  StepState state;
  state.seed = o.seed;
  t.trainer->set_state(state);
  return t;
}

Sampling make_sampling(Core& core, int batch_size, const SamplerOptions& options) {
  Sampling s;
  s.generator = std::make_unique<Generator>(
      *core.device.backend, core.unet(), core.pipeline.scheduler, options, batch_size,
      [&](const Params& params) {
        s.store = load_store(*core.device.backend, core.weights, params);
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

}  // namespace
}  // namespace ddpm::c

using namespace ddpm;
using namespace ddpm::c;

struct ddpm_session {
  std::shared_ptr<Core> core;
  std::variant<Network, Training, Sampling> work;
  ErrorText error{};

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

ErrorText* error_of(ddpm_session* session) {
  return session == nullptr ? nullptr : &session->error;
}

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
  in_turn(model->core->device, nullptr, [&] {
    *session = new ddpm_session{model->core, make(*model->core)};
  });
}

void copy_batch(Core& core, void* to, const void* from, const Shape& s) {
  core.device.backend->transfer(to, from, static_cast<size_t>(s.count()) * sizeof(float));
}

}  // namespace

const char* ddpm_session_last_error(const ddpm_session* session) {
  return session == nullptr ? "" : session->error.text;
}

void ddpm_session_destroy(ddpm_session* session) {
  if (session == nullptr) return;
  std::unique_ptr<ddpm_session> owned(session);
  const std::shared_ptr<Core> core = session->core;
  (void)guarded(nullptr, [&] {
    in_turn(core->device, nullptr, [&] {
      core->device.backend->synchronize();
      owned.reset();
    });
  });
}

ddpm_status ddpm_session_bytes(ddpm_session* session, size_t* bytes) {
  return guarded(error_of(session), [&] {
    require(session != nullptr, "session is NULL");
    require(bytes != nullptr, "bytes is NULL");
    *bytes = session->store_bytes() + session->executor().bytes();
  });
}

ddpm_status ddpm_wait(ddpm_session* session) {
  return guarded(error_of(session), [&] {
    require(session != nullptr, "session is NULL");
    in_turn(session->core->device, nullptr, [&] {
      const StepState state = session->executor().state();
      if (state.nonfinite != 0)
        fail(Status::kNonFinite, "values that are not finite at step %llu",
             static_cast<unsigned long long>(state.bad_step));
    });
  });
}

ddpm_status ddpm_forward_open(ddpm_model* model, int batch_size, ddpm_session** session) {
  return guarded(nullptr, [&] {
    require(model != nullptr, "model is NULL");
    require(session != nullptr, "session is NULL");
    check_batch(batch_size);
    open_session(model, session, [&](Core& core) { return make_network(core, batch_size); });
  });
}

ddpm_status ddpm_forward(ddpm_session* session, const float* sample, const int32_t* timestep,
                         const int32_t* labels, float* output, void* stream) {
  return guarded(error_of(session), [&] {
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
    if (core.device.backend->stream() == nullptr) {  // a GPU's are not here to be looked at
      check_indices("timestep", timestep, static_cast<size_t>(in.n), core.timesteps());
      if (n.labels)
        check_indices("labels", labels, static_cast<size_t>(in.n), *core.unet().num_class_embeds);
    }
    in_turn(core.device, stream, [&] {
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
  return guarded(nullptr, [&] {
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
  return guarded(error_of(session), [&] {
    Training& t = work_of<Training>(session, "the session was not opened by ddpm_train_open");
    require(steps >= 0, "steps must not be negative");
    in_turn(session->core->device, stream, [&] {
      for (int i = 0; i < steps; ++i) t.trainer->step();
    });
  });
}

ddpm_status ddpm_train_get_state(ddpm_session* session, ddpm_train_state* state) {
  return guarded(error_of(session), [&] {
    Training& t = work_of<Training>(session, "the session was not opened by ddpm_train_open");
    require(state != nullptr, "state is NULL");
    require(state->struct_size == sizeof *state, "state: struct_size is not this library's");
    in_turn(session->core->device, nullptr, [&] {
      const StepState s = t.trainer->state();
      *state = {sizeof *state, s.nonfinite, s.step,         s.loss_sum,
                s.loss,        s.grad_norm, s.learning_rate};
    });
  });
}

ddpm_status ddpm_train_save(ddpm_session* session, const char* folder) {
  return guarded(error_of(session), [&] {
    Training& t = work_of<Training>(session, "the session was not opened by ddpm_train_open");
    require(folder != nullptr, "folder is NULL");
    const Core& core = *session->core;
    in_turn(session->core->device, nullptr, [&] {
      save_checkpoint(folder, core.unet(), core.pipeline.scheduler, t.trainer->store(),
                      {.step = t.trainer->state().step,
                       .seed = t.seed,
                       .batch_size = t.batch_size,
                       .numerics = core.device.backend->numerics(),
                       .plans = core.device.backend->plans(),
                       .hashes = {}});
    });
  });
}

ddpm_status ddpm_sample_open(ddpm_model* model, int batch_size, const char* sampler, int steps,
                             double eta, ddpm_session** session) {
  return guarded(nullptr, [&] {
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
  return guarded(error_of(session), [&] {
    const Sampling& s =
        work_of<Sampling>(session, "the session was not opened by ddpm_sample_open");
    require(steps != nullptr, "steps is NULL");
    *steps = s.generator->steps();
  });
}

ddpm_status ddpm_sample_start(ddpm_session* session, uint64_t seed, uint64_t first_image, float* x,
                              void* stream) {
  return guarded(error_of(session), [&] {
    Sampling& s = work_of<Sampling>(session, "the session was not opened by ddpm_sample_open");
    in_turn(session->core->device, stream, [&] {
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
  return guarded(error_of(session), [&] {
    Sampling& s = work_of<Sampling>(session, "the session was not opened by ddpm_sample_open");
    require(s.done >= 0, "the chain has not been started: call ddpm_sample_start");
    if (steps < 0 || steps > s.generator->steps() - s.done)
      fail(Status::kUsage, "steps: %d, but %d of the chain's %d are left", steps,
           s.generator->steps() - s.done, s.generator->steps());
    Core& core = *session->core;
    in_turn(core.device, stream, [&] {
      Executor& e = s.generator->executor();
      void* own = e.address(s.generator->x());
      if (x != nullptr) copy_batch(core, own, x, s.generator->shape());
      e.steps(steps);
      s.done += steps;
      if (x != nullptr) copy_batch(core, x, own, s.generator->shape());
    });
  });
}
