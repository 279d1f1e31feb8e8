#include "model/objective.h"

#include <utility>

#include "engine/ops.h"
#include "model/likelihood.h"
#include "model/unet.h"

namespace ddpm {
namespace {

// A batch as it is drawn.
struct DrawnBatch {
  TrainingBatch batch;  // x0 and noise absent where they were not written
  Tensor x_t;
  Tensor weight, loss_history;  // (N) and as Objective's, where timesteps are drawn by losses
};

Tensor noise_table(Graph& g, const Schedule& schedule) {
  return g.constant(schedule.noise_table(), 2, "noise_table");
}

// x_t = sqrt_ab x0 + sqrt_1mab noise, paper eq. 4
Tensor noised(Graph& g, const Schedule& schedule, const TrainingBatch& batch, Tensor table) {
  const Shape s = g.shape(batch.x0);
  const Tensor x_t = g.activation(s);
  g.add(g.backend().q_sample({s, schedule.timesteps(), g.info(x_t).dtype}, batch.x0, batch.timestep,
                             batch.noise, table, x_t));
  return x_t;
}

// a x0 + b noise: the noising with other factors.
Tensor mixed(Graph& g, const Schedule& schedule, const TrainingBatch& batch,
             std::vector<float> factors, const char* name) {
  const Tensor y = g.tensor(g.shape(batch.x0));
  const Tensor table = g.constant(std::move(factors), 2, name);
  g.add(g.backend().q_sample({g.shape(y), schedule.timesteps(), DType::kF32}, batch.x0,
                             batch.timestep, batch.noise, table, y));
  return y;
}

// What the network is to put out.
Tensor target(Graph& g, PredictionType type, const Schedule& schedule, const TrainingBatch& batch) {
  switch (type) {
    case PredictionType::kEpsilon:
      return batch.noise;
    case PredictionType::kSample:
      return batch.x0;
    case PredictionType::kVPrediction:
      return mixed(g, schedule, batch, schedule.velocity_table(), "velocity_table");
    case PredictionType::kPreviousMean:
      return mixed(g, schedule, batch, schedule.previous_mean_table(), "previous_mean_table");
  }
  fail(Status::kBug, "unknown prediction type %d", static_cast<int>(type));
}

// The noise's mean square, each image counting the same: the backends have calls of their own.
bool plain(const SchedulerConfig& scheduler, const ObjectiveOptions& o) {
  return scheduler.prediction_type == PredictionType::kEpsilon && o.loss == LossKind::kSimple &&
         o.timesteps == Timesteps::kUniform;
}

// Without x0 and noise where the backend draws everything at once.
DrawnBatch draw(Graph& g, const SchedulerConfig& scheduler, const Schedule& schedule,
                const ObjectiveOptions& o, const TrainingData& data) {
  const Graph::Scope scope(g, "batch");
  Backend& backend = g.backend();
  const Shape s = data.gather.batch;
  const int timesteps = schedule.timesteps();
  DrawnBatch drawn;
  TrainingBatch& b = drawn.batch;
  b.timestep = g.tensor({1, 1, 1, s.n}, DType::kI32);
  if (data.labels) b.class_labels = g.tensor({1, 1, 1, s.n}, DType::kI32);
  const Tensor table = noise_table(g, schedule);
  if (plain(scheduler, o)) {
    const Tensor x_t = g.activation(s);
    auto call = backend.noisy_batch({data.gather, timesteps}, data.images, data.labels, g.state(),
                                    table, x_t, b.timestep, b.class_labels);
    if (call) {
      g.add(std::move(*call));
      drawn.x_t = x_t;
      return drawn;
    }
  }
  b.x0 = g.tensor(s);
  b.noise = g.tensor(s);
  g.add(backend.gather_images(data.gather, data.images, data.labels, g.state(), b.x0,
                              b.class_labels));
  if (o.timesteps == Timesteps::kUniform) {
    g.add(backend.draw_timesteps(s.n, timesteps, g.state(), b.timestep));
  } else {
    drawn.weight = g.tensor({1, 1, 1, s.n});
    drawn.loss_history =
        g.persistent({timesteps, 1, 1, kLossHistoryRow}, DType::kF32, "loss_history");
    g.add(backend.draw_timesteps_by_loss(s.n, timesteps, drawn.loss_history, g.state(), b.timestep,
                                         drawn.weight));
  }
  g.add(backend.draw_noise(s, g.state(), b.noise));
  drawn.x_t = noised(g, schedule, b, table);
  return drawn;
}

Tensor predict(Graph& g, const UNetConfig& config, const Schedule& schedule, Tensor x_t,
               const TrainingBatch& batch) {
  return build_unet(
      g, config, schedule.timesteps(),
      {.sample = x_t, .timestep = batch.timestep, .class_labels = batch.class_labels});
}

// The loss of a batch that was written out; returns each image's. weight: absent where all count
// the same.
Tensor add_loss(Graph& g, const SchedulerConfig& scheduler, const Schedule& schedule, LossKind loss,
                Tensor prediction, const TrainingBatch& batch, Tensor weight, int step_images) {
  DDPM_CHECK(g.shape(prediction).c ==
                     (is_learned(scheduler.variance_type) ? 2 : 1) * g.shape(batch.x0).c &&
                 (loss != LossKind::kSimple || !is_learned(scheduler.variance_type)),
             "loss %d of %d channels, variance %s", static_cast<int>(loss), g.shape(prediction).c,
             name_of(scheduler.variance_type).c_str());
  const Tensor goal = target(g, scheduler.prediction_type, schedule, batch);
  if (loss == LossKind::kSimple && !weight) return ops::mse_loss(g, prediction, goal, step_images);
  const DiffusionLossDesc d{.x = g.shape(batch.x0),
                            .loss = loss,
                            .variance = is_learned(scheduler.variance_type),
                            .timesteps = schedule.timesteps(),
                            .step_images = step_images};
  ops::LossInputs in{.target = goal, .timestep = batch.timestep, .weight = weight};
  if (loss != LossKind::kSimple) {
    std::vector<float> factors;
    for (const LossFactors& f : loss_factors(schedule, scheduler))
      factors.insert(factors.end(), {f.mean, f.log_variance, f.excess, f.excess_slope});
    in.x0 = batch.x0;
    in.factors = g.constant(std::move(factors), 4, "loss_factors");
  }
  return ops::diffusion_loss(g, d, prediction, in);
}

}  // namespace

LossKind usual_loss(VarianceType type) {
  if (!is_learned(type)) return LossKind::kSimple;
  return type == VarianceType::kLearned ? LossKind::kKl : LossKind::kHybrid;
}

Objective add_objective(Graph& g, const UNetConfig& config, const SchedulerConfig& scheduler,
                        const ObjectiveOptions& o, const TrainingBatch& batch) {
  const Schedule schedule(scheduler);
  const Tensor x_t = noised(g, schedule, batch, noise_table(g, schedule));
  const Tensor prediction = predict(g, config, schedule, x_t, batch);
  const Tensor loss =
      add_loss(g, scheduler, schedule, o.loss, prediction, batch, {}, g.shape(batch.x0).n);
  g.backward();
  return {batch.timestep, loss, {}};
}

Objective add_objective(Graph& g, const UNetConfig& config, const SchedulerConfig& scheduler,
                        const ObjectiveOptions& o, const TrainingData& data) {
  const Schedule schedule(scheduler);
  const DrawnBatch drawn = draw(g, scheduler, schedule, o, data);
  const int images = static_cast<int>(data.gather.images_per_step());
  const Tensor prediction = predict(g, config, schedule, drawn.x_t, drawn.batch);
  const Tensor loss =
      plain(scheduler, o)
          ? ops::noise_loss(g, prediction, drawn.batch.noise, images)
          : add_loss(g, scheduler, schedule, o.loss, prediction, drawn.batch, drawn.weight, images);
  g.backward();
  return {drawn.batch.timestep, loss, drawn.loss_history};
}

}  // namespace ddpm
