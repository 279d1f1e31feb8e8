// ReLU, pooling and bilinear resizing.
//
// ReLU moves the least it can: x read once, y written once. Pooling reads each value of x once per
// window that holds it, from memory the first time and from cache then, as neighbouring pixels are
// in flight together. Resizing reads the four neighbours of each element from cache, images being
// small beside what they become. All are limited by memory.
#include "kernels/cuda/runs.h"

namespace ddpm::cuda {
namespace {

// Thread i has run i of V channels of x, `per_pixel` of them a pixel.
template <typename T, int V>
__global__ void relu_kernel(Global<const T> x, Global<T> y, uint32_t runs, Divisor per_pixel,
                            int channels, int offset) {
  const uint32_t i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= runs) return;
  uint32_t run;
  const int64_t pixel = per_pixel.divide(i, run);
  float v[V];
  load_floats<T>(x + int64_t{i} * V, v);
#pragma unroll
  for (int j = 0; j < V; ++j) v[j] = v[j] < 0 ? 0.0f : v[j];  // NaN stays
  store_floats<T>(y + (pixel * channels + offset + static_cast<int>(run) * V), v);
}

// What a pooling kernel knows of its tensors.
struct PoolPlan {
  Divisor per_pixel, width, height;  // of y: runs a pixel, pixels a row, rows an image
  int h, w, c;                       // of x
  int r, s, stride, pad;
  int channels, offset;
};

// Thread i has run i of y's own channels.
template <typename T, int V, bool Average>
__global__ void pool_kernel(Global<const T> x, Global<T> y, uint32_t runs, PoolPlan p) {
  const uint32_t i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= runs) return;
  uint32_t run, column, row;
  const uint32_t pixel = p.per_pixel.divide(i, run);
  const int64_t image = p.height.divide(p.width.divide(pixel, column), row);
  const int top = static_cast<int>(row) * p.stride - p.pad;
  const int left = static_cast<int>(column) * p.stride - p.pad;
  const int h0 = top > 0 ? top : 0, h1 = top + p.r < p.h ? top + p.r : p.h;
  const int w0 = left > 0 ? left : 0, w1 = left + p.s < p.w ? left + p.s : p.w;
  const int c = static_cast<int>(run) * V;
  float result[V], v[V];
#pragma unroll
  for (int j = 0; j < V; ++j) result[j] = Average ? 0.0f : -INFINITY;
  for (int h = h0; h < h1; ++h)
    for (int w = w0; w < w1; ++w) {
      load_floats<T>(x + (((image * p.h + h) * p.w + w) * p.c + c), v);
#pragma unroll
      for (int j = 0; j < V; ++j) {
        if constexpr (Average)
          result[j] += v[j];
        else if (result[j] < v[j] || v[j] != v[j])  // a NaN is larger than all, and stays
          result[j] = v[j];
      }
    }
  if constexpr (Average) {
    const auto count = static_cast<float>((h1 - h0) * (w1 - w0));
#pragma unroll
    for (int j = 0; j < V; ++j) result[j] /= count;
  }
  store_floats<T>(y + (int64_t{pixel} * p.channels + p.offset + c), result);
}

// Between which two elements along an axis of x element i of y lies, and how far from the first.
struct Between {
  int first, second;
  float second_weight;
};
// At ((2 i + 1) from - to) / (2 to); `twice` divides by 2 to.
__device__ __forceinline__ Between neighbours(uint32_t i, int from, int to, const Divisor& twice) {
  const int place = (2 * static_cast<int>(i) + 1) * from - to;
  uint32_t rest;
  const int first = static_cast<int>(twice.divide(place > 0 ? place : 0, rest));
  return {first, first + 1 < from ? first + 1 : from - 1,
          static_cast<float>(rest) / static_cast<float>(2 * to)};
}

