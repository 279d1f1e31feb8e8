// The end of a gradient by a group norm's output: back through dropout and SiLU while the sums are
// still in shared memory, and the two sums that the norm's own backward pass starts from. Saves
// that pass its first half, which reads x and the gradient once more.
#pragma once

#include "kernels/cuda/conv_tile.h"

namespace ddpm::cuda {

template <typename T>
struct NormGradient {
  ConvInput<T> in;  // what the forward pass read and made of it; no x: there is no norm
  Global<const float> mean_rstd = nullptr;  // (N, groups, 2)
  int groups = 1, group_channels = 1;
  Global<float> sums = nullptr;  // (N, tiles of 64 pixels, 2, C)
};

// Channels c.. of a stored pixel; N > 1 only where in.aligned holds.
template <int N, typename T>
__device__ __forceinline__ void load_stored(const ConvInput<T>& in, int64_t pixel, int c,
                                            float (&v)[N]) {
  if (c < in.c1)
    load_floats<T>(in.x + (pixel * in.c1 + c), v);
  else
    load_floats<T>(in.x2 + (pixel * in.c2 + (c - in.c1)), v);
}

// N channels of a pixel of image n: `sums` is the gradient by the norm's output; leaves dz, as it
// was written.
template <typename T, int N>
__device__ __forceinline__ void finish_gradient(const NormGradient<T>& norm, const Global<T>& dz,
                                                const Smem<float>& sums, int n, int64_t pixel,
                                                int c) {
  const ConvInput<T>& in = norm.in;
  const int channels = in.channels();
  float v[N], z[N];
  load_floats<float>(sums, v);
  if (in.threshold > 0) {
    const int64_t element = (pixel - int64_t{n} * in.pixels) * channels + c;
    const Philox4 words = draw(in, n, element);
#pragma unroll
    for (int i = 0; i < N; ++i)
      v[i] = N == 1 ? drop(in, word_of(words, static_cast<int>(element % 8)),
                           static_cast<int>(element % 2), v[i])
                    : drop(in, words[static_cast<size_t>(i / 2)], i % 2, v[i]);
  }
  load_stored(in, pixel, c, z);
  const auto scale_shift = in.scale_shift + (int64_t{n} * channels + c) * 2;
#pragma unroll
  for (int i = 0; i < N; ++i) {
    z[i] = z[i] * scale_shift[2 * i] + scale_shift[2 * i + 1];
    const float gate = fast_sigmoid(z[i]);
    if (in.silu) v[i] *= gate * (1.0f + z[i] * (1.0f - gate));
  }
  store_floats<T>(dz + (pixel * channels + c), v);
  if constexpr (sizeof(T) == 2) {
#pragma unroll
    for (int i = 0; i < N; ++i) v[i] = to_float(to_bf16(v[i]));
  }
  store_floats<float>(sums, v);
}

// The sums of each channel over each run of the tile, from what finish_gradient left. x is read
// again, from the caches.
template <typename T, int Columns, typename Team>
__device__ __forceinline__ void write_norm_sums(const NormGradient<T>& norm, const ConvTiles& t,
                                                const Tile& tile, int k0, const Smem<float>& sums,
                                                const Team& team) {
  const int channels = norm.in.channels();
  const TileRuns runs(t, tile);
  for (int i = team.thread(); i < runs.count * Columns; i += Team::kThreads) {
    const int run = i / Columns, column = i % Columns, c = k0 + column;
    if (c >= channels) continue;
    const int n = runs.image(tile, run), rows = runs.rows_of(tile, run);
    const auto at = sums + (int64_t{run} * runs.rows * sums_pitch(Columns) + column);
    const int64_t pixel = output_pixel(t, tile, run * runs.rows);
    const float mean = norm.mean_rstd[(int64_t{n} * norm.groups + c / norm.group_channels) * 2];
    float sum = 0, centred = 0;
#pragma unroll 4
    for (int j = 0; j < rows; ++j) {
      float x[1];
      load_stored(norm.in, pixel + j, c, x);
      const float dz = at[j * sums_pitch(Columns)];
      sum += dz;
      centred += dz * (x[0] - mean);
    }
    const auto to = norm.sums + (runs.index(t, tile, run) * 2 * channels + c);
    to[0] = sum;
    to[channels] = centred;
  }
}

}  // namespace ddpm::cuda
