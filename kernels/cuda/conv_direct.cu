// Convolutions on plain arithmetic: fp32's exact mode, and bf16 where the tensor cores' kernels do
// not fit (odd channel counts under a transform, filters other than 3x3 and 1x1 in the weight
// gradient, halos larger than shared memory). Implicit GEMMs without a halo: every tap reads, and
// transforms, its pixels again, mostly from L1 and L2. Limited by fp32 FMA and by shared memory:
// three 16-byte loads for 32 of them.
#include "kernels/cuda/conv_plan.h"
#include "kernels/cuda/cuda_backend.h"

namespace ddpm::cuda {
namespace {

constexpr int kChunk = 32;
constexpr int kRows = 128, kColumns = 64;
constexpr int kRowPitch = kRows + 4, kColumnPitch = kColumns + 4;

// The transform of an element, wherever it lies.
template <typename T>
__device__ __forceinline__ float transform_one(const ConvInput<T>& in, int n, int pixel, int c,
                                               float v) {
  if (in.affine) {
    const auto pair = in.scale_shift + (int64_t{n} * in.channels() + c) * 2;
    v = v * pair[0] + pair[1];
  }
  if (in.silu) v *= fast_sigmoid(v);
  if (in.threshold == 0) return v;
  const int64_t element = int64_t{pixel - n * in.pixels} * in.channels() + c;
  const Philox4 words = draw(in, n, element);
  const int index = static_cast<int>(element % 8);
  return drop(in, word_of(words, index), index % 2, v);
}

// Up to eight channels of a stored pixel in fp32, transformed; zeros on padding and behind the end.
template <typename T>
__device__ __forceinline__ void load_input(const ConvInput<T>& in, int pixel, int c,
                                           float (&v)[8]) {
#pragma unroll
  for (int i = 0; i < 8; ++i) v[i] = 0;
  const int channels = in.channels();
  if (pixel < 0 || c >= channels) return;
  const int n = pixel / in.pixels;
  if (in.aligned) {
    if (c < in.c1)
      load_floats<T>(in.x + (int64_t{pixel} * in.c1 + c), v);
    else
      load_floats<T>(in.x2 + (int64_t{pixel} * in.c2 + (c - in.c1)), v);
    normalise(in, n, c, v);
    if (in.threshold == 0) return;
    const Philox4 words = draw(in, n, int64_t{pixel - n * in.pixels} * channels + c);
#pragma unroll
    for (int i = 0; i < 8; ++i) v[i] = drop(in, words[static_cast<size_t>(i / 2)], i % 2, v[i]);
    return;
  }
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    if (c + i >= channels) continue;
    v[i] = c + i < in.c1 ? to_float(T(in.x[int64_t{pixel} * in.c1 + c + i]))
                         : to_float(T(in.x2[int64_t{pixel} * in.c2 + c + i - in.c1]));
    v[i] = transform_one(in, n, pixel, c + i, v[i]);
  }
}

template <typename T>
__device__ __forceinline__ void load_run(const Global<const T>& from, int count, bool aligned,
                                         float (&v)[8]) {
  if (aligned && count >= 8) {
    load_floats<T>(from, v);
    return;
  }
#pragma unroll
  for (int i = 0; i < 8; ++i) v[i] = i < count ? to_float(T(from[i])) : 0.0f;
}

template <typename T>
struct DirectProblem {
  ConvTiles tiles;
  ConvInput<T> in, shortcut;
  Global<const T> filter = nullptr, shortcut_filter = nullptr;
  ConvOutput<T> out;
  int blocks = 1;  // over output channels
};

// sums (8 rows x 4 columns a thread) += a (depth, rows) b (depth, columns).
__device__ __forceinline__ void multiply(const Smem<float>& a, const Smem<float>& b, int row,
                                         int column, int depth, float (&sums)[8][4]) {
#pragma unroll 4
  for (int c = 0; c < depth; ++c) {
    float x[8], w[4];
    load_floats<float>(a + (c * kRowPitch + row), x);
    load_floats<float>(b + (c * kColumnPitch + column), w);
#pragma unroll
    for (int i = 0; i < 8; ++i)
#pragma unroll
      for (int j = 0; j < 4; ++j) sums[i][j] += x[i] * w[j];
  }
}

// (32, 64) of a tap of the filter: rows by what is summed over.
template <bool Gradient, typename T>
__device__ __forceinline__ void load_filter(const Global<const T>& filter, int in_channels,
                                            int out_channels, int taps, int tap, int c0, int k0,
                                            const Smem<float>& to) {
  const int thread = static_cast<int>(threadIdx.x);
  float v[8];
  if constexpr (Gradient) {
    const int row = thread / 8, column = thread % 8 * 8;
    const bool valid = c0 + row < in_channels;
    const int64_t at = (int64_t{valid ? c0 + row : 0} * taps + (taps - 1 - tap)) * out_channels;
    load_run<T>(filter + (at + k0 + column), valid ? out_channels - k0 - column : 0,
                out_channels % 8 == 0, v);
    store_floats<float>(to + (row * kColumnPitch + column), v);
  } else {
    const int column = thread % kColumns, row = thread / kColumns * 8;
    const bool valid = k0 + column < out_channels;
    const int64_t at = (int64_t{valid ? k0 + column : 0} * taps + tap) * in_channels;
    load_run<T>(filter + (at + c0 + row), valid ? in_channels - c0 - row : 0, in_channels % 8 == 0,
                v);
#pragma unroll
    for (int i = 0; i < 8; ++i) to[(row + i) * kColumnPitch + column] = v[i];
  }
}

// Where a row of the tile lies in the output.
struct Position {
  int n, y, x;
};
__device__ __forceinline__ Position position(const ConvTiles& t, const Tile& tile, int m) {
  if (m >= tile.rows) return {t.images, 0, 0};
  const int n = image_of(t, tile, m);
  if (t.segments > 0) return {n, tile.p + m / 64, tile.q + m % 64};
  const int f = tile.skip + m - (n - tile.n) * t.pixels(), y = f / t.q;
  return {n, tile.p + y, f - y * t.q};
}

template <typename T, bool Gradient>
__global__ void __launch_bounds__(kConvThreads) conv_direct_kernel(const DirectProblem<T> p) {
  const ConvTiles& t = p.tiles;
  SharedMemory shared;
  const Smem<float> a = shared.take<float>(kChunk * kRowPitch);
  const Smem<float> b = shared.take<float>(kChunk * kColumnPitch);
  const int thread = static_cast<int>(threadIdx.x), index = static_cast<int>(blockIdx.x);
  const int tile_index = index / p.blocks, k0 = (index - tile_index * p.blocks) * kColumns;
  const Tile tile = find_tile(t, tile_index);
  const int load_row = thread % kRows, load_unit = thread / kRows * 16;
  const Position at = position(t, tile, load_row);
  const int row = thread / 16 * 8, column = thread % 16 * 4;
  const bool active = row < tile.rows && k0 + column < p.out.k;
  float sums[8][4] = {};

  const auto add = [&](const ConvInput<T>& in, const Global<const T>& filter, bool turned, int taps,
                       int tap, int pixel) {
    const int channels = in.channels();
    for (int c0 = 0; c0 < channels; c0 += kChunk) {
      block_sync();
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float v[8];
        load_input(in, pixel, c0 + load_unit + half * 8, v);
#pragma unroll
        for (int i = 0; i < 8; ++i) a[(load_unit + half * 8 + i) * kRowPitch + load_row] = v[i];
      }
      if (turned)
        load_filter<Gradient, T>(filter, channels, p.out.k, taps, tap, c0, k0, b);
      else
        load_filter<false, T>(filter, channels, p.out.k, taps, tap, c0, k0, b);
      block_sync();
      const int depth = channels - c0 < kChunk ? channels - c0 : kChunk;
      if (active) multiply(a, b, row, column, depth, sums);
    }
  };
  for (int tap = 0; tap < t.taps(); ++tap) {
    const int y = tap / t.s, x = tap - y * t.s;
    add(p.in, p.filter, true, t.taps(), tap,
        stored_pixel(t, at.n, at.y * t.stride - t.pad_top + y, at.x * t.stride - t.pad_left + x));
  }
  if constexpr (!Gradient) {
    const int pixel = at.n < t.images ? static_cast<int>(output_pixel(t, tile, load_row)) : -1;
    add(p.shortcut, p.shortcut_filter, false, 1, 0, pixel);
  }

