// What `ddpm sample` is asked for and how far it is: a file that it is suspended to and goes on
// from. A safetensors file: `x` F32 [B,C,H,W], the batch in progress, and `previous` of that shape
// where its next row reads it; `images`, those that are done, and `starts`, where chains that are
// to begin do so, of images [.,C,H,W]; `labels` I64 [num] of a model with classes; `rows` F32
// [R,8] and `row_timesteps` I64 [R], the sampler. The rest is metadata, with a checksum.
#pragma once

#include <algorithm>
#include <string>
#include <vector>

#include "kernels/desc.h"
#include "model/pipeline.h"

namespace ddpm::tools {

struct Sampling {
  uint64_t seed = 0, first = 0;  // of the first image
  int64_t num = 0;
  int batch_size = 0;
  bool latents = false;   // x is what is wanted as it is, not images
  std::string sampler{};  // in words
  std::vector<SamplerRow> rows{};
  std::vector<int32_t> labels{};  // (num) of a model with classes
  float guidance = 1;             // not 1 only where the model has a null_class
  std::string model{};            // model_hash()
  std::string numerics{};         // Backend::numerics(), for the bits

  int64_t images_done = 0;
  int steps_done = 0;         // of the batch in progress
  std::vector<float> images;  // (images_done,H,W,C)
  // x of the images behind that: of the batch in progress where steps_done > 0, and where chains
  // do not start from noise those of the others.
  std::vector<float> x, previous, starts;

  int64_t batch() const { return std::min<int64_t>(batch_size, num - images_done); }
};

// `image` is the shape of one image (1,H,W,C).
void write_sampling(const std::string& path, const Sampling&, const Shape& image);
// Error(kConfig) where it is no such file or another model's, Error(kFile) where it is damaged.
Sampling read_sampling(const std::string& path, const Pipeline&);

}  // namespace ddpm::tools
