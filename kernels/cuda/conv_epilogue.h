// From sums to the output: biases, residual, statistics.
#pragma once

#include "kernels/cuda/block.h"
#include "kernels/cuda/conv_norm_gradient.h"
#include "kernels/cuda/conv_tile.h"

namespace ddpm::cuda {

template <typename T>
struct ConvOutput {
  Global<T> y = nullptr;
  int k = 0;
  Global<const float> bias = nullptr, shortcut_bias = nullptr;
  Global<const float> sample_bias = nullptr;  // at the column of channel 0
  int sample_bias_stride = 0;
  Global<const T> residual = nullptr;
  Global<float> statistics = nullptr;
  bool accumulate = false;
  NormGradient<T> norm;  // of a gradient
};

__device__ __forceinline__ void add_to(float& v, float more) { v += more; }

// N channels of an output pixel of image n. Leaves what it wrote in `sums` if statistics follow.
template <typename T, int N>
__device__ __forceinline__ void finish_run(const ConvOutput<T>& o, const Smem<float>& sums, int n,
                                           int64_t pixel, int k) {
  float v[N], more[N];
  load_floats<float>(sums, v);
  const auto add = [&] {
#pragma unroll
    for (int i = 0; i < N; ++i) v[i] += more[i];
  };
  if (o.bias != nullptr) {
    load_floats<float>(o.bias + k, more);
    add();
  }
  if (o.shortcut_bias != nullptr) {
    load_floats<float>(o.shortcut_bias + k, more);
    add();
  }
  if (o.sample_bias != nullptr) {
    const auto row = o.sample_bias + (int64_t{n} * o.sample_bias_stride + k);
#pragma unroll
    for (int i = 0; i < N; ++i) v[i] += row[i];
  }
  if (o.residual != nullptr) {
    load_floats<T>(o.residual + (pixel * o.k + k), more);
    add();
  }
  if (o.accumulate) {
    load_floats<T>(o.y + (pixel * o.k + k), more);
    add();
  }
  store_floats<T>(o.y + (pixel * o.k + k), v);
  if (o.statistics == nullptr) return;
  if constexpr (sizeof(T) == 2) {
#pragma unroll
    for (int i = 0; i < N; ++i) v[i] = to_float(to_bf16(v[i]));
  }
  store_floats<float>(sums, v);
}

// Mean and M2 of each channel over each run of 64 pixels of the tile, or over each of its images.
template <int Columns, typename Team>
__device__ __forceinline__ void write_statistics(const Global<float>& statistics, int channels,
                                                 const ConvTiles& t, const Tile& tile, int k0,
                                                 const Smem<float>& sums, const Team& team) {
  const TileRuns runs(t, tile);
  for (int i = team.thread(); i < runs.count * Columns; i += Team::kThreads) {
    const int run = i / Columns, column = i % Columns, k = k0 + column;
    if (k >= channels) continue;
    const int rows = runs.rows_of(tile, run);
    const auto at = sums + (int64_t{run} * runs.rows * sums_pitch(Columns) + column);
    float mean = 0, m2 = 0;
    for (int j = 0; j < rows; ++j) mean += at[j * sums_pitch(Columns)];
    mean = mean / static_cast<float>(rows);
    for (int j = 0; j < rows; ++j) {
      const float d = at[j * sums_pitch(Columns)] - mean;
      m2 += d * d;
    }
    const float pair[2] = {mean, m2};
    store_floats<float>(statistics + (runs.index(t, tile, run) * channels + k) * 2, pair);
  }
}

// Finishes a tile with all threads of a block.
struct BlockTeam {
  static constexpr int kThreads = kConvThreads;
  __device__ __forceinline__ int thread() const { return static_cast<int>(threadIdx.x); }
  __device__ __forceinline__ void sync() const { block_sync(); }
};

// The team's sums, complete and visible to all of it, to y. Gradient: y is one, perhaps by a norm.
template <typename T, int Columns, bool Gradient, typename Team>
__device__ __forceinline__ void finish_tile(const ConvOutput<T>& o, const ConvTiles& t,
                                            const Tile& tile, int k0, const Smem<float>& sums,
                                            const Team& team) {
  constexpr int kGroups = Columns / 8;
  const int thread = team.thread();
  const int column = thread % kGroups * 8, k = k0 + column;
  if (k < o.k) {
    for (int m = thread / kGroups; m < tile.rows; m += Team::kThreads / kGroups) {
      const int64_t pixel = output_pixel(t, tile, m);
      const int n = image_of(t, tile, m);
      const auto at = sums + (int64_t{m} * sums_pitch(Columns) + column);
      const auto finish = [&]<int N>(int i) {
        if constexpr (Gradient) {
          if (o.norm.in.x != nullptr) {
            finish_gradient<T, N>(o.norm, o.y, at + i, n, pixel, k + i);
            return;
          }
        }
        finish_run<T, N>(o, at + i, n, pixel, k + i);
      };
      if (o.k % 8 == 0 && (!Gradient || o.norm.in.c1 % 8 == 0)) {
        finish.template operator()<8>(0);
      } else {
        for (int i = 0; i < 8 && k + i < o.k; ++i) finish.template operator()<1>(i);
      }
    }
  }
  if constexpr (Gradient) {
    if (o.norm.in.x == nullptr) return;
    team.sync();
    write_norm_sums<T, Columns>(o.norm, t, tile, k0, sums, team);
    return;
  }
  if (o.statistics == nullptr) return;
  team.sync();
  write_statistics<Columns>(o.statistics, o.k, t, tile, k0, sums, team);
}

}  // namespace ddpm::cuda