  block_sync();
  SharedMemory again;
  const Smem<float> staged = again.take<float>(kRows * sums_pitch(kColumns));
  if (active) {
#pragma unroll
    for (int i = 0; i < 8; ++i)
      store_floats<float>(staged + ((row + i) * sums_pitch(kColumns) + column), sums[i]);
  }
  block_sync();
  finish_tile<T, kColumns, Gradient>(p.out, t, tile, k0, staged, BlockTeam{});
}

template <typename T>
struct DirectFilterProblem {
  ConvTiles tiles;
  ConvInput<T> in;
  Global<const T> dy = nullptr;
  int k = 0, splits = 1, across = 1;
  Global<float> partial = nullptr;  // (splits, k, taps * c)
};

// Columns n.. of the GEMM's (pixels, taps * c) side.
template <typename T>
__device__ __forceinline__ void load_taps(const DirectFilterProblem<T>& p, const Position& at,
                                          int n, float (&v)[8]) {
  const ConvTiles& t = p.tiles;
  const int channels = p.in.channels();
  const auto pixel_of = [&](int tap) {
    const int y = tap / t.s, x = tap - y * t.s;
    return stored_pixel(t, at.n, at.y * t.stride - t.pad_top + y, at.x * t.stride - t.pad_left + x);
  };
  if (channels % 8 == 0) {
    const int tap = n / channels;
    load_input(p.in, tap < t.taps() ? pixel_of(tap) : -1, n - tap * channels, v);
    return;
  }
#pragma unroll 1
  for (int i = 0; i < 8; ++i) {
    const int tap = (n + i) / channels;
    float one[8];
    load_input(p.in, tap < t.taps() ? pixel_of(tap) : -1, n + i - tap * channels, one);
    v[0] = one[0];  // rotates through the eight, so that no index is unknown
#pragma unroll
    for (int j = 0; j < 7; ++j) {
      const float swap = v[j];
      v[j] = v[j + 1];
      v[j + 1] = swap;
    }
  }
}

