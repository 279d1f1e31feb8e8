#include "model/objective.h"

#include <utility>

#include "engine/ops.h"
#include "model/unet.h"

namespace ddpm {
namespace {

// A batch as it is drawn.
struct DrawnBatch {
  TrainingBatch batch;  // x0 and noise absent where they were not written
  Tensor x_t;
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

// What the network is to put out.
Tensor target(Graph& g, PredictionType type, const Schedule& schedule, const TrainingBatch& batch) {
  if (type == PredictionType::kEpsilon) return batch.noise;
  if (type == PredictionType::kSample) return batch.x0;
  // v = sqrt_ab noise - sqrt_1mab x0: the noising with other factors.
  const Tensor v = g.tensor(g.shape(batch.x0));
  const Tensor table = g.constant(schedule.velocity_table(), 2, "velocity_table");
  g.add(g.backend().q_sample({g.shape(v), schedule.timesteps(), DType::kF32}, batch.x0,
                             batch.timestep, batch.noise, table, v));
  return v;
}

// Without x0 and noise where the backend draws everything at once.
DrawnBatch draw(Graph& g, PredictionType type, const Schedule& schedule, const TrainingData& data) {
  const Graph::Scope scope(g, "batch");
  Backend& backend = g.backend();
  const Shape s = data.gather.batch;
  const int timesteps = schedule.timesteps();
  DrawnBatch drawn;
  TrainingBatch& b = drawn.batch;
  b.timestep = g.tensor({1, 1, 1, s.n}, DType::kI32);
  if (data.labels) b.class_labels = g.tensor({1, 1, 1, s.n}, DType::kI32);
  const Tensor table = noise_table(g, schedule);
  if (type == PredictionType::kEpsilon) {
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
  g.add(backend.draw_timesteps(s.n, timesteps, g.state(), b.timestep));
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

}  // namespace

Objective add_objective(Graph& g, const UNetConfig& config, PredictionType type,
                        const Schedule& schedule, const TrainingBatch& batch) {
  const Tensor x_t = noised(g, schedule, batch, noise_table(g, schedule));
  const Tensor prediction = predict(g, config, schedule, x_t, batch);
  const Tensor loss =
      ops::mse_loss(g, prediction, target(g, type, schedule, batch), g.shape(batch.x0).n);
  g.backward();
  return {batch.timestep, loss};
}

Objective add_objective(Graph& g, const UNetConfig& config, PredictionType type,
                        const Schedule& schedule, const TrainingData& data) {
  const DrawnBatch drawn = draw(g, type, schedule, data);
  const int images = static_cast<int>(data.gather.images_per_step());
  const Tensor prediction = predict(g, config, schedule, drawn.x_t, drawn.batch);
  const Tensor loss =
      type == PredictionType::kEpsilon
          ? ops::noise_loss(g, prediction, drawn.batch.noise, images)
          : ops::mse_loss(g, prediction, target(g, type, schedule, drawn.batch), images);
  g.backward();
  return {drawn.batch.timestep, loss};
}

}  // namespace ddpm
