#include "model/run_config.h"

#include <algorithm>
#include <nlohmann/json.hpp>
#include <set>
#include <vector>

#include "engine/json.h"
#include "engine/nearest_name.h"

namespace ddpm {
namespace {

constexpr int64_t kMaxSteps = int64_t{1}
                              << 32;  // the step is a 32-bit word of every random address

// In the order of the enums.
std::vector<std::string> loss_names() { return {"simple", "kl", "hybrid"}; }
std::vector<std::string> timesteps_names() { return {"uniform", "loss_second_moment"}; }

template <typename Enum>
Enum read_word(JsonObject& json, const char* key, const std::vector<std::string>& words) {
  const std::string word = json.get_string(key, words, words[0]);  // older runs lack it
  return static_cast<Enum>(std::find(words.begin(), words.end(), word) - words.begin());
}

nlohmann::ordered_json train_to_json(const TrainConfig& t) {
  return {{"data", t.data},
          {"batch_size", t.batch_size},
          {"steps", t.steps},
          {"learning_rate", t.learning_rate},
          {"warmup_steps", t.warmup_steps},
          {"cooldown_steps", t.cooldown_steps},
          {"grad_clip", t.grad_clip},
          {"ema_decay", t.ema_decay},
          {"dropout", t.dropout},
          {"loss", loss_names()[static_cast<size_t>(t.loss)]},
          {"timesteps", timesteps_names()[static_cast<size_t>(t.timesteps)]},
          {"label_dropout", t.label_dropout},
          {"flip", t.flip},
          {"seed", t.seed},
          {"precision", t.precision},
          {"gradient_sums", t.gradient_sums},
          {"reduction_shards", t.reduction_shards},
          {"accumulate", t.accumulate},
          {"save_every", t.save_every},
          {"sample_every", t.sample_every},
          {"log_every", t.log_every},
          {"keep_last", t.keep_last},
          {"keep_every", t.keep_every},
          {"stop_on_divergence", t.stop_on_divergence}};
}

TrainConfig train_from_json(JsonObject json) {
  TrainConfig t;
  t.data = json.get_string("data");
  t.batch_size = static_cast<int>(json.get_int("batch_size", 1, 1 << 20));
  t.steps = json.get_int("steps", 0, kMaxSteps);
  t.learning_rate = json.get_double("learning_rate", 0, 10);
  t.warmup_steps = json.get_int("warmup_steps", 0, kMaxSteps);
  t.cooldown_steps = json.get_int("cooldown_steps", 0, kMaxSteps, 0);  // older runs lack it
  t.grad_clip = json.get_double("grad_clip", 0, 1e9);
  t.ema_decay = json.get_double("ema_decay", 0, 1);
  t.dropout = json.get_double("dropout", 0, 0.99);
  t.loss = read_word<LossKind>(json, "loss", loss_names());
  t.timesteps = read_word<Timesteps>(json, "timesteps", timesteps_names());
  t.label_dropout = json.get_double("label_dropout", 0, 0.99, 0);  // older runs lack it
  t.flip = json.get_bool("flip");
  t.seed = static_cast<uint64_t>(json.get_int("seed", 0, std::numeric_limits<int64_t>::max()));
  t.precision = json.get_string("precision", {"auto", "fp32", "tf32", "bf16"});
  t.gradient_sums = json.get_string("gradient_sums", {"fp32", "bf16"}, "fp32");
  t.reduction_shards = static_cast<int>(json.get_int("reduction_shards", 0, 1 << 20, 0));
  t.accumulate = static_cast<int>(json.get_int("accumulate", 1, 1 << 20, 1));  // nor these two
  t.save_every = json.get_int("save_every", 0, kMaxSteps);
  t.sample_every = json.get_int("sample_every", 0, kMaxSteps);
  t.log_every = json.get_int("log_every", 1, kMaxSteps);
  t.keep_last = json.get_int("keep_last", 0, kMaxSteps);
  t.keep_every = json.get_int("keep_every", 0, kMaxSteps, 0);  // older runs lack these two
  t.stop_on_divergence = json.get_bool("stop_on_divergence", false);
  json.finish();
  return t;
}

// Settings that exclude each other.
void check_objective(const RunConfig& c, const std::string& file) {
  const auto refuse = [&](const std::string& a, const std::string& b, const char* remedy) {
    fail(Status::kConfig, "%s: %s does not go with %s; %s", file.c_str(), a.c_str(), b.c_str(),
         remedy);
  };
  const std::string loss =
      format("train.loss \"%s\"", loss_names()[static_cast<size_t>(c.train.loss)].c_str());
  const std::string variance =
      format("scheduler.variance_type \"%s\"", name_of(c.scheduler.variance_type).c_str());
  const bool learned = is_learned(c.scheduler.variance_type);
  if (c.train.loss == LossKind::kSimple && learned)
    refuse(loss, variance, "the variance would not be trained: use train.loss kl or hybrid");
  if (c.train.loss == LossKind::kHybrid && c.scheduler.variance_type != VarianceType::kLearnedRange)
    refuse(loss, variance,
           learned
               ? "use train.loss kl, or variance_type learned_range"
               : "it trains a learned_range; with a fixed variance use train.loss simple or kl");
  if (c.train.loss != LossKind::kSimple &&
      c.scheduler.prediction_type == PredictionType::kEpsilon &&
      c.scheduler.beta_schedule == BetaSchedule::kJsd)
    refuse(loss, "scheduler.beta_schedule \"jsd\" and scheduler.prediction_type \"epsilon\"",
           "the bound of a noise prediction is infinite in pure noise: use another of them");
  if (c.train.timesteps == Timesteps::kLossSecondMoment &&
      (c.train.reduction_shards > 1 || c.train.accumulate > 1))
    refuse(
        "train.timesteps \"loss_second_moment\"",
        c.train.reduction_shards > 1 ? "train.reduction_shards" : "train.accumulate",
        "the losses of a step are kept as one batch: leave it out, or use train.timesteps uniform");
}

// "/train/steps" as users write it.
std::string dotted(std::string pointer) {
  pointer.erase(0, 1);
  for (char& c : pointer)
    if (c == '/') c = '.';
  return pointer;
}

}  // namespace

RunConfig run_config_of(const Preset& p) {
  RunConfig c{p.unet, p.scheduler, {}};
  c.train.batch_size = p.train.batch_size;
  c.train.steps = p.train.steps;
  c.train.learning_rate = p.train.learning_rate;
  c.train.warmup_steps = p.train.warmup_steps;
  c.train.grad_clip = p.train.grad_clip;
  c.train.ema_decay = p.train.ema_decay;
  c.train.dropout = c.unet.dropout = p.train.dropout;
  c.train.flip = p.train.flip;
  return c;
}

nlohmann::ordered_json to_json(const RunConfig& c) {
  nlohmann::ordered_json json;
  json["unet"] = to_json(c.unet);
  for (const char* key : {"dropout", "_null_class"}) json["unet"].erase(key);  // stand in "train"
  json["scheduler"] = to_json(c.scheduler);
  json["train"] = train_to_json(c.train);
  return json;
}

RunConfig run_config_from_json(const nlohmann::json& value, const std::string& file) {
  JsonObject json(file, value);
  RunConfig c;
  c.train = train_from_json(json.get_object("train"));
  json.ignore("unet");
  json.ignore("scheduler");
  json.finish();
  for (const char* part : {"unet", "scheduler"})
    if (!value.contains(part)) fail(Status::kConfig, "%s: \"%s\" is missing", file.c_str(), part);
  c.unet = unet_from_json(value.at("unet"), file, "unet");
  c.scheduler = scheduler_from_json(value.at("scheduler"), file, "scheduler");
  c.unet.dropout = c.train.dropout;
  c.unet.null_class = c.train.label_dropout > 0;
  if (c.unet.null_class && c.unet.classes() < 1)
    fail(Status::kConfig,
         "%s: train.label_dropout %g with unet.num_class_embeds %s; use num_class_embeds = classes "
         "+ "
         "1: the last stands for no class",
         file.c_str(), c.train.label_dropout,
         c.unet.num_class_embeds ? std::to_string(*c.unet.num_class_embeds).c_str() : "null");
  require_fitting(c.unet, c.scheduler, file);
  check_objective(c, file);
  return c;
}

void set_path(nlohmann::ordered_json& config, const std::string& assignment) {
  const size_t equals = assignment.find('=');
  if (equals == std::string::npos || equals == 0)
    fail(Status::kUsage, "--set %s: write path=value, e.g. train.learning_rate=1e-4",
         in_quotes(assignment).c_str());
  const std::string path = assignment.substr(0, equals), text = assignment.substr(equals + 1);
  std::vector<std::string> known;
  nlohmann::ordered_json* target = nullptr;
  for (auto& [part, fields] : config.items())
    for (auto& [key, value] : fields.items()) {
      known.push_back(part + "." + key);
      if (known.back() == path) target = &value;
    }
  if (target == nullptr)
    fail(Status::kUsage, "--set %s: there is no such setting%s", in_quotes(path).c_str(),
         did_you_mean(path, known).c_str());
  const auto value = nlohmann::ordered_json::parse(text, nullptr, /*allow_exceptions=*/false);
  *target = value.is_discarded() ? nlohmann::ordered_json(text) : value;
}

void require_same_run(const RunConfig& now, const RunConfig& then, const std::string& file) {
  static const std::set<std::string> free{
      "train.steps",     "train.accumulate", "train.save_every", "train.sample_every",
      "train.log_every", "train.keep_last",  "train.keep_every", "train.stop_on_divergence"};
  const nlohmann::json a = to_json(now), b = to_json(then);
  const nlohmann::json flat_a = a.flatten(), flat_b = b.flatten();
  std::set<std::string> keys;
  for (const auto* flat : {&flat_a, &flat_b})
    for (const auto& [key, value] : flat->items()) keys.insert(key);
  for (const std::string& key : keys) {
    const auto in_a = flat_a.find(key), in_b = flat_b.find(key);
    const bool same = in_a != flat_a.end() && in_b != flat_b.end() && *in_a == *in_b;
    if (same || free.contains(dotted(key))) continue;
    fail(Status::kConfig,
         "%s: \"%s\" is %s in the run to go on with and %s now; use the same value, another --out, "
         "or --resume never",
         file.c_str(), dotted(key).c_str(), in_b == flat_b.end() ? "absent" : in_b->dump().c_str(),
         in_a == flat_a.end() ? "absent" : in_a->dump().c_str());
  }
}

}  // namespace ddpm