// Thread i has element i of y (N,to_h,to_w,C).
template <typename T>
__global__ void resize_kernel(Global<const float> x, Global<T> y, uint32_t count, Divisor channels,
                              Divisor width, Divisor height, Divisor twice_width,
                              Divisor twice_height, int h, int w, int c, int to_h, int to_w) {
  const uint32_t i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= count) return;
  uint32_t channel, column, row;
  const uint32_t pixel = channels.divide(i, channel);
  const int64_t image = height.divide(width.divide(pixel, column), row);
  const Between across = neighbours(column, w, to_w, twice_width);
  const Between down = neighbours(row, h, to_h, twice_height);
  const auto at = [&](int m, int n) {
    return x[((image * h + m) * w + n) * c + static_cast<int>(channel)];
  };
  const float right = across.second_weight, left = 1.0f - right;
  const float above = left * at(down.first, across.first) + right * at(down.first, across.second);
  const float below = left * at(down.second, across.first) + right * at(down.second, across.second);
  const float v[1] = {(1.0f - down.second_weight) * above + down.second_weight * below};
  store_floats<T>(y + int64_t{i}, v);
}

}  // namespace

Call CudaBackend::relu(const Shape& x, In in, Out y, const Columns& to) {
  DDPM_CHECK(x.positive() && to.hold(x.c) && in && y, "relu: x %s to channel %d of %d",
             to_string(x).c_str(), to.offset, to.channels);
  return by_width(type_, {x.c, to.channels, to.offset}, [=]<typename T, int V>() -> Call {
    const uint32_t runs = runs_of("relu", x.count(), V);
    const Divisor per_pixel(x.c / V);
    return {"relu", {in}, {y}, 0, [=](const Run& r) {
              launch<relu_kernel<T, V>>({.grid_x = blocks_for(runs, 1)}, r.stream, r.in<T>(in),
                                        r.out<T>(y), runs, per_pixel, to.channels, to.offset);
            }};
  });
}

Call CudaBackend::pool(const PoolDesc& d, In in, Out y, const Columns& to) {
  DDPM_CHECK(d.valid() && to.hold(d.x.c) && in && y,
             "pool: %dx%d of %s, pad %d, to channel %d of %d", d.r, d.s, to_string(d.x).c_str(),
             d.pad, to.offset, to.channels);
  return by_width(type_, {d.x.c, to.channels, to.offset}, [=]<typename T, int V>() -> Call {
    const uint32_t runs = runs_of("pool", d.y().count(), V);
    const PoolPlan plan{
        Divisor(d.x.c / V), Divisor(d.q()), Divisor(d.p()), d.x.h,    d.x.w, d.x.c, d.r, d.s,
        d.stride,           d.pad,          to.channels,    to.offset};
    return {
        "pool", {in}, {y}, 0, [=, average = d.average](const Run& r) {
          const LaunchShape shape{.grid_x = blocks_for(runs, 1)};
          if (average)
            launch<pool_kernel<T, V, true>>(shape, r.stream, r.in<T>(in), r.out<T>(y), runs, plan);
          else
            launch<pool_kernel<T, V, false>>(shape, r.stream, r.in<T>(in), r.out<T>(y), runs, plan);
        }};
  });
}

Call CudaBackend::resize(const Shape& x, int h, int w, In in, Out y) {
  constexpr int kMaxSide = 16384;  // keeps places between pixels within 31 bits
  DDPM_CHECK(x.positive() && x.h <= kMaxSide && x.w <= kMaxSide && h > 0 && h <= kMaxSide &&
                 w > 0 && w <= kMaxSide && in && y,
             "resize: %s to %dx%d", to_string(x).c_str(), h, w);
  const uint32_t count = runs_of("resize", int64_t{x.n} * h * w * x.c, 1);
  return dispatch(type_, [&]<typename T>(T) -> Call {
    return {"resize", {in}, {y}, 0, [=](const Run& r) {
              launch<resize_kernel<T>>({.grid_x = blocks_for(count, 1)}, r.stream, r.in<float>(in),
                                       r.out<T>(y), count, Divisor(x.c), Divisor(w), Divisor(h),
                                       Divisor(2 * w), Divisor(2 * h), x.h, x.w, x.c, h, w);
            }};
  });
}

}  // namespace ddpm::cuda
