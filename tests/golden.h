// Golden values made by PyTorch and diffusers (golden/README.md): weights and inputs by integer
// hash.
#pragma once

#include <cmath>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "engine/json.h"
#include "engine/param_store.h"
#include "engine/safetensors.h"
#include "kernels/shape.h"
#include "model/config.h"
#include "tests/support.h"

namespace ddpm::test {

inline uint32_t fnv1a(const std::string& name) {
  uint32_t h = 0x811C9DC5u;
  for (unsigned char byte : name) h = (h ^ byte) * 0x01000193u;
  return h;
}

// Bits of element i: murmur3's finaliser of fnv1a(name) + i * 0x9E3779B9.
inline uint32_t hash_bits(const std::string& name, uint64_t i) {
  uint32_t z = fnv1a(name) + static_cast<uint32_t>(i) * 0x9E3779B9u;
  z ^= z >> 16;
  z *= 0x85EBCA6Bu;
  z ^= z >> 13;
  z *= 0xC2B2AE35u;
  return z ^ (z >> 16);
}

inline double hash_uniform(const std::string& name, uint64_t i) {
  return hash_bits(name, i) / 4294967296.0 - 0.5;
}

// A weight of a checkpoint, in PyTorch's layout.
inline std::vector<float> hash_weight(const CheckpointTensor& t) {
  double fan_in = 1, scale, offset = 0;
  for (size_t d = 1; d < t.shape.size(); ++d) fan_in *= static_cast<double>(t.shape[d]);
  if (t.key == "class_embedding.weight") {
    scale = 1;
  } else if (t.shape.size() >= 2) {
    scale = 2 * std::sqrt(3 / fan_in);
  } else {
    scale = 0.2;
    offset = t.key.ends_with(".bias") ? 0 : 1;
  }
  std::vector<float> values(static_cast<size_t>(t.count()));
  for (size_t i = 0; i < values.size(); ++i)
    values[i] = static_cast<float>(offset + hash_uniform(t.key, i) * scale);
  return values;
}

inline void set_hash_weights(ParamStore& store, const std::vector<Arena>& arenas) {
  for (const CheckpointTensor& t : checkpoint_tensors(store.params()))
    for (Arena a : arenas) store.write(a, t, hash_weight(t));
}

// An input of unit variance, drawn as (N,C,H,W) and returned as (N,H,W,C).
inline std::vector<float> hash_input(const std::string& name, const Shape& s) {
  std::vector<float> nhwc(static_cast<size_t>(s.count()));
  size_t i = 0;
  for (int n = 0; n < s.n; ++n)
    for (int c = 0; c < s.c; ++c)
      for (int h = 0; h < s.h; ++h)
        for (int w = 0; w < s.w; ++w, ++i)
          nhwc[((static_cast<size_t>(n) * s.h + h) * s.w + w) * s.c + c] =
              static_cast<float>(hash_uniform("input:" + name, i) * std::sqrt(12.0));
  return nhwc;
}

class Golden {
 public:
  explicit Golden(const std::string& name)
      : text_(*read_json_file(path(name + ".json"), Status::kFile)),
        file_(path(name + ".safetensors")),
        unet(unet_from_json(text_.at("unet"), name, "unet")),
        scheduler(scheduler_from_json(text_.at("scheduler"), name, "scheduler")) {}

  const nlohmann::json& train() const { return text_.at("train"); }
  double short_beta_end() const { return text_.at("short_beta_end"); }
  bool has(const std::string& key) const { return file_.find(key) != nullptr; }

  std::vector<float> values(const std::string& key) const {
    const TensorInfo& t = need(key);
    std::vector<float> v(t.elements);
    file_.read_f32(t, v.data());
    return v;
  }
  std::vector<int32_t> indices(const std::string& key) const {
    const TensorInfo& t = need(key);
    std::vector<int64_t> v(t.elements);
    file_.read(t, v.data());
    return {v.begin(), v.end()};
  }
  // An image tensor (N,C,H,W) as (N,H,W,C).
  std::vector<float> images(const std::string& key) const {
    const TensorInfo& t = need(key);
    const std::vector<float> v = values(key);
    const size_t channels = t.shape[1], pixels = t.shape[2] * t.shape[3];
    std::vector<float> nhwc(v.size());
    for (size_t n = 0; n < t.shape[0]; ++n)
      for (size_t c = 0; c < channels; ++c)
        for (size_t p = 0; p < pixels; ++p)
          nhwc[(n * pixels + p) * channels + c] = v[(n * channels + c) * pixels + p];
    return nhwc;
  }
  // The elements of a whole tensor that the file keeps of it.
  std::vector<float> subsample(const std::string& key, const std::vector<float>& whole) const {
    constexpr size_t kWhole = 512;
    if (whole.size() <= kWhole) return whole;
    const size_t stride = text_.at("stride");
    std::vector<float> kept;
    for (size_t i = fnv1a(key) % stride; i < whole.size(); i += stride) kept.push_back(whole[i]);
    return kept;
  }

 private:
  static std::string path(const std::string& file) {
    return std::string(DDPM_SOURCE_DIR) + "/tests/golden/" + file;
  }
  const TensorInfo& need(const std::string& key) const {
    const TensorInfo* t = file_.find(key);
    if (t == nullptr) fail(Status::kBug, "no golden value %s", key.c_str());
    return *t;
  }

  nlohmann::json text_;
  SafetensorsReader file_;

 public:
  const UNetConfig unet;
  const SchedulerConfig scheduler;
};

}  // namespace ddpm::test
