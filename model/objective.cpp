#include "model/objective.h"

#include <utility>

#include "engine/ops.h"
#include "model/unet.h"

namespace ddpm {
namespace {

// What the network is to put out.
Tensor target(Graph& g, PredictionType type, const Schedule& schedule, const TrainingBatch& batch) {
  if (type == PredictionType::kEpsilon) return batch.noise;
  if (type == PredictionType::kSample) return batch.x0;
  // v = sqrt_ab eps - sqrt_1mab x0: the noising with its two tables exchanged.
  NoiseDesc d = schedule.noise_desc(g.shape(batch.x0));
  std::swap(d.sqrt_ab, d.sqrt_1mab);
  for (float& factor : d.sqrt_ab) factor = -factor;
  const Tensor v = g.tensor(d.x);
  g.add(g.backend().q_sample(d, batch.x0, batch.timestep, batch.noise, v));
  return v;
}

}  // namespace

Tensor add_objective(Graph& g, const UNetConfig& config, PredictionType type,
                     const Schedule& schedule, const TrainingBatch& batch) {
  const Shape s = g.shape(batch.x0);
  const Tensor x_t = g.tensor(s);
  g.add(g.backend().q_sample(schedule.noise_desc(s), batch.x0, batch.timestep, batch.noise, x_t));
  const Tensor prediction =
      build_unet(g, config, schedule.timesteps(),
                 {.sample = x_t, .timestep = batch.timestep, .class_labels = batch.class_labels});
  const Tensor loss = ops::mse_loss(g, prediction, target(g, type, schedule, batch));
  g.backward();
  return loss;
}

}  // namespace ddpm
