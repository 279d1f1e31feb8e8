#include "engine/checkpoint.h"

#include <cmath>
#include <cstring>
#include <memory>
#include <set>
#include <utility>
#include <vector>

namespace ddpm {
namespace {

constexpr std::pair<Arena, const char*> kStateArenas[] = {
    {Arena::kWeights, "weights."}, {Arena::kM, "adam_m."}, {Arena::kV, "adam_v."}};

// Reads the tensor from the store when its first bytes are asked for, and drops it after the last.
TensorSource stored_tensor(const ParamReader& store, Arena arena, const CheckpointTensor& t,
                           const std::string& prefix) {
  auto values = std::make_shared<std::vector<float>>();
  return {prefix + t.key, DType::kF32, t.shape,
          [&store, arena, t, values](uint64_t offset, void* to, size_t bytes) {
            if (offset == 0) store.read(arena, t, *values);
            std::memcpy(to, reinterpret_cast<const char*>(values->data()) + offset, bytes);
            if (offset + bytes == values->size() * sizeof(float)) *values = {};
          }};
}

// The key under which diffusers saved an attention weight before 2023; empty for other keys.
std::string old_key(const std::string& key) {
  static constexpr std::pair<const char*, const char*> kNames[] = {{".to_q.", ".query."},
                                                                   {".to_k.", ".key."},
                                                                   {".to_v.", ".value."},
                                                                   {".to_out.0.", ".proj_attn."}};
  for (const auto& [now, then] : kNames) {
    const size_t at = key.find(now);
    if (at != std::string::npos)
      return key.substr(0, at) + then + key.substr(at + std::strlen(now));
  }
  return {};
}

std::string shape_text(const std::vector<uint64_t>& shape) {
  std::string text = "[";
  for (size_t i = 0; i < shape.size(); ++i) text += (i > 0 ? "," : "") + std::to_string(shape[i]);
  return text + "]";
}

// [out,in] may be stored as the 1x1 convolution [out,in,1,1].
bool same_shape(std::vector<uint64_t> stored, const std::vector<uint64_t>& wanted) {
  if (stored.size() == 4 && wanted.size() == 2 && stored[2] == 1 && stored[3] == 1)
    stored.resize(2);
  return stored == wanted;
}

void load_tensor(const SafetensorsReader& file, const TensorInfo& stored,
                 const CheckpointTensor& wanted, ParamStore& store, Arena arena,
                 NonFiniteValues nonfinite) {
  if (!same_shape(stored.shape, wanted.shape))
    fail(Status::kConfig, "%s: \"%s\" has shape %s where the config asks for %s",
         file.path().c_str(), stored.name.c_str(), shape_text(stored.shape).c_str(),
         shape_text(wanted.shape).c_str());
  std::vector<float> values(static_cast<size_t>(wanted.count()));
  file.read_f32(stored, values.data());
  for (float v : values)
    if (nonfinite == NonFiniteValues::kRefused && !std::isfinite(v))
      fail(Status::kFile,
           "%s: \"%s\" holds values that are not finite; use a checkpoint from before the training "
           "diverged",
           file.path().c_str(), stored.name.c_str());
  store.write(arena, wanted, values);
}

void load_arena(const SafetensorsReader& file, ParamStore& store, Arena arena,
                const std::string& prefix, NonFiniteValues nonfinite, std::set<std::string>& used) {
  for (const CheckpointTensor& t : checkpoint_tensors(store.params())) {
    const TensorInfo* stored = file.find(prefix + t.key);
    if (stored == nullptr && prefix.empty() && !old_key(t.key).empty())
      stored = file.find(old_key(t.key));
    if (stored == nullptr)
      fail(Status::kConfig,
           "%s: tensor \"%s\" is missing: the file is not of the model its config "
           "describes",
           file.path().c_str(), (prefix + t.key).c_str());
    load_tensor(file, *stored, t, store, arena, nonfinite);
    used.insert(stored->name);
  }
}

constexpr const char* kLossHistoryName = "loss_history";

// Losses that are kept are finite, and their number says where the next one goes.
std::vector<float> load_loss_history(const SafetensorsReader& file, std::set<std::string>& used) {
  const TensorInfo* stored = file.find(kLossHistoryName);
  if (stored == nullptr) return {};
  used.insert(stored->name);
  if (stored->shape.size() != 2 || stored->shape[1] != kLossHistoryRow)
    fail(Status::kConfig, "%s: \"%s\" has shape %s where [timesteps,%d] is meant",
         file.path().c_str(), kLossHistoryName, shape_text(stored->shape).c_str(), kLossHistoryRow);
  std::vector<float> history(stored->elements);
  file.read_f32(*stored, history.data());
  for (size_t i = 0; i < history.size(); ++i) {
    const float v = history[i];
    const bool count = i % kLossHistoryRow == kLossHistory;
    const bool good =
        count ? v >= 0 && v < 2 * kLossHistory && v == std::floor(v) : std::isfinite(v);
    if (!good)
      fail(Status::kFile, "%s: \"%s\" holds %g, which is no %s; use another checkpoint",
           file.path().c_str(), kLossHistoryName, double{v}, count ? "number of losses" : "loss");
  }
  return history;
}

void check_all_used(const SafetensorsReader& file, const std::set<std::string>& used) {
  for (const TensorInfo& t : file.tensors())
    if (!used.contains(t.name))
      fail(Status::kConfig,
           "%s: tensor \"%s\" belongs to no part of the model its config "
           "describes",
           file.path().c_str(), t.name.c_str());
}

}  // namespace

std::map<std::string, std::string> write_weights(OutputFile& file, const ParamReader& store,
                                                 Arena arena) {
  std::vector<TensorSource> sources;
  for (const CheckpointTensor& t : checkpoint_tensors(store.params()))
    sources.push_back(stored_tensor(store, arena, t, ""));
  return write_safetensors(file, std::move(sources));
}

std::map<std::string, std::string> write_training_state(OutputFile& file, const ParamReader& store,
                                                        const std::vector<float>& loss_history) {
  std::vector<TensorSource> sources;
  for (const auto& [arena, prefix] : kStateArenas)
    for (const CheckpointTensor& t : checkpoint_tensors(store.params()))
      sources.push_back(stored_tensor(store, arena, t, prefix));
  if (!loss_history.empty())
    sources.push_back(tensor_in_memory(kLossHistoryName, DType::kF32,
                                       {loss_history.size() / kLossHistoryRow, kLossHistoryRow},
                                       loss_history.data()));
  return write_safetensors(file, std::move(sources));
}

void load_weights(const SafetensorsReader& file, ParamStore& store, Arena arena,
                  NonFiniteValues nonfinite) {
  std::set<std::string> used;
  load_arena(file, store, arena, "", nonfinite, used);
  check_all_used(file, used);
}

std::vector<float> load_training_state(const SafetensorsReader& file, ParamStore& store,
                                       NonFiniteValues nonfinite) {
  std::set<std::string> used;
  for (const auto& [arena, prefix] : kStateArenas)
    load_arena(file, store, arena, prefix, nonfinite, used);
  std::vector<float> history = load_loss_history(file, used);
  check_all_used(file, used);
  return history;
}

void check_hashes(const SafetensorsReader& file, const std::map<std::string, std::string>& hashes) {
  for (const TensorInfo& t : file.tensors()) {
    const auto expected = hashes.find(t.name);
    if (expected == hashes.end() || expected->second != file.hash(t))
      fail(Status::kFile,
           "%s: \"%s\" does not have the checksum of its manifest: the file is "
           "damaged; use another checkpoint",
           file.path().c_str(), t.name.c_str());
  }
}

}  // namespace ddpm
