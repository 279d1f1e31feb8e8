#include "model/trainer.h"

#include <array>
#include <utility>
#include <vector>

#include "engine/memory.h"
#include "engine/optimizer.h"
#include "model/device.h"
#include "model/objective.h"

namespace ddpm {

TrainingGraph build_training_graph(Backend& backend, const UNetConfig& unet,
                                   const SchedulerConfig& scheduler, const TrainerOptions& options,
                                   int64_t image_count) {
  const Schedule schedule(scheduler);
  TrainingGraph t{Graph(backend, Mode::kTraining), {}, {}, {}};
  Graph& g = t.graph;
  const Shape s{options.batch_size, unet.sample_height, unet.sample_width, unet.in_channels};
  const int count = static_cast<int>(image_count);
  t.images = g.held({count, s.h, s.w, s.c}, DType::kU8, "images");
  if (unet.num_class_embeds) t.labels = g.persistent({1, 1, 1, count}, DType::kI32, "labels");
  t.loss_histogram = g.persistent({kLossBuckets, 1, 1, 2}, DType::kF32, "loss_histogram");
  const Objective objective = add_objective(
      g, unet, scheduler.prediction_type, schedule,
      TrainingData{{.batch = s, .count = image_count, .flip = options.flip}, t.images, t.labels});
  add_optimizer(g, options.adam);
  // Behind the optimizer, so that it is skipped when the update is.
  g.add(backend.loss_histogram(s.n, schedule.timesteps(), kLossBuckets, objective.timestep,
                               objective.sample_loss, g.state(), t.loss_histogram));
  return t;
}

Trainer::Trainer(Backend& backend, const UNetConfig& unet, const SchedulerConfig& scheduler,
                 const TrainerOptions& options, Dataset data) {
  TrainingGraph t = build_training_graph(backend, unet, scheduler, options, data.count);
  if (options.activate_zero_layers) t.graph.params().activate_zero_layers();
  const auto planned_at = [&](int batch) {
    TrainerOptions smaller = options;
    smaller.batch_size = batch;
    return planned_bytes(build_training_graph(backend, unet, scheduler, smaller, data.count).graph);
  };
  const size_t arena = sizeof(float) * static_cast<size_t>(t.graph.params().arena_size());
  require_memory(t.graph, kArenas * arena, options.batch_size, planned_at);
  store_ = std::make_unique<ParamStore>(
      backend, t.graph.params(),
      std::vector<Arena>{Arena::kWeights, Arena::kGradients, Arena::kM, Arena::kV, Arena::kEma});
  loss_histogram_ = t.loss_histogram;
  executor_ = std::make_unique<Executor>(std::move(t.graph), store_->arenas(), options.executor);
  // As much stays free as the step's own tensors take: previews need less.
  data_on_host_ = executor_->hold(t.images, std::move(data.images), executor_->bytes());
  if (t.labels) executor_->upload(t.labels, data.labels.data());
  keep_plans(backend);
}

std::vector<double> Trainer::take_loss_by_timestep() {
  std::array<std::array<float, 2>, kLossBuckets> sums;
  executor_->download(sums.data(), loss_histogram_);
  std::vector<double> means;
  for (const auto& [sum, count] : sums) means.push_back(double{sum} / double{count});
  sums = {};
  executor_->upload(loss_histogram_, sums.data());
  return means;
}

void Trainer::initialize(uint64_t seed) {
  store_->initialize(seed);
  StepState s;
  s.seed = seed;
  set_state(s);
  weights_changed();
}

}  // namespace ddpm
