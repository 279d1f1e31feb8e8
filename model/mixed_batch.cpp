#include "model/mixed_batch.h"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "engine/memory.h"
#include "model/device.h"

namespace ddpm {

// Each slot has a part of the table of rows that the longest chain fits in.
MixedBatch::MixedBatch(Backend& backend, const UNetConfig& unet, const SchedulerConfig& scheduler,
                       int batch_size, const Generator::Weights& weights, bool guided)
    : backend_(backend), timesteps_(scheduler.num_train_timesteps) {
  const auto build = [&](int batch) {
    return build_sampling_graph(backend, unet, timesteps_, batch, batch * timesteps_, Pace::kOwn,
                                guided);
  };
  SamplingGraph s = build(batch_size);
  x_ = s.x;
  rows_ = s.rows;
  slots_tensor_ = s.slots;
  class_labels_ = s.class_labels;
  const auto n = static_cast<size_t>(batch_size);
  slots_.resize(guided ? 2 * n : n);
  labels_.resize(n);
  labels_.resize(slots_.size(), unet.classes());  // the second half has none
  x_T_.resize(n);
  image_.resize(static_cast<size_t>(s.graph.shape(x_).count()) / n);
  const size_t arena = sizeof(float) * static_cast<size_t>(s.graph.params().arena_size());
  require_memory(s.graph, arena, batch_size,
                 [&](int batch) { return planned_bytes(build(batch).graph); });
  keep_plans(backend);
  const ParamArenas arenas = weights(s.graph.params());
  executor_ = std::make_unique<Executor>(std::move(s.graph), arenas);
  if (s.timesteps) {
    std::vector<int32_t> all(static_cast<size_t>(timesteps_));
    std::iota(all.begin(), all.end(), 0);
    executor_->upload(s.timesteps, all.data());
  }
  executor_->setup_for_good();
  floats_ = backend.allocate(image_.size() * sizeof(float));
  bytes_ = backend.allocate(image_.size());
  to_bytes_ = backend.image_to_uint8(static_cast<int64_t>(image_.size()), In{0}, Out{1});
}

void* MixedBatch::address(Tensor t, size_t offset) const {
  return static_cast<char*>(executor_->address(t)) + offset;
}

void MixedBatch::join(int slot, const Chain& chain) {
  const auto i = static_cast<size_t>(slot);
  const std::vector<SamplerRow>& rows = *chain.rows;
  DDPM_CHECK(rows.size() <= static_cast<size_t>(timesteps_), "a chain of %zu rows", rows.size());
  const size_t first_row = i * static_cast<size_t>(timesteps_);
  backend_.upload(address(rows_, first_row * sizeof(SamplerRow)), rows.data(),
                  rows.size() * sizeof(SamplerRow));
  set_slot(slot, {.seed = chain.seed,
                  .image = chain.image,
                  .start = static_cast<int64_t>(step_),
                  .first_row = static_cast<int32_t>(first_row),
                  .rows = static_cast<int32_t>(rows.size()),
                  .guidance = chain.guidance});
  labels_[i] = chain.label;
  x_T_[i] = chain.x_T;
}

void MixedBatch::leave(int slot) { set_slot(slot, {}); }

void MixedBatch::set_slot(int slot, const ChainSlot& to) {
  for (size_t i = static_cast<size_t>(slot); i < slots_.size(); i += x_T_.size()) slots_[i] = to;
  changed_ = true;
}

void MixedBatch::start_chains() {
  executor_->upload(slots_tensor_, slots_.data());
  if (class_labels_) executor_->upload(class_labels_, labels_.data());
  const auto begins = [&](const ChainSlot& s) { return s.row(step_) == s.first_row && s.rows > 0; };
  if (std::none_of(slots_.begin(), slots_.end(), begins)) return;
  executor_->run(Phase::kStart);
  const size_t size = image_.size() * sizeof(float);
  for (size_t i = 0; i < x_T_.size(); ++i)
    if (begins(slots_[i]) && x_T_[i] != nullptr)
      backend_.upload(address(x_, i * size), x_T_[i], size);
}

void MixedBatch::step() {
  try {
    if (changed_) start_chains();
    changed_ = false;
    executor_->step();
    ++step_;
  } catch (...) {
    // How far the backend came is not known.
    std::fill(slots_.begin(), slots_.end(), ChainSlot{});
    changed_ = true;
    executor_->set_state({.step = step_});
    throw;
  }
}

bool MixedBatch::finished(int slot) const {
  const ChainSlot& s = slots_[static_cast<size_t>(slot)];
  return s.rows > 0 && static_cast<int64_t>(step_) - s.start >= s.rows;
}

bool MixedBatch::read(int slot, uint8_t* bytes, float* floats, bool on_device) {
  const size_t size = image_.size() * sizeof(float);
  backend_.transfer(floats_->data(), address(x_, static_cast<size_t>(slot) * size), size);
  if (bytes != nullptr) {
    void* const slots[] = {floats_->data(), bytes_->data()};
    to_bytes_.run({slots, nullptr, backend_.stream()});
  }
  if (on_device && bytes != nullptr) backend_.transfer(bytes, bytes_->data(), image_.size());
  if (on_device && floats != nullptr) backend_.transfer(floats, floats_->data(), size);
  backend_.download(image_.data(), floats_->data(), size);  // waits for all of that
  if (!std::all_of(image_.begin(), image_.end(), [](float v) { return std::isfinite(v); }))
    return false;
  if (on_device) return true;
  if (bytes != nullptr) backend_.download(bytes, bytes_->data(), image_.size());
  if (floats != nullptr)
    for (size_t i = 0; i < image_.size(); ++i) floats[i] = std::clamp(image_[i], -1.0f, 1.0f);
  return true;
}

size_t MixedBatch::bytes() const { return executor_->bytes() + floats_->size() + bytes_->size(); }

}  // namespace ddpm