// 64 output channels x 64 of taps * c a block, 32 pixels at a time; 4 x 4 a thread. Three blocks a
// multiprocessor: at 64 registers, which nvcc takes by itself, one value would spill on sm_80.
template <typename T>
__global__ void __launch_bounds__(kConvThreads, 3)
    conv_direct_wgrad_kernel(const DirectFilterProblem<T> p) {
  const ConvTiles& t = p.tiles;
  SharedMemory shared;
  const Smem<float> dy = shared.take<float>(kChunk * kColumnPitch);
  const Smem<float> x = shared.take<float>(kChunk * kColumnPitch);
  const int thread = static_cast<int>(threadIdx.x), index = static_cast<int>(blockIdx.x);
  const int down = index / p.across, k0 = down * kColumns,
            n0 = (index - down * p.across) * kColumns;
  const int columns = t.taps() * p.in.channels(), all = t.images * t.pixels();
  const int64_t chunks = (all + kChunk - 1) / kChunk, split = blockIdx.y;
  const int first = static_cast<int>(chunks * split / p.splits) * kChunk;
  const int end = static_cast<int>(chunks * (split + 1) / p.splits) * kChunk;
  const int load_pixel = thread % 32, load_column = thread / 32 * 8;
  const int row = thread / 16 * 4, column = thread % 16 * 4;
  const bool active = k0 + row < p.k && n0 + column < columns;
  float sums[4][4] = {};
  for (int base = first; base < end; base += kChunk) {
    block_sync();
    const int pixel = base + load_pixel, n = pixel / t.pixels(), f = pixel - n * t.pixels();
    const Position at{n, f / t.q, f % t.q};  // n = images behind the end
    float v[8] = {};
    if (pixel < all)
      load_run<T>(p.dy + (int64_t{pixel} * p.k + k0 + load_column), p.k - k0 - load_column,
                  p.k % 8 == 0, v);
    store_floats<float>(dy + (load_pixel * kColumnPitch + load_column), v);
    load_taps(p, at, n0 + load_column, v);
    store_floats<float>(x + (load_pixel * kColumnPitch + load_column), v);
    block_sync();
    const int depth = all - base < kChunk ? all - base : kChunk;
    if (!active) continue;
#pragma unroll 4
    for (int i = 0; i < depth; ++i) {
      float d[4], w[4];
      load_floats<float>(dy + (i * kColumnPitch + row), d);
      load_floats<float>(x + (i * kColumnPitch + column), w);
#pragma unroll
      for (int j = 0; j < 4; ++j)
#pragma unroll
        for (int l = 0; l < 4; ++l) sums[j][l] += d[j] * w[l];
    }
  }
  if (!active) return;
#pragma unroll
  for (int j = 0; j < 4; ++j)
#pragma unroll
    for (int l = 0; l < 4; ++l)
      if (k0 + row + j < p.k && n0 + column + l < columns)
        p.partial[(split * p.k + k0 + row + j) * columns + n0 + column + l] = sums[j][l];
}

