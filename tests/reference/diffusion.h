// Batches, noising, sampler rows and 8-bit images in double, one element at a time.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "kernels/desc.h"
#include "kernels/philox.h"
#include "kernels/step_state.h"

namespace ddpm::ref {

struct Batch {
  std::vector<double> x0;      // (N,H,W,C)
  std::vector<int32_t> index;  // (N), which image stands in which slot
};

inline Batch gather_images(const GatherDesc& d, const std::vector<uint8_t>& images,
                           const StepState& s) {
  Batch batch;
  const int h = d.batch.h, w = d.batch.w, c = d.batch.c;
  for (int n = 0; n < d.batch.n; ++n) {
    const auto sample = s.first_image + static_cast<uint64_t>(n);
    const int step_images = d.step_images == 0 ? d.batch.n : d.step_images;
    const auto position = s.step * static_cast<uint64_t>(step_images) + sample;
    const auto count = static_cast<uint64_t>(d.count);
    const auto epoch = static_cast<uint32_t>(position / count);
    const auto index = static_cast<int32_t>(permute(position % count, count, s.seed, epoch));
    RandomStream stream{.seed = s.seed, .purpose = Purpose::kFlip};
    stream.sample = sample;
    stream.step = static_cast<uint32_t>(s.step);
    const bool flip = d.flip && stream.block(0)[0] % 2 == 1;
    for (int i = 0; i < h; ++i)
      for (int j = 0; j < w; ++j)
        for (int k = 0; k < c; ++k) {
          const int from = flip ? w - 1 - j : j;
          const size_t at = static_cast<size_t>(((int64_t{index} * h + i) * w + from) * c + k);
          batch.x0.push_back(images[at] / 127.5 - 1);
        }
    batch.index.push_back(index);
  }
  return batch;
}

// table: (timesteps, 2), the factors of x0 and of the noise.
inline std::vector<double> q_sample(const std::vector<float>& table, const std::vector<double>& x0,
                                    const std::vector<int32_t>& t,
                                    const std::vector<double>& noise) {
  std::vector<double> x_t(x0.size());
  const size_t size = x0.size() / t.size();
  for (size_t i = 0; i < x0.size(); ++i) {
    const auto step = static_cast<size_t>(t[i / size]);
    x_t[i] = double{table[2 * step]} * x0[i] + double{table[2 * step + 1]} * noise[i];
  }
  return x_t;
}

// The halves of an output of 2 c channels (N,H,W,2c).
struct Halves {
  std::vector<double> mean, variance;
};
inline Halves split_output(const std::vector<double>& out, int c) {
  Halves halves;
  for (size_t i = 0; i < out.size(); ++i)
    (i / static_cast<size_t>(c) % 2 == 0 ? halves.mean : halves.variance).push_back(out[i]);
  return halves;
}

// x becomes x', previous becomes x0.
inline void sampler_row(const SamplerRow& r, const std::vector<double>& out,
                        const std::vector<double>& z, std::vector<double>& x,
                        std::vector<double>& previous) {
  for (size_t i = 0; i < x.size(); ++i) {
    const double raw = r.x0_x * x[i] + r.x0_out * out[i];
    const double x0 = std::clamp(raw, -double{r.clip}, double{r.clip});
    double sum = r.x_x * x[i] + r.x_x0 * x0 + r.x_out * out[i];
    if (r.x_previous != 0) sum += r.x_previous * previous[i];
    if (r.x_z != 0) sum += r.x_z * z[i];
    x[i] = sum;
    previous[i] = x0;
  }
}

// Before the floor: the exact place between two values.
inline double to_uint8(double x) { return std::clamp((x + 1) * 127.5, 0.0, 255.0) + 0.5; }

}  // namespace ddpm::ref
