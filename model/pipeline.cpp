#include "model/pipeline.h"

#include <dirent.h>

#include <cctype>
#include <nlohmann/json.hpp>
#include <utility>

#include "engine/file_io.h"
#include "engine/json.h"

namespace ddpm {
namespace {

constexpr const char* kWeights = "diffusion_pytorch_model.safetensors";
constexpr const char* kTrainingState = "training_state.safetensors";
constexpr size_t kConfigBytes = size_t{4} << 20;  // trained_betas of 100,000 timesteps

std::string need_weights(const std::string& folder) {
  const std::string path = folder + "/" + kWeights;
  if (file_exists(path)) return path;
  for (const char* pickled : {"diffusion_pytorch_model.bin", "pytorch_model.bin"})
    if (file_exists(folder + "/" + pickled))
      fail(Status::kConfig,
           "%s holds only %s, a pickle, which can run code and is not read; "
           "convert it with diffusers' save_pretrained(..., safe_serialization=True)",
           folder.c_str(), pickled);
  fail(Status::kConfig, "%s has no %s", folder.c_str(), kWeights);
}

SchedulerConfig read_scheduler(const std::string& folder) {
  for (const char* name : {"/scheduler/scheduler_config.json", "/scheduler_config.json"})
    if (file_exists(folder + name))
      return parse_scheduler_config(read_small_file(folder + name, kConfigBytes), folder + name);
  return {};  // a bare network: diffusers' default scheduler
}

Pipeline open_layout(const std::string& folder, const std::string& unet) {
  const std::string config = unet + "/config.json";
  Pipeline p;
  p.folder = folder;
  p.weights = need_weights(unet);
  p.unet = parse_unet_config(read_small_file(config, kConfigBytes), config);
  p.scheduler = read_scheduler(folder);
  require_fitting(p.unet, p.scheduler, folder);
  return p;
}

// The small files whose hashes a manifest holds.
constexpr const char* kTexts[] = {"model_index.json", "unet/config.json",
                                  "scheduler/scheduler_config.json"};
constexpr std::string_view kChecksum = "\"checksum\": \"";  // in a manifest's last line but one
constexpr size_t kDigits = 16;

// Of the manifest's text with nothing where its checksum stands.
std::string checksum_of(std::string text) {
  const size_t at = text.rfind(kChecksum);
  if (at != std::string::npos) text.erase(at + kChecksum.size(), kDigits);
  return hash_of(text);
}

void write_text(OutputFolder& folder, const std::string& name, const std::string& text) {
  OutputFile file = folder.file(name);
  file.write(text);
  file.commit();
}

std::string manifest_text(const Manifest& m) {
  nlohmann::ordered_json json;
  json["format"] = 1;
  json["step"] = m.step;
  json["seed"] = m.seed;
  json["data"] = {{"batch_size", m.batch_size},
                  {"position", m.step * static_cast<uint64_t>(m.batch_size)}};
  json["plan"] = {{"numerics", m.numerics}};
  if (!m.plans.empty()) json["plan"]["table"] = nlohmann::ordered_json::parse(m.plans);
  json["versions"] = {{"ddpm", kVersion}};
  json["hashes"] = m.hashes;
  json["files"] = m.files;
  json["checksum"] = std::string(kDigits, '0');
  std::string text = to_text(json);
  text.replace(text.rfind(kChecksum) + kChecksum.size(), kDigits, checksum_of(text));
  return text;
}

}  // namespace

Pipeline open_pipeline(const std::string& path) {
  if (!folder_exists(path)) fail(Status::kConfig, "model folder %s does not exist", path.c_str());
  if (file_exists(path + "/unet/config.json")) return open_layout(path, path + "/unet");
  if (folder_exists(path + "/checkpoints")) {
    const auto checkpoints = list_checkpoints(path);
    if (checkpoints.empty())
      fail(Status::kConfig, "run folder %s has no checkpoint yet", path.c_str());
    const std::string& last = checkpoints.rbegin()->second;
    return open_layout(last, last + "/unet");
  }
  if (file_exists(path + "/config.json")) return open_layout(path, path);
  fail(Status::kConfig,
       "%s is no model: it has neither unet/config.json, nor config.json and weights, nor "
       "checkpoints/",
       path.c_str());
}

std::string model_hash(const Pipeline& p) {
  const SafetensorsReader weights(p.weights);
  std::map<std::string, std::string> lines;  // in the order of the names, not of the file
  for (const TensorInfo& t : weights.tensors()) lines[t.name] = weights.hash(t);
  std::string text = to_text(to_json(p.unet));
  for (const auto& [name, hash] : lines) text += name + " " + hash + "\n";
  return hash_of(text);
}

std::unique_ptr<ParamStore> load_store(Backend& backend, const SafetensorsReader& weights,
                                       const Params& params) {
  auto store = std::make_unique<ParamStore>(backend, params, std::vector<Arena>{Arena::kWeights});
  load_weights(weights, *store, Arena::kWeights);
  return store;
}

std::unique_ptr<ParamStore> load_store(Backend& backend, const Pipeline& p, const Params& params) {
  return load_store(backend, SafetensorsReader(p.weights), params);
}

void save_checkpoint(const std::string& path, const UNetConfig& unet,
                     const SchedulerConfig& scheduler, const ParamReader& store, Manifest manifest,
                     FileSystem& fs) {
  OutputFolder folder(path, fs);
  const std::string texts[] = {to_text({{"_class_name", "DDPMPipeline"},
                                        {"scheduler", {"diffusers", "DDPMScheduler"}},
                                        {"unet", {"diffusers", "UNet2DModel"}}}),
                               to_text(to_json(unet)), to_text(to_diffusers_json(scheduler))};
  for (size_t i = 0; i < std::size(kTexts); ++i) {
    write_text(folder, kTexts[i], texts[i]);
    manifest.files[kTexts[i]] = hash_of(texts[i]);
  }
  {
    OutputFile file = folder.file(std::string("unet/") + kWeights);
    manifest.hashes[std::string("unet/") + kWeights] = write_weights(file, store, Arena::kEma);
    file.commit();
  }
  {
    OutputFile file = folder.file(kTrainingState);
    manifest.hashes[kTrainingState] = write_training_state(file, store, manifest.loss_history);
    file.commit();
  }
  write_text(folder, "manifest.json", manifest_text(manifest));
  folder.commit();
}

Manifest read_manifest(const std::string& folder) {
  const std::string path = folder + "/manifest.json";
  if (!file_exists(path))
    fail(Status::kConfig, "%s has no manifest.json: it is not a checkpoint to go on from",
         folder.c_str());
  JsonLimits limits;
  limits.bytes = size_t{16} << 20;  // a line per tensor
  const std::string text = read_small_file(path, limits.bytes);
  const JsonDocument all = parse_json(text, path, Status::kFile, limits);
  JsonObject json(path, *all);
  constexpr int64_t kMax = std::numeric_limits<int64_t>::max();
  json.get_int("format", 1, 1);
  Manifest m;
  m.step = static_cast<uint64_t>(json.get_int("step", 0, kMax));
  m.seed = static_cast<uint64_t>(json.get_int("seed", 0, kMax));
  JsonObject data = json.get_object("data");
  m.batch_size = static_cast<int>(data.get_int("batch_size", 1, 1 << 24));
  data.ignore("position");
  data.finish();
  JsonObject plan = json.get_object("plan");
  m.numerics = plan.get_string("numerics");
  if (plan.has("table")) {  // the backend's own
    plan.ignore("table");
    m.plans = all->at("plan").at("table").dump();
  }
  plan.finish();
  json.ignore("versions");
  JsonObject files = json.get_object("hashes");
  for (const std::string& name : {std::string("unet/") + kWeights, std::string(kTrainingState)}) {
    JsonObject hashes = files.get_object(name);
    for (const std::string& key : hashes.keys()) m.hashes[name][key] = hashes.get_string(key);
  }
  files.finish();
  if (json.has("files")) {  // older checkpoints lack it and the checksum
    JsonObject texts = json.get_object("files");
    for (const std::string& key : texts.keys()) m.files[key] = texts.get_string(key);
    texts.finish();
    if (json.get_string("checksum") != checksum_of(text))
      fail(Status::kFile,
           "%s does not have its own checksum: it is damaged; use another checkpoint",
           path.c_str());
  }
  json.finish();
  return m;
}

Manifest load_checkpoint(const std::string& folder, ParamStore& store, NonFiniteValues nonfinite) {
  Manifest m = read_manifest(folder);
  for (const auto& [name, hash] : m.files)
    if (const std::string path = folder + "/" + name;
        hash_of(read_small_file(path, kConfigBytes)) != hash)
      fail(Status::kFile,
           "%s does not have the checksum of its manifest: the file is damaged; use another "
           "checkpoint",
           path.c_str());
  const std::string weights = std::string("unet/") + kWeights;
  const SafetensorsReader ema(folder + "/" + weights), state(folder + "/" + kTrainingState);
  check_hashes(ema, m.hashes[weights]);
  check_hashes(state, m.hashes[kTrainingState]);
  load_weights(ema, store, Arena::kEma, nonfinite);
  m.loss_history = load_training_state(state, store, nonfinite);
  return m;
}

std::string checkpoint_folder(const std::string& run, uint64_t step) {
  return format("%s/checkpoints/step-%08llu", run.c_str(), static_cast<unsigned long long>(step));
}

std::map<uint64_t, std::string> list_checkpoints(const std::string& run) {
  std::map<uint64_t, std::string> found;
  const std::string folder = run + "/checkpoints";
  // Not std::filesystem, whose iterator ends the process where memory runs out.
  const std::unique_ptr<DIR, int (*)(DIR*)> dir(::opendir(folder.c_str()), ::closedir);
  if (!dir) return found;
  while (const dirent* entry = ::readdir(dir.get())) {
    const std::string name = entry->d_name;
    if (!name.starts_with("step-") || name.size() < 13 || name.size() > 24) continue;
    const std::string digits = name.substr(5);
    bool number = true;
    for (char c : digits) number &= std::isdigit(static_cast<unsigned char>(c)) != 0;
    if (number && file_exists(folder + "/" + name + "/manifest.json"))
      found[std::stoull(digits)] = folder + "/" + name;
  }
  return found;
}

}  // namespace ddpm