// ---- host ----

template <typename T, bool Gradient>
void launch_direct(DirectProblem<T> p, const ConvTiles& tiles, const Run& r) {
  p.tiles = tiles;
  p.blocks = (p.out.k + kColumns - 1) / kColumns;
  const size_t tile =
      shared_bytes<float>(kChunk * kRowPitch) + shared_bytes<float>(kChunk * kColumnPitch);
  const size_t staged = shared_bytes<float>(static_cast<size_t>(kRows * sums_pitch(kColumns)));
  launch<conv_direct_kernel<T, Gradient>>({.grid_x = static_cast<unsigned>(tiles.count * p.blocks),
                                           .block = kConvThreads,
                                           .shared = tile > staged ? tile : staged},
                                          r.stream, p);
}

}  // namespace

ConvPlan direct_forward(DType type, const ConvDesc& d, const ConvSlots& s, Out y, Out statistics) {
  const ConvTiles tiles = forward_tiles(d, kRows);
  return dispatch(type, [&]<typename T>(T) -> ConvPlan {
    return {0, [=](const Run& r) {
              DirectProblem<T> p;
              p.in = make_input<T>(d, s, r);
              p.filter = r.in<T>(s.filter);
              if (d.shortcut_c > 0) {
                p.shortcut = make_shortcut<T>(d, s, r);
                p.shortcut_filter = r.in<T>(s.shortcut_filter);
              }
              p.out = make_output<T>(d, s, r, y, statistics);
              launch_direct<T, false>(p, tiles, r);
            }};
  });
}

ConvPlan direct_dgrad(DType type, const ConvDesc& d, const ConvSlots& s, In dy,
                      const GradientSlots& to) {
  const ConvTiles tiles = dgrad_tiles(d, kRows);
  return dispatch(type, [&]<typename T>(T) -> ConvPlan {
    return {0, [=](const Run& r) {
              DirectProblem<T> p;
              p.in = plain_input(r.in<T>(dy), d.k, d.y().pixels());
              p.filter = r.in<T>(s.filter);
              p.out = gradient_output<T>(d, s, to, r);
              launch_direct<T, true>(p, tiles, r);
            }};
  });
}

ConvPlan direct_wgrad(DType type, const ConvDesc& d, const ConvSlots& s, In dy, Out dfilter,
                      Write write) {
  const ConvTiles tiles = forward_tiles(d, kRows);
  const int columns = d.r * d.s * d.c(), across = (columns + kColumns - 1) / kColumns;
  const int blocks = across * ((d.k + kColumns - 1) / kColumns);
  const int64_t pixels = d.x.n * d.y().pixels();
  int splits = 264 / blocks;  // two blocks on each of 132 multiprocessors
  if (splits > pixels / 256) splits = static_cast<int>(pixels / 256);
  if (splits < 1) splits = 1;
  const int64_t count = d.filter().count();
  const size_t workspace = static_cast<size_t>(splits) * static_cast<size_t>(count) * sizeof(float);
  return dispatch(type, [&]<typename T>(T) -> ConvPlan {
    return {workspace, [=](const Run& r) {
              DirectFilterProblem<T> p;
              p.tiles = tiles;
              p.in = make_input<T>(d, s, r);
              p.dy = r.in<T>(dy);
              p.k = d.k;
              p.splits = splits;
              p.across = across;
              float* const sums = static_cast<float*>(r.workspace);
              p.partial = sums;
              launch<conv_direct_wgrad_kernel<T>>(
                  {.grid_x = static_cast<unsigned>(blocks),
                   .grid_y = static_cast<unsigned>(splits),
                   .block = kConvThreads,
                   .shared = 2 * shared_bytes<float>(kChunk * kColumnPitch)},
                  r.stream, p);
              launch_filter_sum(r.stream, sums, r.out<float>(dfilter), count, splits, write);
            }};
  });
}

}  // namespace ddpm::cuda
