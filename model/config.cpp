#include "model/config.h"

#include <algorithm>
#include <cmath>
#include <nlohmann/json.hpp>
#include <utility>

#include "engine/json.h"
#include "model/schedule.h"

namespace ddpm {
namespace {

using nlohmann::json;
using Words = std::vector<std::string>;

// In the order of the enums.
Words beta_schedules() {
  return {"linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid",
          "const",  "warmup10",      "warmup50",          "jsd"};
}
bool known_to_diffusers(BetaSchedule v) { return v < BetaSchedule::kConst; }
Words prediction_types() { return {"epsilon", "sample", "v_prediction", "previous_mean"}; }
Words variance_types() { return {"fixed_small", "fixed_large", "learned", "learned_range"}; }
// Without and with attention.
Words down_blocks() { return {"DownBlock2D", "AttnDownBlock2D"}; }
Words up_blocks() { return {"UpBlock2D", "AttnUpBlock2D"}; }

// One object of diffusers' keys. Each read leaves its value alone where the key is missing.
class Reader {
 public:
  Reader(const json& value, const std::string& file, const std::string& scope)
      : value_(value),
        object_(file, value, scope),
        where_(scope.empty() ? file : file + ": " + scope) {
    // Notes of diffusers: _diffusers_version, _name_or_path.
    for (const auto& [key, unused] : value.items())
      if (key.starts_with('_')) object_.ignore(key);
  }

  const std::string& where() const { return where_; }
  JsonObject& object() { return object_; }
  void finish() const { object_.finish(); }

  void read(const char* key, int& to, int min, int max) {
    to = static_cast<int>(object_.get_int(key, min, max, to));
  }
  void read(const char* key, std::optional<int>& to, int min, int max) {
    if (!object_.has(key)) return;
    if (object_.is_null(key))
      to.reset();
    else
      to = static_cast<int>(object_.get_int(key, min, max));
  }
  void read(const char* key, double& to, double min, double max) {
    to = object_.get_double(key, min, max, to);
  }
  void read(const char* key, bool& to) { to = object_.get_bool(key, to); }
  template <typename Enum>
  void read(const char* key, Enum& to, const Words& words) {
    const size_t now = static_cast<size_t>(to);
    const std::string word = object_.get_string(key, words, words[now]);
    to = static_cast<Enum>(std::find(words.begin(), words.end(), word) - words.begin());
  }
  // Lists of two words, the second being true.
  void read(const char* key, std::vector<bool>& to, const Words& words) {
    if (!object_.has(key)) return;
    to.clear();
    for (const std::string& word : object_.get_string_list(key, words))
      to.push_back(word == words[1]);
  }
  // Keys of which only the default is supported.
  void only(const std::vector<std::pair<const char*, json>>& defaults) {
    for (const auto& [key, supported] : defaults) {
      const auto it = value_.find(key);
      object_.ignore(key);
      if (it != value_.end() && *it != supported) object_.reject(key, supported.dump());
    }
  }

