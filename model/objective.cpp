#include "model/objective.h"

#include <utility>

#include "engine/ops.h"
#include "model/unet.h"

namespace ddpm {
namespace {

// What the network reads of a batch, and the noise in it, which is absent where it was not written.
struct NoisyBatch {
  UNetInputs inputs;
  Tensor noise;
};

Tensor add_noise_table(Graph& g, const Schedule& schedule) {
  return g.constant(schedule.noise_table(), 2, "noise_table");
}

NoisyBatch draw_composed(Graph& g, const TrainingData& data, int timesteps, Tensor table,
                         const UNetInputs& out) {
  Backend& backend = g.backend();
  const Shape s = data.gather.batch;
  const Tensor x0 = g.tensor(s), noise = g.tensor(s);
  g.add(backend.gather_images(data.gather, data.images, data.labels, g.state(), x0,
                              out.class_labels));
  g.add(backend.draw_timesteps(s.n, timesteps, g.state(), out.timestep));
  g.add(backend.draw_noise(s, Purpose::kNoise, g.state(), noise));
  g.add(backend.q_sample({s, timesteps}, x0, out.timestep, noise, table, out.sample));
  return {out, noise};
}

NoisyBatch draw(Graph& g, const Schedule& schedule, const TrainingData& data) {
  const Graph::Scope scope(g, "batch");
  const Shape s = data.gather.batch;
  UNetInputs out{.sample = g.activation(s), .timestep = g.tensor({1, 1, 1, s.n}, DType::kI32)};
  if (data.labels) out.class_labels = g.tensor({1, 1, 1, s.n}, DType::kI32);
  const Tensor table = add_noise_table(g, schedule);
  const int timesteps = schedule.timesteps();
  auto call = g.backend().noisy_batch({data.gather, timesteps}, data.images, data.labels, g.state(),
                                      table, out.sample, out.timestep, out.class_labels);
  if (!call) return draw_composed(g, data, timesteps, table, out);
  g.add(std::move(*call));
  return {out, {}};
}

}  // namespace

Objective add_objective(Graph& g, const UNetConfig& config, const Schedule& schedule,
                        const TrainingBatch& batch) {
  const Shape s = g.shape(batch.x0);
  const Tensor x_t = g.activation(s);
  g.add(g.backend().q_sample({s, schedule.timesteps()}, batch.x0, batch.timestep, batch.noise,
                             add_noise_table(g, schedule), x_t));
  const Tensor prediction =
      build_unet(g, config, schedule.timesteps(),
                 {.sample = x_t, .timestep = batch.timestep, .class_labels = batch.class_labels});
  const Tensor loss = ops::mse_loss(g, prediction, batch.noise);
  g.backward();
  return {batch.timestep, loss};
}

Objective add_objective(Graph& g, const UNetConfig& config, const Schedule& schedule,
                        const TrainingData& data) {
  const NoisyBatch batch = draw(g, schedule, data);
  const Tensor prediction = build_unet(g, config, schedule.timesteps(), batch.inputs);
  const Tensor loss = ops::noise_loss(g, prediction, batch.noise);
  g.backward();
  return {batch.inputs.timestep, loss};
}

}  // namespace ddpm
