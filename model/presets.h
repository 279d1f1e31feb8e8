// The networks, schedules and training recipes of Ho et al. 2020, and one small enough to try.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "model/config.h"

namespace ddpm {

struct TrainDefaults {
  int batch_size = 128;
  int64_t steps = 800000;
  double learning_rate = 2e-4;
  int64_t warmup_steps = 5000;
  double grad_clip = 1;
  double ema_decay = 0.9999;
  double dropout = 0;  // the same as the network's
  bool flip = true;
  friend bool operator==(const TrainDefaults&, const TrainDefaults&) = default;
};

struct Preset {
  std::string name;
  UNetConfig unet;
  SchedulerConfig scheduler;
  TrainDefaults train;
};

const std::vector<Preset>& presets();

// Throws Error(kUsage) with the nearest name.
const Preset& find_preset(std::string_view name);

}  // namespace ddpm
