#include "model/run_config.h"

#include <nlohmann/json.hpp>
#include <set>
#include <vector>

#include "engine/json.h"
#include "engine/nearest_name.h"

namespace ddpm {
namespace {

constexpr int64_t kMaxSteps = int64_t{1}
                              << 32;  // the step is a 32-bit word of every random address

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
          {"flip", t.flip},
          {"seed", t.seed},
          {"precision", t.precision},
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
  t.flip = json.get_bool("flip");
  t.seed = static_cast<uint64_t>(json.get_int("seed", 0, std::numeric_limits<int64_t>::max()));
  t.precision = json.get_string("precision", {"auto", "fp32", "tf32", "bf16"});
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
  json["unet"].erase("dropout");  // stands in "train"
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
