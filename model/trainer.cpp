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
  const Parts& parts = options.parts;
  DDPM_CHECK(parts.total > 0 && options.batch_size % parts.total == 0, "a batch of %d in %d parts",
             options.batch_size, parts.total);
  DDPM_CHECK(!parts.split() || options.objective.timesteps == Timesteps::kUniform,
             "timesteps by losses, with a batch in parts");
  DDPM_CHECK(options.label_dropout == 0 || unet.null_class, "label dropout without a null class");
  TrainingGraph t{Graph(backend, Mode::kTraining), {}, {}, {}, {}};
  Graph& g = t.graph;
  const Shape s{options.batch_size / parts.total, unet.sample_height, unet.sample_width,
                unet.in_channels};
  const int count = static_cast<int>(image_count);
  t.images = g.held({count, s.h, s.w, s.c}, DType::kU8, "images");
  if (unet.num_class_embeds) t.labels = g.persistent({1, 1, 1, count}, DType::kI32, "labels");
  t.loss_histogram = g.persistent({kLossBuckets, 1, 1, 2}, DType::kF32, "loss_histogram");
  const Objective objective = add_objective(g, unet, scheduler, options.objective,
                                            TrainingData{{.batch = s,
                                                          .count = image_count,
                                                          .flip = options.flip,
                                                          .step_images = options.batch_size,
                                                          .label_dropout = options.label_dropout,
                                                          .null_label = unet.classes()},
                                                         t.images,
                                                         t.labels});
  {
    const Graph::PhaseScope phase(g, parts.split() ? Phase::kUpdate : Phase::kStep);
    if (parts.split()) add_parts(g, parts, s.n);
    add_optimizer(g, options.adam);
  }
  // Behind the optimizer, so that it is skipped when the update is; of parts, by their losses
  // alone.
  g.add(backend.loss_histogram(s.n, schedule.timesteps(), kLossBuckets, objective.timestep,
                               objective.sample_loss, g.state(), t.loss_histogram));
  t.loss_history = objective.loss_history;
  if (t.loss_history)
    g.add(backend.loss_history(s.n, schedule.timesteps(), objective.timestep, objective.sample_loss,
                               g.state(), t.loss_history));
  return t;
}

Trainer::Trainer(Backend& backend, const UNetConfig& unet, const SchedulerConfig& scheduler,
                 const TrainerOptions& options, Dataset data)
    : parts_(options.parts), part_images_(options.batch_size / options.parts.total) {
  TrainingGraph t = build_training_graph(backend, unet, scheduler, options, data.count);
  if (options.activate_zero_layers) t.graph.params().activate_zero_layers();
  const auto planned_at = [&](int batch) {
    TrainerOptions smaller = options;
    smaller.batch_size = batch * parts_.total;
    return planned_bytes(build_training_graph(backend, unet, scheduler, smaller, data.count).graph);
  };
  const size_t arena = sizeof(float) * static_cast<size_t>(t.graph.params().arena_size());
  require_memory(t.graph, kArenas * arena, part_images_, planned_at, parts_.total);
  store_ = std::make_unique<ParamStore>(
      backend, t.graph.params(),
      std::vector<Arena>{Arena::kWeights, Arena::kGradients, Arena::kM, Arena::kV, Arena::kEma});
  loss_histogram_ = t.loss_histogram;
  loss_history_ = t.loss_history;
  if (loss_history_)
    history_size_ = static_cast<size_t>(scheduler.num_train_timesteps) * kLossHistoryRow;
  executor_ = std::make_unique<Executor>(std::move(t.graph), store_->arenas(), options.executor);
  // As much stays free as the step's own tensors take: previews need less.
  data_on_host_ = executor_->hold(t.images, std::move(data.images), executor_->bytes());
  if (t.labels) executor_->upload(t.labels, data.labels.data());
  keep_plans(backend);
}

std::vector<double> Trainer::take_loss_by_timestep() {
  std::array<std::array<float, 2>, kLossBuckets> sums;
  executor_->download(sums.data(), loss_histogram_);
  const size_t ranks = parts_.ranks == nullptr ? 1 : static_cast<size_t>(parts_.ranks->size());
  std::vector<std::array<std::array<float, 2>, kLossBuckets>> all(ranks);
  if (parts_.ranks != nullptr) {
    all[static_cast<size_t>(parts_.ranks->rank())] = sums;
    parts_.ranks->share(all.data(), sizeof sums);
  } else {
    all[0] = sums;
  }
  std::vector<double> means;
  for (size_t b = 0; b < kLossBuckets; ++b) {
    double sum = 0, count = 0;
    for (const auto& rank : all) {
      sum += double{rank[b][0]};
      count += double{rank[b][1]};
    }
    means.push_back(sum / count);
  }
  sums = {};
  executor_->upload(loss_histogram_, sums.data());
  return means;
}

std::vector<float> Trainer::loss_history() const {
  std::vector<float> history(history_size_);
  if (loss_history_) executor_->download(history.data(), loss_history_);
  return history;
}

void Trainer::set_loss_history(const std::vector<float>& history) {
  if (!loss_history_) return;
  if (!history.empty() && history.size() != history_size_)
    fail(Status::kConfig,
         "the losses that timesteps are drawn by are of %zu timesteps, the model has %zu; start "
         "from "
         "a checkpoint of as many",
         history.size() / kLossHistoryRow, history_size_ / kLossHistoryRow);
  std::vector<float> own = history;
  own.resize(history_size_);
  executor_->upload(loss_history_, own.data());
}

void Trainer::set_state(const StepState& s) {
  StepState own = s;
  own.first_image = static_cast<uint64_t>(parts_.first()) * static_cast<uint64_t>(part_images_);
  executor_->set_state(own);
}

void Trainer::share_parameters() {
  if (parts_.ranks == nullptr) return;
  for (Arena a : {Arena::kWeights, Arena::kM, Arena::kV, Arena::kEma}) {
    std::vector<float> values = store_->read(a);
    parts_.ranks->broadcast(values.data(), values.size() * sizeof(float));
    if (parts_.ranks->rank() != 0) store_->write(a, values);
  }
  weights_changed();
}

void Trainer::require_equal_weights() const {
  if (parts_.ranks == nullptr) return;
  std::vector<uint64_t> hashes(static_cast<size_t>(parts_.ranks->size()));
  hashes[static_cast<size_t>(parts_.ranks->rank())] = store_->hash(Arena::kWeights);
  parts_.ranks->share(hashes.data(), sizeof(uint64_t));
  for (size_t r = 1; r < hashes.size(); ++r)
    if (hashes[r] != hashes[0])
      throw AgreedError(Status::kNonFinite,
                        format("rank %zu's weights are no longer those of rank 0: its machine "
                               "computes wrongly; go on from a checkpoint without it",
                               r));
}

void Trainer::initialize(uint64_t seed) {
  store_->initialize(seed);
  StepState s;
  s.seed = seed;
  set_state(s);
  set_loss_history({});
  weights_changed();
}

}  // namespace ddpm
