#include "model/trainer.h"

#include <utility>
#include <vector>

#include "engine/optimizer.h"
#include "model/objective.h"

namespace ddpm {

TrainingGraph build_training_graph(Backend& backend, const UNetConfig& unet,
                                   const SchedulerConfig& scheduler, const TrainerOptions& options,
                                   int64_t image_count) {
  const Schedule schedule(scheduler);
  TrainingGraph t{Graph(backend, Mode::kTraining), {}, {}};
  Graph& g = t.graph;
  const Shape s{options.batch_size, unet.sample_height, unet.sample_width, unet.in_channels};
  const bool conditional = unet.num_class_embeds.has_value();
  TrainingBatch batch;
  {
    const Graph::Scope scope(g, "batch");
    t.images = g.persistent({static_cast<int>(image_count), s.h, s.w, s.c}, DType::kU8, "images");
    batch.x0 = g.tensor(s);
    batch.timestep = g.tensor({1, 1, 1, s.n}, DType::kI32);
    batch.noise = g.tensor(s);
    if (conditional) {
      t.labels = g.persistent({1, 1, 1, static_cast<int>(image_count)}, DType::kI32, "labels");
      batch.class_labels = g.tensor({1, 1, 1, s.n}, DType::kI32);
    }
    g.add(backend.gather_images({.batch = s, .count = image_count, .flip = options.flip}, t.images,
                                t.labels, g.state(), batch.x0, batch.class_labels));
    g.add(backend.draw_timesteps(s.n, schedule.timesteps(), g.state(), batch.timestep));
    g.add(backend.draw_noise(s, Purpose::kNoise, g.state(), batch.noise));
  }
  add_objective(g, unet, scheduler.prediction_type, schedule, batch);
  add_optimizer(g, options.adam);
  return t;
}

Trainer::Trainer(Backend& backend, const UNetConfig& unet, const SchedulerConfig& scheduler,
                 const TrainerOptions& options, Dataset data) {
  TrainingGraph t = build_training_graph(backend, unet, scheduler, options, data.count);
  if (options.activate_zero_layers) t.graph.params().activate_zero_layers();
  store_ = std::make_unique<ParamStore>(
      backend, t.graph.params(),
      std::vector<Arena>{Arena::kWeights, Arena::kGradients, Arena::kM, Arena::kV, Arena::kEma});
  executor_ = std::make_unique<Executor>(std::move(t.graph), store_->arenas(), options.executor);
  executor_->upload(t.images, data.images.data());
  if (t.labels) executor_->upload(t.labels, data.labels.data());
}

void Trainer::initialize(uint64_t seed) {
  store_->initialize(seed);
  StepState s;
  s.seed = seed;
  set_state(s);
}

}  // namespace ddpm
