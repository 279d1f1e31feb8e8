#include "model/generator.h"

#include <algorithm>
#include <utility>

#include "engine/memory.h"
#include "engine/ops.h"
#include "model/device.h"
#include "model/schedule.h"
#include "model/unet.h"

namespace ddpm {

SamplingGraph build_sampling_graph(Backend& backend, const UNetConfig& unet, int timesteps,
                                   int batch_size, int row_count, Pace pace, bool guided) {
  SamplingGraph s{Graph(backend, Mode::kInference), {}, {}, {}, {}, {}, {}};
  Graph& g = s.graph;
  const Shape shape{batch_size, unet.sample_height, unet.sample_width, unet.in_channels};
  const SamplerDesc update{
      .x = shape, .variance = unet.variance(), .guided = guided, .watch = pace == Pace::kTogether};
  DDPM_CHECK(!guided || unet.null_class, "guided without a null class");
  const int images = guided ? 2 * batch_size : batch_size;  // that the network sees
  s.x = g.persistent(shape, DType::kF32, "x");
  s.previous = g.persistent(shape, DType::kF32, "previous");
  s.rows = g.persistent_bytes(sizeof(SamplerRow) * static_cast<size_t>(row_count), "rows");
  s.slots = g.persistent_bytes(sizeof(ChainSlot) * static_cast<size_t>(images), "slots");
  g.add(backend.draw_start(shape, s.slots, g.state(), s.x), Phase::kStart);

  const bool own = pace == Pace::kOwn;
  UNetInputs in;
  if (unet.num_class_embeds || own) {
    in.timestep = g.tensor({1, 1, 1, images}, DType::kI32);
    g.add(backend.sampler_timestep(images, s.rows, s.slots, g.state(), in.timestep));
  }
  if (unet.num_class_embeds)
    in.class_labels = s.class_labels = g.persistent({1, 1, 1, images}, DType::kI32, "class_labels");
  else
    in.known_timesteps = s.timesteps =
        g.persistent({1, 1, 1, own ? timesteps : row_count}, DType::kI32, "timesteps");
  in.sample = ops::cast(g, s.x, backend.compute_type());
  if (guided) in.sample = ops::twice(g, in.sample);
  const Tensor out = build_unet(g, unet, timesteps, in);
  g.add(backend.sampler_update(update, s.rows, s.slots, out, s.x, s.previous, g.state()));
  g.add(backend.advance_state(g.state()));
  return s;
}

Generator::Generator(Backend& backend, const UNetConfig& unet, const SchedulerConfig& scheduler,
                     const SamplerOptions& sampler, int batch_size, const Weights& weights)
    : Generator(backend, unet, scheduler.num_train_timesteps,
                sampler_rows(Schedule(scheduler), scheduler, sampler), batch_size, weights) {}

Generator::Generator(Backend& backend, const UNetConfig& unet, int timesteps,
                     std::vector<SamplerRow> rows, int batch_size, const Weights& weights,
                     std::optional<float> guidance)
    : shape_{batch_size, unet.sample_height, unet.sample_width, unet.in_channels},
      classes_(unet.classes()),
      guidance_(guidance.value_or(1)),
      rows_(std::move(rows)) {
  const auto build = [&](int batch) {
    return build_sampling_graph(backend, unet, timesteps, batch, steps(), Pace::kTogether,
                                guidance.has_value());
  };
  SamplingGraph s = build(batch_size);
  x_ = s.x;
  x0_ = s.previous;
  slots_tensor_ = s.slots;
  class_labels_ = s.class_labels;
  slots_.resize(static_cast<size_t>(shape_.n) * (guidance ? 2 : 1));
  labels_.assign(slots_.size(), classes_);  // the second half has none
  const auto planned_at = [&](int batch) { return planned_bytes(build(batch).graph); };
  const size_t arena = sizeof(float) * static_cast<size_t>(s.graph.params().arena_size());
  require_memory(s.graph, arena, batch_size, planned_at);
  keep_plans(backend);
  const ParamArenas arenas = weights(s.graph.params());
  executor_ = std::make_unique<Executor>(std::move(s.graph), arenas);
  executor_->upload(s.rows, rows_.data());
  if (!s.timesteps) return;
  std::vector<int32_t> of_rows;
  for (const SamplerRow& row : rows_) of_rows.push_back(row.t);
  executor_->upload(s.timesteps, of_rows.data());
}

void Generator::begin(uint64_t seed, uint64_t first, const int32_t* labels, const uint64_t* seeds) {
  executor_->set_state({});
  const auto n = static_cast<size_t>(shape_.n);
  for (size_t i = 0; i < slots_.size(); ++i)
    slots_[i] = {.seed = seeds != nullptr ? seeds[i % n] : seed,
                 .image = seeds != nullptr ? first : first + i % n,
                 .rows = steps(),
                 .guidance = guidance_};
  executor_->upload(slots_tensor_, slots_.data());
  if (!class_labels_) return;
  for (size_t i = 0; i < n; ++i)
    labels_[i] = labels != nullptr ? labels[i] : label_of(slots_[i].image);
  executor_->upload(class_labels_, labels_.data());
}

std::vector<float> Generator::run_chain(int count, const Progress& progress) {
  executor_->steps(steps(), progress);
  return images(count);
}

std::vector<float> Generator::latents(int count) const {
  const StepState state = executor_->state();
  if (state.nonfinite != 0)
    fail(Status::kNonFinite,
         "sampling produced values that are not finite at step %llu of %d: the weights are damaged "
         "or the training diverged",
         static_cast<unsigned long long>(state.bad_step), steps());
  std::vector<float> x = batch_of(x_);
  x.resize(x.size() / static_cast<size_t>(shape_.n) * static_cast<size_t>(count));
  return x;
}

std::vector<float> Generator::images(int count) const {
  std::vector<float> images = latents(count);
  for (float& v : images) v = std::clamp(v, -1.0f, 1.0f);
  return images;
}

std::vector<float> Generator::batch_of(Tensor t) const {
  std::vector<float> values(static_cast<size_t>(shape_.count()));
  executor_->download(values.data(), t);
  return values;
}

std::vector<float> Generator::start_noise(uint64_t seed, uint64_t first) {
  begin(seed, first);
  executor_->run(Phase::kStart);
  return batch_of(x_);
}

Generator::Suspended Generator::suspend() const {
  const auto done = static_cast<size_t>(executor_->state().step);
  const bool reads_previous = done < rows_.size() && rows_[done].x_previous != 0;
  return {static_cast<int>(done), batch_of(x_), reads_previous ? batch_of(x0_) : Suspended().x};
}

void Generator::resume(uint64_t seed, uint64_t first, const int32_t* labels, const Suspended& s) {
  begin(seed, first, labels);
  StepState state = executor_->state();
  state.step = static_cast<uint64_t>(s.done);
  executor_->set_state(state);
  executor_->upload(x_, s.x.data());
  if (!s.previous.empty()) executor_->upload(x0_, s.previous.data());
}

std::vector<float> Generator::sample(uint64_t seed, uint64_t first, int count,
                                     const Progress& progress) {
  begin(seed, first);
  executor_->run(Phase::kStart);
  return run_chain(count, progress);
}

std::vector<float> Generator::sample_from(const std::vector<float>& x_T, uint64_t seed,
                                          uint64_t first, int count, const Progress& progress) {
  begin(seed, first);
  std::vector<float> padded = x_T;  // the slots without an image run along with zeros
  padded.resize(static_cast<size_t>(shape_.count()), 0.0f);
  executor_->upload(x_, padded.data());
  return run_chain(count, progress);
}

}  // namespace ddpm