 private:
  const json& value_;
  JsonObject object_;
  std::string where_;
};

void read_sample_size(Reader& reader, UNetConfig& c) {
  constexpr int kLargest = 16384;
  JsonObject& object = reader.object();
  if (!object.is_list("sample_size")) {
    c.sample_height = c.sample_width = static_cast<int>(object.get_int("sample_size", 1, kLargest));
    return;
  }
  const std::vector<int64_t> size = object.get_int_list("sample_size", 1, kLargest);
  if (size.size() != 2) object.reject("sample_size", "an integer or [height, width]");
  c.sample_height = static_cast<int>(size[0]);
  c.sample_width = static_cast<int>(size[1]);
}

void read_channels(Reader& reader, UNetConfig& c) {
  constexpr int kLargest = 16384;
  if (!reader.object().has("block_out_channels")) return;
  c.block_out_channels.clear();
  for (const int64_t k : reader.object().get_int_list("block_out_channels", 2, kLargest))
    c.block_out_channels.push_back(static_cast<int>(k));
}

void check_levels(const UNetConfig& c, const char* where) {
  constexpr size_t kMost = 12;
  const size_t levels = c.block_out_channels.size();
  if (levels < 1 || levels > kMost)
    fail(Status::kConfig, "%s: block_out_channels has %zu entries; allowed: 1 to %zu", where,
         levels, kMost);
  if (c.down_attention.size() != levels || c.up_attention.size() != levels)
    fail(Status::kConfig,
         "%s: block_out_channels, down_block_types and up_block_types have %zu, %zu and %zu "
         "entries; give each one entry per level",
         where, levels, c.down_attention.size(), c.up_attention.size());
  const int factor = 1 << (levels - 1);
  for (const int side : {c.sample_height, c.sample_width})
    if (side % factor != 0)
      fail(Status::kConfig,
           "%s: sample_size %dx%d cannot be halved %zu times for the %zu levels of "
           "block_out_channels; use multiples of %d, such as %d",
           where, c.sample_height, c.sample_width, levels - 1, levels, factor,
           (side / factor + 1) * factor);
}

void check_channels(const UNetConfig& c, const char* where) {
  for (size_t level = 0; level < c.block_out_channels.size(); ++level) {
    const int channels = c.block_out_channels[level];
    if (channels % c.norm_num_groups != 0)
      fail(Status::kConfig,
           "%s: block_out_channels %d is not a multiple of norm_num_groups %d; use other channels "
           "or groups",
           where, channels, c.norm_num_groups);
    const size_t last = c.block_out_channels.size() - 1;  // the middle block attends there
    const bool attention = level == last || c.down_attention[level] || c.up_attention[last - level];
    if (attention && c.attention_head_dim && channels % *c.attention_head_dim != 0)
      fail(Status::kConfig,
           "%s: block_out_channels %d is not a multiple of attention_head_dim %d; use another "
           "width, or null for one head",
           where, channels, *c.attention_head_dim);
  }
  if (c.block_out_channels[0] / 2 <= c.freq_shift)
    fail(Status::kConfig, "%s: freq_shift %d is too large for block_out_channels %d; use 0 or 1",
         where, c.freq_shift, c.block_out_channels[0]);
  if (c.out_channels != c.in_channels && c.out_channels != 2 * c.in_channels)
    fail(Status::kConfig,
         "%s: out_channels %d with in_channels %d; use %d, or %d for a network that also predicts "
         "the variance",
         where, c.out_channels, c.in_channels, c.in_channels, 2 * c.in_channels);
}

// The number of the embedding that stands for no class, which is the last.
void read_null_class(const json& value, JsonObject& object, UNetConfig& c) {
  constexpr const char* kKey = "_null_class";
  if (!value.contains(kKey)) return;
  const int64_t row = object.get_int(kKey, 1, 1 << 24);
  if (!c.num_class_embeds || row != *c.num_class_embeds - 1)
    object.reject(kKey, "num_class_embeds - 1");
  c.null_class = true;
}

// The betas that to_diffusers_json wrote are those of the schedule; nobody else's are taken.
void read_trained_betas(const json& value, JsonObject& object, const SchedulerConfig& c) {
  if (!object.has("trained_betas") || object.is_null("trained_betas")) return;
  if (known_to_diffusers(c.beta_schedule)) object.reject("trained_betas", "null");
  const std::vector<double> betas = Schedule(c).beta;
  const json& list = value.at("trained_betas");
  bool same = list.is_array() && list.size() == betas.size();
  for (size_t t = 0; same && t < betas.size(); ++t)
    same = list[t].is_number() && std::abs(list[t].get<double>() - betas[t]) <= 1e-12;
  if (!same)
    object.reject("trained_betas", format("null, or the betas of beta_schedule \"%s\"",
                                          name_of(c.beta_schedule).c_str()));
}

json or_null(const std::optional<int>& v) { return v ? json(*v) : json(nullptr); }

json words_of(const std::vector<bool>& flags, const Words& words) {
  json list = json::array();
  for (const bool flag : flags) list.push_back(words[flag ? 1 : 0]);
  return list;
}

// Python writes minus infinity as a bare word, which JSON has not; diffusers does so in the
// scheduler files of DPM-Solver. Outside strings it becomes null.
std::string without_infinity(std::string_view text) {
  constexpr std::string_view kWord = "-Infinity";
  std::string result;
  bool in_string = false;
  for (size_t i = 0; i < text.size(); ++i) {
    if (!in_string && text.substr(i, kWord.size()) == kWord) {
      result += "null";
      i += kWord.size() - 1;
      continue;
    }
    if (text[i] == '"') in_string = !in_string;
    if (in_string && text[i] == '\\' && i + 1 < text.size()) result += text[i++];
    result += text[i];
  }
  return result;
}

}  // namespace

UNetConfig unet_from_json(const json& value, const std::string& file, const std::string& scope) {
  UNetConfig c;
  Reader reader(value, file, scope);
  read_sample_size(reader, c);
  reader.read("in_channels", c.in_channels, 1, 1024);
  reader.read("out_channels", c.out_channels, 1, 1024);
  reader.read("layers_per_block", c.layers_per_block, 1, 64);
  read_channels(reader, c);
  reader.read("down_block_types", c.down_attention, down_blocks());
  reader.read("up_block_types", c.up_attention, up_blocks());
  reader.read("norm_num_groups", c.norm_num_groups, 1, 16384);
  reader.read("norm_eps", c.norm_eps, 1e-12, 1);
  reader.read("attention_head_dim", c.attention_head_dim, 1, 16384);
  reader.read("flip_sin_to_cos", c.flip_sin_to_cos);
  reader.read("freq_shift", c.freq_shift, 0, 16384);
  reader.read("downsample_padding", c.downsample_padding, 0, 1);
  reader.read("dropout", c.dropout, 0, 0.999);
  reader.read("num_class_embeds", c.num_class_embeds, 1, 1 << 24);
  read_null_class(value, reader.object(), c);
  reader.only({{"_class_name", "UNet2DModel"},
               {"act_fn", "silu"},
               {"add_attention", true},
               {"attn_norm_num_groups", nullptr},
               {"center_input_sample", false},
               {"class_embed_type", nullptr},
               {"downsample_type", "conv"},
               {"mid_block_scale_factor", 1},
               {"mid_block_type", "UNetMidBlock2D"},
               {"num_train_timesteps", nullptr},
               {"resnet_time_scale_shift", "default"},
               {"time_embedding_dim", nullptr},
               {"time_embedding_type", "positional"},
               {"upsample_type", "conv"}});
  reader.finish();
  check_levels(c, reader.where().c_str());
  check_channels(c, reader.where().c_str());
  return c;
}

SchedulerConfig scheduler_from_json(const json& value, const std::string& file,
                                    const std::string& scope) {
  SchedulerConfig c;
  Reader reader(value, file, scope);
  JsonObject& object = reader.object();
  object.get_string("_class_name",
                    {"DDPMScheduler", "DDIMScheduler", "DPMSolverMultistepScheduler"},
                    "DDPMScheduler");
  reader.read("num_train_timesteps", c.num_train_timesteps, 2, 100000);
  reader.read("beta_schedule", c.beta_schedule, beta_schedules());
  reader.read("beta_start", c.beta_start, 1e-8, 0.9999);
  reader.read("beta_end", c.beta_end, 1e-8, 0.9999);
  reader.read("prediction_type", c.prediction_type, prediction_types());
  // DPM-Solver writes null where no variance is learned.
  if (!object.is_null("variance_type"))
    reader.read("variance_type", c.variance_type, variance_types());
  reader.read("clip_sample", c.clip_sample);
  reader.read("clip_sample_range", c.clip_sample_range, 1e-6, 1e6);
  // Whoever samples chooses the sampler, which spaces its timesteps in its own way.
  object.get_string("timestep_spacing", {"leading", "trailing", "linspace"}, "leading");
  reader.only({{"dynamic_thresholding_ratio", 0.995},
               {"rescale_betas_zero_snr", false},
               {"sample_max_value", 1},
               {"set_alpha_to_one", true},
               {"steps_offset", 0},
               {"thresholding", false}});
  read_trained_betas(value, object, c);
  reader.only({{"algorithm_type", "dpmsolver++"},
               {"euler_at_final", false},
               {"final_sigmas_type", "zero"},
               {"flow_shift", 1},
               {"lambda_min_clipped", nullptr},
               {"lower_order_final", true},
               {"solver_order", 2},
               {"solver_type", "midpoint"},
               {"time_shift_type", "exponential"},
               {"use_beta_sigmas", false},
               {"use_dynamic_shifting", false},
               {"use_exponential_sigmas", false},
               {"use_flow_sigmas", false},
               {"use_karras_sigmas", false},
               {"use_lu_lambdas", false}});
  reader.finish();
  return c;
}

UNetConfig parse_unet_config(std::string_view text, const std::string& file) {
  return unet_from_json(*parse_json(text, file, Status::kConfig), file);
}

SchedulerConfig parse_scheduler_config(std::string_view text, const std::string& file) {
  JsonLimits limits;
  limits.bytes = size_t{4} << 20;  // trained_betas of 100,000 timesteps
  return scheduler_from_json(*parse_json(without_infinity(text), file, Status::kConfig, limits),
                             file);
}

void require_fitting(const UNetConfig& u, const SchedulerConfig& s, const std::string& file) {
  if (u.variance() == is_learned(s.variance_type)) return;
  fail(Status::kConfig,
       "%s: variance_type \"%s\" with out_channels %d and in_channels %d; use out_channels %d, or "
       "%s",
       file.c_str(), name_of(s.variance_type).c_str(), u.out_channels, u.in_channels,
       u.variance() ? u.in_channels : 2 * u.in_channels,
       u.variance() ? "learned or learned_range" : "fixed_small or fixed_large");
}

// Through json, which sorts its keys as diffusers does. attention_head_dim is always written: where
// it is missing, diffusers takes 8.
nlohmann::ordered_json to_json(const UNetConfig& c) {
  const json size = c.sample_height == c.sample_width ? json(c.sample_height)
                                                      : json{c.sample_height, c.sample_width};
  json value{{"_class_name", "UNet2DModel"},
             {"attention_head_dim", or_null(c.attention_head_dim)},
             {"block_out_channels", c.block_out_channels},
             {"down_block_types", words_of(c.down_attention, down_blocks())},
             {"downsample_padding", c.downsample_padding},
             {"dropout", c.dropout},
             {"flip_sin_to_cos", c.flip_sin_to_cos},
             {"freq_shift", c.freq_shift},
             {"in_channels", c.in_channels},
             {"layers_per_block", c.layers_per_block},
             {"norm_eps", c.norm_eps},
             {"norm_num_groups", c.norm_num_groups},
             {"num_class_embeds", or_null(c.num_class_embeds)},
             {"out_channels", c.out_channels},
             {"sample_size", size},
             {"up_block_types", words_of(c.up_attention, up_blocks())}};
  if (c.null_class) value["_null_class"] = *c.num_class_embeds - 1;
  return value;
}

nlohmann::ordered_json to_json(const SchedulerConfig& c) {
  return json{{"_class_name", "DDPMScheduler"},
              {"beta_end", c.beta_end},
              {"beta_schedule", name_of(c.beta_schedule)},
              {"beta_start", c.beta_start},
              {"clip_sample", c.clip_sample},
              {"clip_sample_range", c.clip_sample_range},
              {"num_train_timesteps", c.num_train_timesteps},
              {"prediction_type", name_of(c.prediction_type)},
              {"variance_type", name_of(c.variance_type)}};
}

nlohmann::ordered_json to_diffusers_json(const SchedulerConfig& c) {
  json value = to_json(c);
  if (!known_to_diffusers(c.beta_schedule)) value["trained_betas"] = Schedule(c).beta;
  return value;
}

std::string name_of(BetaSchedule v) { return beta_schedules()[static_cast<size_t>(v)]; }

std::string name_of(PredictionType v) { return prediction_types()[static_cast<size_t>(v)]; }

std::string name_of(VarianceType v) { return variance_types()[static_cast<size_t>(v)]; }

}  // namespace ddpm
