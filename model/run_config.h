// What a training run was told: the resolved config.json of a run folder,
// {"unet": diffusers' keys, "scheduler": diffusers' keys, "train": {...}}.
#pragma once

#include <cstdint>
#include <nlohmann/json_fwd.hpp>
#include <string>

#include "model/config.h"
#include "model/objective.h"
#include "model/presets.h"

namespace ddpm {

struct TrainConfig {
  std::string data;
  int batch_size = 0;
  int64_t steps = 0;
  double learning_rate = 0;
  int64_t warmup_steps = 0;
  int64_t cooldown_steps = 0;  // before `steps`: the rate falls to 0; 0 = none
  double grad_clip = 0;        // 0 = none
  double ema_decay = 0;
  double dropout = 0;
  LossKind loss = LossKind::kSimple;
  Timesteps timesteps = Timesteps::kUniform;
  double label_dropout = 0;  // probability that a label becomes "no class", the last embedding
  bool flip = false;
  uint64_t seed = 0;
  std::string precision = "auto";
  std::string gradient_sums = "fp32";  // over ranks: "fp32" or "bf16"
  int reduction_shards = 0;  // parts whose gradients are summed in a fixed order; 0 = by ranks
  int accumulate = 1;        // parts of a rank, one after the other, where there are no shards
  int64_t save_every = 1000, sample_every = 1000, log_every = 50;
  int64_t keep_every = 0;  // multiples of it are kept for good; 0 = none
  bool stop_on_divergence = false;
  int64_t keep_last = 3;  // checkpoints kept; 0 = all
};

struct RunConfig {
  UNetConfig unet;  // its dropout is train.dropout, and null_class whether there is label_dropout
  SchedulerConfig scheduler;
  TrainConfig train;
};

RunConfig run_config_of(const Preset& preset);
nlohmann::ordered_json to_json(const RunConfig&);
// `file` names it in messages. Error(kConfig) for anything unknown or out of range, and for
// settings that exclude each other, naming both: a learned variance goes with loss kl, as a range
// with hybrid too, which a fixed one does not; the network's channels must fit it.
RunConfig run_config_from_json(const nlohmann::json&, const std::string& file);

// Sets the value at a dotted path, "train.learning_rate=1e-4"; the value is JSON, or else a string.
// Error(kUsage) with the nearest path if there is none such.
void set_path(nlohmann::ordered_json& config, const std::string& assignment);

// Error(kConfig) naming the first field that differs, with both values, unless a run may go on
// with another value of it: steps, accumulate, intervals, keep_last, keep_every,
// stop_on_divergence.
void require_same_run(const RunConfig& now, const RunConfig& then, const std::string& file);

}  // namespace ddpm
