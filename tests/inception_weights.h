// An Inception-v3 at 1/16 of its width and the images of golden/make_inception.py, from the integer
// hash (golden.h), and what PyTorch makes of them.
#pragma once

#include <cmath>
#include <functional>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "engine/file_io.h"
#include "engine/json.h"
#include "engine/safetensors.h"
#include "tests/golden.h"

namespace ddpm::test {

inline std::string inception_golden(const char* ending) {
  return std::string(DDPM_SOURCE_DIR) + "/tests/golden/inception" + ending;
}

inline std::vector<float> golden_inception_values(const std::string& key) {
  const SafetensorsReader file(inception_golden(".safetensors"));
  const TensorInfo* tensor = file.find(key);
  if (tensor == nullptr) fail(Status::kBug, "no golden value %s", key.c_str());
  std::vector<float> v(tensor->elements);
  file.read_f32(*tensor, v.data());
  return v;
}

struct HashTensor {
  std::string name;
  std::vector<uint64_t> shape;
  std::vector<float> values;
};

inline HashTensor hash_tensor(const std::string& name, const std::vector<uint64_t>& shape,
                              double scale, double offset = 0) {
  HashTensor t{name, shape, {}};
  uint64_t count = 1;
  for (const uint64_t d : shape) count *= d;
  for (uint64_t i = 0; i < count; ++i)
    t.values.push_back(static_cast<float>(offset + hash_uniform(name, i) * scale));
  return t;
}

// All tensors as tools/convert_inception.py writes them.
inline std::vector<HashTensor> inception_tensors() {
  const nlohmann::json json = *read_json_file(inception_golden(".json"), Status::kFile);
  std::vector<HashTensor> all;
  for (const auto& [name, dims] : json.at("layers").items()) {
    const std::vector<uint64_t> shape = dims;
    const auto fan_in = static_cast<double>(shape[1] * shape[2] * shape[3]);
    all.push_back(hash_tensor(name + ".conv.weight", shape, 2 * std::sqrt(6 / fan_in)));
    all.push_back(hash_tensor(name + ".bn.weight", {shape[0]}, 0.2, 1));
    all.push_back(hash_tensor(name + ".bn.bias", {shape[0]}, 0.2));
    all.push_back(hash_tensor(name + ".bn.running_mean", {shape[0]}, 0.2));
    all.push_back(hash_tensor(name + ".bn.running_var", {shape[0]}, 0.4, 1));
  }
  all.push_back(hash_tensor("fc.weight", {json.at("classes"), 128}, 64));
  all.push_back(hash_tensor("fc.bias", {json.at("classes")}, 10));  // which nothing reads
  return all;
}

inline void write_tensors(const std::string& path, const std::vector<HashTensor>& tensors) {
  std::vector<TensorSource> sources;
  for (const HashTensor& t : tensors)
    sources.push_back(tensor_in_memory(t.name, DType::kF32, t.shape, t.values.data()));
  OutputFile file(path);
  write_safetensors(file, std::move(sources));
  file.commit();
}

// Images (count,32,32,3): noise around a colour of each image's own.
inline std::vector<uint8_t> inception_images(const std::string& set, int count) {
  const std::string name = "input:inception." + set;
  std::vector<uint8_t> images;
  for (uint64_t i = 0; i < static_cast<uint64_t>(count) * 32 * 32 * 3; ++i) {
    const double noise = hash_uniform(name, i) + 0.5;
    const double colour = hash_uniform(name + ".colour", i / 3072 * 3 + i % 3) + 0.5;
    images.push_back(static_cast<uint8_t>(std::floor(256 * (0.5 * noise + 0.5 * colour))));
  }
  return images;
}

// A packed data set of them.
inline void write_inception_images(const std::string& path, const std::string& set, int count) {
  const std::vector<uint8_t> images = inception_images(set, count);
  OutputFile file(path);
  write_safetensors(
      file, {tensor_in_memory("images", DType::kU8, {static_cast<uint64_t>(count), 32, 32, 3},
                              images.data())});
  file.commit();
}

}  // namespace ddpm::test
