#include "model/objective.h"

#include "engine/ops.h"
#include "model/unet.h"

namespace ddpm {

Tensor add_objective(Graph& g, const UNetConfig& config, const Schedule& schedule,
                     const TrainingBatch& batch) {
  const Shape s = g.shape(batch.x0);
  const Tensor x_t = g.activation(s);
  g.add(g.backend().q_sample(schedule.noise_desc(s), batch.x0, batch.timestep, batch.noise, x_t));
  const Tensor prediction =
      build_unet(g, config, schedule.timesteps(),
                 {.sample = x_t, .timestep = batch.timestep, .class_labels = batch.class_labels});
  const Tensor loss = ops::mse_loss(g, prediction, batch.noise);
  g.backward();
  return loss;
}

}  // namespace ddpm
