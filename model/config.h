// What a model is: diffusers' UNet2DModel and scheduler configurations, as far as they are
// honoured. A missing key means diffusers' default; a key or value that would mean another model
// is an Error(kConfig) that names it.
#pragma once

#include <nlohmann/json_fwd.hpp>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "kernels/error.h"

namespace ddpm {

struct UNetConfig {
  int sample_height = 0, sample_width = 0;
  int in_channels = 3, out_channels = 3;
  int layers_per_block = 2;
  std::vector<int> block_out_channels{224, 448, 672, 896};  // one per level, full resolution first
  std::vector<bool> down_attention{false, true, true, true};  // as block_out_channels
  std::vector<bool> up_attention{true, true, true, false};    // lowest resolution first
  int norm_num_groups = 32;
  double norm_eps = 1e-5;
  std::optional<int> attention_head_dim = 8;  // nullopt: one head as wide as the level
  bool flip_sin_to_cos = true;
  int freq_shift = 0;
  int downsample_padding = 1;  // 1: symmetric; 0: one row and column at the bottom right
  double dropout = 0;
  std::optional<int> num_class_embeds;
  // The last of them stands for no class: the network was trained without labels too, and can be
  // guided. Written as "_null_class", which diffusers passes over.
  bool null_class = false;

  int classes() const { return num_class_embeds.value_or(0) - (null_class ? 1 : 0); }
  int levels() const { return static_cast<int>(block_out_channels.size()); }
  int time_embed_dim() const { return 4 * block_out_channels.front(); }
  bool variance() const { return out_channels != in_channels; }  // then 2 in_channels: mean first
  int heads(int channels) const { return attention_head_dim ? channels / *attention_head_dim : 1; }
  friend bool operator==(const UNetConfig&, const UNetConfig&) = default;
};

// The first four are diffusers' too, the others the authors' code's.
enum class BetaSchedule {
  kLinear,
  kScaledLinear,
  kSquaredcosCapV2,
  kSigmoid,
  kConst,
  kWarmup10,
  kWarmup50,
  kJsd
};
// Previous mean: that of q(x_{t-1} | x_t, x_0), which diffusers has no word for.
enum class PredictionType { kEpsilon, kSample, kVPrediction, kPreviousMean };
// A learned variance is the network's second half of channels v: log sigma^2 = v (the authors'
// code), or as a range (Nichol & Dhariwal 2021, eq. 15, v in [-1, 1]) between the two fixed ones.
enum class VarianceType { kFixedSmall, kFixedLarge, kLearned, kLearnedRange };
constexpr bool is_learned(VarianceType v) { return v >= VarianceType::kLearned; }

struct SchedulerConfig {
  int num_train_timesteps = 1000;
  BetaSchedule beta_schedule = BetaSchedule::kLinear;
  double beta_start = 1e-4, beta_end = 0.02;
  PredictionType prediction_type = PredictionType::kEpsilon;
  VarianceType variance_type = VarianceType::kFixedSmall;
  bool clip_sample = true;
  double clip_sample_range = 1;
  friend bool operator==(const SchedulerConfig&, const SchedulerConfig&) = default;
};

// From diffusers' keys. `file` and `scope`, the dotted path within it, go into messages.
UNetConfig unet_from_json(const nlohmann::json&, const std::string& file,
                          const std::string& scope = "");
SchedulerConfig scheduler_from_json(const nlohmann::json&, const std::string& file,
                                    const std::string& scope = "");
// Error(kConfig) naming both fields unless the network puts out what the scheduler reads.
void require_fitting(const UNetConfig&, const SchedulerConfig&, const std::string& file);
// From the text of unet/config.json and scheduler/scheduler_config.json.
UNetConfig parse_unet_config(std::string_view text, const std::string& file);
SchedulerConfig parse_scheduler_config(std::string_view text, const std::string& file);

// Diffusers' keys in order, as its from_config reads them.
nlohmann::ordered_json to_json(const UNetConfig&);
nlohmann::ordered_json to_json(const SchedulerConfig&);
// The same for a pipeline folder: a schedule that diffusers has no word for goes with its betas as
// trained_betas, by which diffusers then goes.
nlohmann::ordered_json to_diffusers_json(const SchedulerConfig&);

// Diffusers' words.
std::string name_of(BetaSchedule);
std::string name_of(PredictionType);
std::string name_of(VarianceType);

}  // namespace ddpm
