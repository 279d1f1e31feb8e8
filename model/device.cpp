#include "model/device.h"

#include <algorithm>
#include <cstdlib>
#include <nlohmann/json.hpp>

#include "engine/file_io.h"
#include "engine/json.h"
#include "engine/nearest_name.h"

namespace ddpm {
namespace {

Precision parse_precision(const std::string& name) {
  if (name == "auto") return Precision::kAuto;
  if (name == "fp32") return Precision::kFp32;
  if (name == "tf32") return Precision::kTf32;
  if (name == "bf16") return Precision::kBf16;
  fail(Status::kUsage, "--precision %s: allowed are auto, fp32, tf32, bf16", name.c_str());
}

std::string cache_folder() {
  if (const char* cache = std::getenv("XDG_CACHE_HOME"); cache != nullptr && *cache != '\0')
    return std::string(cache) + "/ddpm";
  if (const char* home = std::getenv("HOME"); home != nullptr && *home != '\0')
    return std::string(home) + "/.cache/ddpm";
  return {};
}

// {library: its plans}; empty where there is no file, or one that something else left there.
JsonDocument read_cache(const std::string& path) {
  try {
    JsonLimits limits;
    limits.bytes = size_t{16} << 20;
    if (file_exists(path)) {
      JsonDocument cache = read_json_file(path, Status::kFile, limits);
      if (cache->is_object()) return cache;
    }
  } catch (const Error&) {
    // It is written anew.
  }
  return JsonDocument(new nlohmann::json(nlohmann::json::object()));
}

std::unique_ptr<Backend> make_backend(const DeviceOptions& o, const BackendOptions& options) {
  if (o.device == "cpu" || (o.device == "auto" && cuda_device_count() == 0))
    return make_cpu_backend(options);
  if (o.device == "cuda" || o.device == "auto") return make_cuda_backend(options, 0);
  if (o.device.starts_with("cuda:")) {
    const std::string index = o.device.substr(5);
    if (!index.empty() && index.size() < 4 &&
        std::all_of(index.begin(), index.end(), [](char c) { return c >= '0' && c <= '9'; }))
      return make_cuda_backend(options, std::stoi(index));
  }
  fail(Status::kUsage, "--device %s%s: allowed are auto, cpu, cuda, cuda:I", o.device.c_str(),
       did_you_mean(o.device, {"auto", "cpu", "cuda"}).c_str());
}

}  // namespace

void recall_plans(Backend& backend) {
  const std::string own = backend.plans(), folder = cache_folder();
  if (own.empty() || folder.empty()) return;
  const JsonDocument table = parse_json(own, "plans", Status::kBug);
  const JsonDocument cache = read_cache(folder + "/plans.json");
  const auto kept = cache->find(table->at("library").get_ref<const std::string&>());
  if (kept == cache->end()) return;
  try {
    backend.use_plans(kept->dump());
  } catch (const Error&) {
    // Measured anew, and then written.
  }
}

std::unique_ptr<Backend> open_backend(const DeviceOptions& o) {
  BackendOptions options;
  options.precision = parse_precision(o.precision);
  options.threads = o.threads;
  options.batch_invariant = o.batch_invariant;
  options.allocator = o.allocator;
  options.wgmma = o.wgmma;
  auto backend = make_backend(o, options);
  if (o.wgmma && backend->name() == "cpu")
    fail(Status::kUsage, "wgmma is an instruction of GPUs of compute capability 9.0; leave it out");
  recall_plans(*backend);
  return backend;
}

void keep_plans(const Backend& backend) {
  const std::string own = backend.plans(), folder = cache_folder();
  if (own.empty() || folder.empty()) return;
  const nlohmann::json table = nlohmann::json::parse(own);
  const std::string path = folder + "/plans.json", library = table["library"];
  nlohmann::json cache = *read_cache(path);
  const nlohmann::json before = cache;
  nlohmann::json& kept = cache[library];
  if (kept.is_object() && kept.contains("plans") && kept["plans"].is_object())
    kept["plans"].update(table["plans"]);
  else
    kept = table;
  if (cache == before) return;
  try {
    make_folders(folder);
    write_file(path, to_text(cache));
  } catch (const Error&) {
    // A later start measures again.
  }
}

}  // namespace ddpm
