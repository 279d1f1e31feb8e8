#include "tools/feature_files.h"

#include <charconv>
#include <cmath>
#include <map>
#include <utility>

#include "engine/file_io.h"
#include "engine/json.h"
#include "engine/safetensors.h"

namespace ddpm::tools {
namespace {

constexpr const char* kStatisticsFormat = "ddpm feature statistics 1";
constexpr const char* kProgressFormat = "ddpm feature progress 1";
constexpr const char* kOf = "of.";  // before the names of an evaluation

using Metadata = std::map<std::string, std::string>;

std::string entry(const Metadata& metadata, const std::string& key) {
  const auto it = metadata.find(key);
  return it == metadata.end() ? "" : it->second;
}

[[noreturn]] void damaged(const std::string& path, const std::string& what) {
  fail(Status::kFile, "%s: %s is not what an evaluation left there; remove the file", path.c_str(),
       in_quotes(what).c_str());
}

TensorSource doubles(std::string name, std::vector<uint64_t> shape, const std::vector<double>& v) {
  return tensor_in_memory(std::move(name), DType::kF64, std::move(shape), v.data());
}

void read_doubles(const SafetensorsReader& file, const std::string& name,
                  const std::vector<uint64_t>& shape, std::vector<double>& to) {
  const TensorInfo* tensor = file.find(name);
  if (tensor == nullptr || tensor->dtype != "F64" || tensor->shape != shape)
    damaged(file.path(), name);
  to.resize(tensor->elements);
  file.read(*tensor, to.data());
  for (const double v : to)
    if (!std::isfinite(v)) damaged(file.path(), name);
}

int64_t read_count(const SafetensorsReader& file, const std::string& key, int64_t least) {
  const std::string text = entry(file.metadata(), key);
  int64_t value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc() || end != text.data() + text.size() || value < least)
    damaged(file.path(), key);
  return value;
}

void add_sums(std::vector<TensorSource>& tensors, Metadata& metadata, const std::string& name,
              const FeatureSums& s) {
  const uint64_t d = s.features();
  metadata[name] = std::to_string(s.count);
  tensors.push_back(doubles(name + ".sum", {d}, s.sum));
  tensors.push_back(doubles(name + ".products", {d, d}, s.products));
}

void read_sums(const SafetensorsReader& file, const std::string& name, FeatureSums& s) {
  const uint64_t d = s.features();
  s.count = read_count(file, name, 0);
  read_doubles(file, name + ".sum", {d}, s.sum);
  read_doubles(file, name + ".products", {d, d}, s.products);
}

}  // namespace

void write_statistics(const std::string& path, const FeatureSource& source,
                      const FeatureStatistics& s) {
  const uint64_t d = s.features();
  OutputFile file(path);
  write_safetensors(file,
                    {doubles("mean", {d}, s.mean), doubles("covariance", {d, d}, s.covariance)},
                    {{"format", kStatisticsFormat},
                     {"data", source.data},
                     {"network", source.network},
                     {"code", source.code},
                     {"count", std::to_string(s.count)}});
  file.commit();
}

StoredStatistics read_statistics(const std::string& path, size_t features) {
  const SafetensorsReader file(path, Status::kConfig);
  const Metadata& m = file.metadata();
  if (entry(m, "format") != kStatisticsFormat)
    fail(Status::kConfig, "%s holds no statistics of features; name another --statistics",
         path.c_str());
  const TensorInfo* mean = file.find("mean");
  if (mean != nullptr && mean->shape != std::vector<uint64_t>{features})
    fail(Status::kConfig, "%s holds %llu features, the network has %zu; name another --statistics",
         path.c_str(), static_cast<unsigned long long>(mean->elements), features);
  StoredStatistics s{{entry(m, "data"), entry(m, "network"), entry(m, "code")}, {}};
  s.statistics.count = read_count(file, "count", 2);
  read_doubles(file, "mean", {features}, s.statistics.mean);
  read_doubles(file, "covariance", {features, features}, s.statistics.covariance);
  return s;
}

void write_feature_progress(const std::string& path, const FeatureProgress& p) {
  constexpr uint64_t kParts = ScoreSums::kParts;
  Metadata metadata{{"format", kProgressFormat},
                    {"numerics", p.numerics},
                    {"score", std::to_string(p.score.count)}};
  for (const auto& [key, value] : p.of) metadata[kOf + key] = value;
  std::vector<TensorSource> tensors;
  add_sums(tensors, metadata, "reference", p.reference);
  add_sums(tensors, metadata, "images", p.images);
  tensors.push_back(doubles("score.p", {kParts, p.score.classes()}, p.score.p));
  tensors.push_back(doubles("score.p_log_p", {kParts}, p.score.p_log_p));
  OutputFile file(path);
  write_safetensors(file, std::move(tensors), metadata);
  file.commit();
}

void read_feature_progress(const std::string& path, FeatureProgress& p) {
  constexpr uint64_t kParts = ScoreSums::kParts;
  const SafetensorsReader file(path);
  if (entry(file.metadata(), "format") != kProgressFormat) damaged(path, "format");
  Evaluation then;
  for (const auto& [key, value] : p.of) then[key] = entry(file.metadata(), kOf + key);
  require_evaluation(path, then, p.of);
  p.numerics = entry(file.metadata(), "numerics");
  read_sums(file, "reference", p.reference);
  read_sums(file, "images", p.images);
  p.score.count = read_count(file, "score", 0);
  read_doubles(file, "score.p", {kParts, p.score.classes()}, p.score.p);
  read_doubles(file, "score.p_log_p", {kParts}, p.score.p_log_p);
  if (p.score.count != p.images.count || p.images.count > p.score.total) damaged(path, "images");
}

}  // namespace ddpm::tools
