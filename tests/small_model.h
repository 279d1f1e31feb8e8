// A pipeline folder with a small network whose weights come from the integer hash (golden.h).
#pragma once

#include <memory>
#include <string>

#include "model/generator.h"
#include "model/pipeline.h"
#include "model/presets.h"
#include "tests/golden.h"

namespace ddpm::test {

inline UNetConfig small_unet() {
  UNetConfig u = find_preset("tiny").unet;
  u.sample_height = u.sample_width = 8;
  u.block_out_channels = {8, 8, 8};
  u.norm_num_groups = 4;
  return u;
}

// `gain` scales what the network puts out.
inline void set_small_weights(ParamStore& store, float gain) {
  set_hash_weights(store, {Arena::kWeights, Arena::kEma});
  for (const CheckpointTensor& t : checkpoint_tensors(store.params())) {
    if (!t.key.starts_with("conv_out")) continue;
    std::vector<float> values = hash_weight(t);
    for (float& v : values) v *= gain;
    for (Arena a : {Arena::kWeights, Arena::kEma}) store.write(a, t, values);
  }
}

inline void save_small_model(const std::string& folder, const UNetConfig& unet,
                             const SchedulerConfig& scheduler, float gain = 1) {
  const auto backend = make_cpu_backend({.threads = 1});
  const SamplingGraph s = build_sampling_graph(*backend, unet, scheduler.num_train_timesteps, 1, 1);
  ParamStore store(*backend, s.graph.params(),
                   {Arena::kWeights, Arena::kM, Arena::kV, Arena::kEma});
  set_small_weights(store, gain);
  save_checkpoint(folder, unet, scheduler, store, {.step = 1, .numerics = "none", .hashes = {}});
}

}  // namespace ddpm::test
