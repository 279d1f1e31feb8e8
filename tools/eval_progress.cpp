#include "tools/eval_progress.h"

#include <cmath>
#include <nlohmann/json.hpp>

#include "engine/file_io.h"
#include "engine/json.h"

namespace ddpm::tools {
namespace {

constexpr int kFormat = 1;
constexpr size_t kMostBytes = size_t{64} << 20;  // 100,000 timesteps
constexpr uint64_t kMostImages = uint64_t{1} << 40;

[[noreturn]] void damaged(const std::string& path, const char* key) {
  fail(Status::kFile, "%s: \"%s\" is not what an evaluation left there; remove the file",
       path.c_str(), key);
}

double number(const std::string& path, const nlohmann::json& json, const char* key) {
  const auto it = json.find(key);
  if (it == json.end() || !it->is_number()) damaged(path, key);
  return it->get<double>();
}

std::vector<double> numbers(const std::string& path, const nlohmann::json& json, const char* key,
                            size_t least, size_t most) {
  const auto it = json.find(key);
  if (it == json.end() || !it->is_array() || it->size() < least || it->size() > most)
    damaged(path, key);
  std::vector<double> values;
  for (const auto& v : *it) {
    if (!v.is_number()) damaged(path, key);
    values.push_back(v.get<double>());
  }
  return values;
}

}  // namespace

void require_evaluation(const std::string& path, const Evaluation& then, const Evaluation& now) {
  for (const auto& [key, value] : now) {
    const auto it = then.find(key);
    const std::string before = it == then.end() ? "" : it->second;
    if (before != value)
      fail(Status::kConfig,
           "%s is of another evaluation: its %s is %s, and %s now; remove it to begin anew, or "
           "choose another --out",
           path.c_str(), key.c_str(), in_quotes(before).c_str(), in_quotes(value).c_str());
  }
}

std::string settings_of(const Evaluation& of, int batch_size) {
  std::string text = "batch " + std::to_string(batch_size);
  for (const auto& [key, value] : of) text += ", " + key + " " + value;
  return text;
}

std::string eval_text(const EvalProgress& p) {
  const BoundSums& s = p.sums;
  nlohmann::ordered_json json;
  json["format"] = kFormat;
  json["of"] = p.of;
  json["numerics"] = p.numerics;
  json["images"] = s.images;
  json["bits"] = s.bits;
  json["squared_bits"] = s.squared_bits;
  json["prior"] = s.prior;
  json["terms"] = s.terms;
  json["mse"] = s.mse;
  json["image_terms"] = s.image_terms;
  json["image_mse"] = s.image_mse;
  return json.dump() + "\n";
}

void write_eval_progress(const std::string& path, const EvalProgress& p) {
  write_file(path, eval_text(p));
}

EvalProgress read_eval_progress(const std::string& path, const Evaluation& of, int timesteps) {
  return parse_eval_progress(read_small_file(path, kMostBytes), path, of, timesteps);
}

EvalProgress parse_eval_progress(const std::string& text, const std::string& path,
                                 const Evaluation& of, int timesteps) {
  JsonLimits limits;
  limits.bytes = kMostBytes;
  const JsonDocument document = parse_json(text, path, Status::kFile, limits);
  const nlohmann::json& json = *document;
  if (!json.is_object() || !json.contains("format") || json["format"] != kFormat ||
      !json.contains("of") || !json["of"].is_object())
    damaged(path, "format");
  EvalProgress p;
  p.of = of;
  Evaluation then;
  for (const auto& [key, value] : json["of"].items())
    if (value.is_string()) then[key] = value;
  require_evaluation(path, then, of);
  if (json.contains("numerics") && json["numerics"].is_string()) p.numerics = json["numerics"];
  const auto all = static_cast<size_t>(timesteps);
  BoundSums& s = p.sums;
  const auto images = json.find("images");
  if (images == json.end() || !images->is_number_unsigned() || *images > kMostImages)
    damaged(path, "images");
  s.images = images->get<int64_t>();
  s.bits = number(path, json, "bits");
  s.squared_bits = number(path, json, "squared_bits");
  s.prior = number(path, json, "prior");
  s.terms = numbers(path, json, "terms", all, all);
  s.mse = numbers(path, json, "mse", all, all);
  s.image_terms = numbers(path, json, "image_terms", 0, all - 1);
  s.image_mse = numbers(path, json, "image_mse", s.image_terms.size(), s.image_terms.size());
  return p;
}

}  // namespace ddpm::tools
