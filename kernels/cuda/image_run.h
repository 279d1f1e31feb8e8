// Batches where it matters which image an element belongs to: a block works in one image, a thread
// on 8 consecutive elements of it, moved at once where images are whole runs of 8.
#pragma once

#include "kernels/cuda/vec.h"
#include "kernels/error.h"
#include "kernels/shape.h"

namespace ddpm::cuda {

constexpr int kRun = 8;

struct ImageRun {
  int64_t offset;  // in the batch
  int begin;       // in the image
  int count;       // elements of it, 0 to 8
  bool whole;      // it is moved at once
};

// The run of this thread in part `part` of image `slot`, of `size` elements.
__device__ __forceinline__ ImageRun image_run(int size, int slot, int part) {
  const int64_t begin = (int64_t{part} * blockDim.x + threadIdx.x) * kRun;
  const int64_t left = int64_t{size} - begin;
  const int count = left < 0 ? 0 : left < kRun ? static_cast<int>(left) : kRun;
  return {int64_t{slot} * size + begin, static_cast<int>(begin), count,
          count == kRun && size % kRun == 0};
}

// Zeros behind the run's end.
template <typename T, typename Pointer>
__device__ __forceinline__ void load_run(const Pointer& x, const ImageRun& run, float (&v)[kRun]) {
  if (run.whole) {
    load_floats<T>(x + run.offset, v);
    return;
  }
#pragma unroll
  for (int i = 0; i < kRun; ++i) v[i] = i < run.count ? to_float(T(x[run.offset + i])) : 0.0f;
}

template <typename T, typename Pointer>
__device__ __forceinline__ void store_run(const Pointer& y, const ImageRun& run,
                                          const float (&v)[kRun]) {
  if (run.whole) {
    store_floats<T>(y + run.offset, v);
    return;
  }
#pragma unroll
  for (int i = 0; i < kRun; ++i) {
    const float one[1] = {v[i]};
    if (i < run.count) store_floats<T>(y + run.offset + i, one);
  }
}

// Elements of one half of 2 C channels: where the run's begin, and how they go on.
struct HalfRun {
  int64_t at;
  int c, channel;

  __device__ __forceinline__ HalfRun(const ImageRun& run, int channels, int half)
      : at((run.offset - run.begin) * 2 + (int64_t{run.begin / channels} * 2 + half) * channels +
           run.begin % channels),
        c(channels),
        channel(run.begin % channels) {}
  __device__ __forceinline__ void step() {
    ++at;
    if (++channel < c) return;
    channel = 0;
    at += c;
  }
};

// The run's elements in the first (half 0) or second half of x's channels, x (N,H,W,2C).
template <typename T, typename Pointer>
__device__ __forceinline__ void load_half(const Pointer& x, const ImageRun& run, int channels,
                                          int half, float (&v)[kRun]) {
  HalfRun from(run, channels, half);
#pragma unroll
  for (int i = 0; i < kRun; ++i, from.step()) v[i] = i < run.count ? to_float(T(x[from.at])) : 0.0f;
}

template <typename T, typename Pointer>
__device__ __forceinline__ void store_half(const Pointer& y, const ImageRun& run, int channels,
                                           int half, const float (&v)[kRun]) {
  HalfRun to(run, channels, half);
#pragma unroll
  for (int i = 0; i < kRun; ++i, to.step()) {
    const float one[1] = {v[i]};
    if (i < run.count) store_floats<T>(y + to.at, one);
  }
}

// Parts of an image for blocks of `block` threads.
constexpr int image_parts(const Shape& x, int block) {
  const int64_t per_block = int64_t{block} * kRun;
  return static_cast<int>((x.pixels() * x.c + per_block - 1) / per_block);
}

// Throws unless images can be addressed so.
inline void check_images(const char* op, const Shape& x) {
  DDPM_CHECK(
      x.positive() && x.n < 1 << 30 && x.pixels() * x.c < 1 << 30 && x.count() < int64_t{1} << 38,
      "%s: shape %s", op, to_string(x).c_str());
}

}  // namespace ddpm::cuda
