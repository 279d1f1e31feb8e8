// How blocks lie over (N, pixels, channels): a block of 256 threads takes a slab of channels of a
// run of pixels. Neighbouring threads read neighbouring channels of a pixel, V each (at V = 8 and
// 128 channels or more 16 of them, 256 bytes of bf16), and the block's other rows read other
// pixels; so a thread keeps its channels, and what belongs to them, for all its pixels.
#pragma once

#include <device/launch.h>
#include <device/memory.h>
#include <device/warp.h>

#include <type_traits>

#include "kernels/cuda/cuda_backend.h"
#include "kernels/cuda/vec.h"

namespace ddpm::cuda {

inline constexpr int kTileBits = 8, kTileThreads = 1 << kTileBits;

struct Tiling {
  int images = 1;
  int64_t pixels = 0;  // of an image
  int channels = 0;
  int lane_bits = 0;  // log2 of the threads over the channels of a slab
  int run = 0;        // pixels of a block
  int slabs = 1, runs = 1;

  // run 0: as many pixels as give each thread `per_thread`. Depends on no other image.
  Tiling(int images, int64_t pixels, int channels, int v, int per_thread, int run)
      : images(images), pixels(pixels), channels(channels), run(run) {
    while (lane_bits < 4 && (v << lane_bits) < channels) ++lane_bits;
    const int slab = v << lane_bits;
    if (run == 0) this->run = per_thread * (kTileThreads >> lane_bits);
    slabs = (channels + slab - 1) / slab;
    runs = static_cast<int>((pixels + this->run - 1) / this->run);
  }
  unsigned blocks() const {
    const int64_t blocks = int64_t{images} * runs * slabs;
    DDPM_CHECK(blocks <= 0x7FFFFFFF, "%lld blocks over %d channels of %lld pixels",
               static_cast<long long>(blocks), channels, static_cast<long long>(pixels));
    return static_cast<unsigned>(blocks);
  }
};

// f(T, V): eight elements at a time where `wide`, else one.
template <typename F>
Call dispatch_width(DType type, bool wide, F f) {
  return dispatch(type, [&]<typename T>(T t) -> Call {
    if (wide) return f(t, std::integral_constant<int, 8>());
    return f(t, std::integral_constant<int, 1>());
  });
}

// Where the thread stands in block `block` of a tiling.
template <int V>
struct Stand {
  int lanes, row_bits, rows, lane, row;  // rows = 2^row_bits
  int n, run, first_channel, channel;    // of the block's slab, of the thread
  int64_t first_pixel;                   // of the run
  int count;                             // pixels of the run
  bool inside;                           // the thread's channels exist

  __device__ __forceinline__ Stand(const Tiling& t, int block) {
    lanes = 1 << t.lane_bits;
    row_bits = kTileBits - t.lane_bits;
    rows = 1 << row_bits;
    lane = static_cast<int>(threadIdx.x) & (lanes - 1);
    row = static_cast<int>(threadIdx.x) >> t.lane_bits;
    first_channel = block % t.slabs * lanes * V;
    channel = first_channel + lane * V;
    run = block / t.slabs % t.runs;
    n = block / t.slabs / t.runs;
    first_pixel = int64_t{run} * t.run;
    const int64_t left = t.pixels - first_pixel;
    count = left < t.run ? static_cast<int>(left) : t.run;
    inside = channel < t.channels;
  }
  // The run's first pixel, counted over all images.
  __device__ __forceinline__ int64_t pixel(const Tiling& t) const {
    return n * t.pixels + first_pixel;
  }
  // Channels of the slab that exist.
  __device__ __forceinline__ int width(const Tiling& t) const {
    const int left = t.channels - first_channel;
    return left < lanes * V ? left : lanes * V;
  }
};

// The thread's pixels: f.template operator()<Hold>(p) for a batch p, p + rows, ..., whose loads are
// then under way together, <1>(p) for each of the rest.
template <int Hold, int V, typename F>
__device__ __forceinline__ void for_pixels(const Stand<V>& at, F f) {
  int p = at.row;
  for (; p + (Hold - 1) * at.rows < at.count; p += Hold * at.rows) f.template operator()<Hold>(p);
  for (; p < at.count; p += at.rows) f.template operator()<1>(p);
}

// The sum over `count` rows of one column of `from`, a column per lane; a warp takes every
// so-many-th row. Valid in warp 0. scratch: an element per thread.
__device__ __forceinline__ double column_total(const Global<const float>& from, int64_t stride,
                                               int count, bool inside,
                                               const Smem<double>& scratch) {
  const int warps = static_cast<int>(blockDim.x / 32);
  double sum = 0;
  if (inside) {
#pragma unroll 4
    for (int r = warp_id(); r < count; r += warps) sum += static_cast<double>(from[r * stride]);
  }
  scratch[threadIdx.x] = sum;
  block_sync();
  if (warp_id() > 0) return 0;
  for (int w = 1; w < warps; ++w) sum += scratch[32 * w + lane_id()];
  return sum;
}

}  // namespace ddpm::cuda
