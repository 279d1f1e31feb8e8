// Concatenation along channels, nearest x2 upsampling, and their backward passes.
//
// Each moves the least it can: every input is read once, every output written once (and read once
// where it is added to). All are limited by memory.
#include "kernels/cuda/runs.h"

namespace ddpm::cuda {
namespace {

// V elements as they lie in memory: 16 bytes, or one element.
template <typename T, int V, typename From>
__device__ __forceinline__ auto load_run(const From& from) {
  if constexpr (V == 1) {
    const T value = from[0];
    return value;
  } else {
    return load_words<4>(from);
  }
}
template <typename T, typename To>
__device__ __forceinline__ void store_run(const To& to, const T& value) {
  to[0] = value;
}
template <typename T, typename To>
__device__ __forceinline__ void store_run(const To& to, const Words<4>& words) {
  store_words(to, words);
}

// to (+)= v
template <typename T, int V, typename To>
__device__ __forceinline__ void write_run(const To& to, float (&v)[V], bool add) {
  if (add) {
    float old[V];
    load_floats<T>(to, old);
#pragma unroll
    for (int i = 0; i < V; ++i) v[i] += old[i];
  }
  store_floats<T>(to, v);
}

// Thread i has run i of V channels of the wide tensor (y, or dy), `per_pixel` of them a pixel.
template <typename T, int V>
__global__ void concat_kernel(Global<const T> x, Global<const T> x2, Global<T> y, uint32_t runs,
                              Divisor per_pixel, int c1, int c2) {
  const uint32_t i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= runs) return;
  uint32_t run;
  const int64_t pixel = per_pixel.divide(i, run);
  const int c = static_cast<int>(run) * V;
  const auto value = load_run<T, V>(c < c1 ? x + (pixel * c1 + c) : x2 + (pixel * c2 + c - c1));
  store_run<T>(y + int64_t{i} * V, value);
}

template <typename T, int V>
__global__ void split_kernel(Global<const T> dy, Global<T> dx, Global<T> dx2, uint32_t runs,
                             Divisor per_pixel, int c1, int c2, bool add, bool add2) {
  const uint32_t i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= runs) return;
  uint32_t run;
  const int64_t pixel = per_pixel.divide(i, run);
  const int c = static_cast<int>(run) * V;
  float v[V];
  load_floats<T>(dy + int64_t{i} * V, v);
  if (c < c1)
    write_run<T>(dx + (pixel * c1 + c), v, add);
  else
    write_run<T>(dx2 + (pixel * c2 + c - c1), v, add2);
}

// Where the four pixels of the large image begin that run i of the small one stands for.
__device__ __forceinline__ int64_t enlarged(uint32_t i, const Divisor& per_pixel,
                                            const Divisor& width, int w, int c, int v) {
  uint32_t run, column;
  const uint32_t pixel = per_pixel.divide(i, run);
  const int64_t row = width.divide(pixel, column);
  return (4 * row * w + 2 * column) * c + static_cast<int64_t>(run) * v;
}

// Thread i has run i of the small tensor (x, or dx).
template <typename T, int V>
__global__ void upsample_kernel(Global<const T> x, Global<T> y, uint32_t runs, Divisor per_pixel,
                                Divisor width, int w, int c) {
  const uint32_t i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= runs) return;
  const int64_t top = enlarged(i, per_pixel, width, w, c, V), bottom = top + int64_t{2} * w * c;
  const auto value = load_run<T, V>(x + int64_t{i} * V);
  store_run<T>(y + top, value);
  store_run<T>(y + (top + c), value);
  store_run<T>(y + bottom, value);
  store_run<T>(y + (bottom + c), value);
}

template <typename T, int V>
__global__ void upsample_backward_kernel(Global<const T> dy, Global<T> dx, uint32_t runs,
                                         Divisor per_pixel, Divisor width, int w, int c, bool add) {
  const uint32_t i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= runs) return;
  const int64_t top = enlarged(i, per_pixel, width, w, c, V), bottom = top + int64_t{2} * w * c;
  float a[V], b[V], d[V], e[V];
  load_floats<T>(dy + top, a);
  load_floats<T>(dy + (top + c), b);
  load_floats<T>(dy + bottom, d);
  load_floats<T>(dy + (bottom + c), e);
#pragma unroll
  for (int j = 0; j < V; ++j) a[j] = (a[j] + b[j]) + (d[j] + e[j]);
  write_run<T>(dx + int64_t{i} * V, a, add);
}

void check_shape(const char* op, const Shape& x, int c2) {
  DDPM_CHECK(x.positive() && c2 > 0, "%s: x %s and %d channels", op, to_string(x).c_str(), c2);
}

}  // namespace

Call CudaBackend::concat(const Shape& x, int c2, In in, In x2, Out y) {
  check_shape("concat", x, c2);
  DDPM_CHECK(in && x2 && y, "concat: x %s: a tensor is absent", to_string(x).c_str());
  return by_width(type_, {x.c, c2}, [=]<typename T, int V>() -> Call {
    const uint32_t runs = runs_of("concat", x.count() / x.c * (x.c + c2), V);
    const Divisor per_pixel((x.c + c2) / V);
    return {"concat", {in, x2}, {y}, 0, [=, c1 = x.c](const Run& r) {
              launch<concat_kernel<T, V>>({.grid_x = blocks_for(runs, 1)}, r.stream, r.in<T>(in),
                                          r.in<T>(x2), r.out<T>(y), runs, per_pixel, c1, c2);
            }};
  });
}

Call CudaBackend::split(const Shape& x, int c2, In dy, Out dx, Write write, Out dx2, Write write2) {
  check_shape("split", x, c2);
  DDPM_CHECK(dy && dx && dx2, "split: x %s: a tensor is absent", to_string(x).c_str());
  const bool add = write == Write::kAccumulate, add2 = write2 == Write::kAccumulate;
  return by_width(type_, {x.c, c2}, [=]<typename T, int V>() -> Call {
    const uint32_t runs = runs_of("split", x.count() / x.c * (x.c + c2), V);
    const Divisor per_pixel((x.c + c2) / V);
    return {"split", {dy}, {dx, dx2}, 0, [=, c1 = x.c](const Run& r) {
              launch<split_kernel<T, V>>({.grid_x = blocks_for(runs, 1)}, r.stream, r.in<T>(dy),
                                         r.out<T>(dx), r.out<T>(dx2), runs, per_pixel, c1, c2, add,
                                         add2);
            }};
  });
}

Call CudaBackend::upsample(const Shape& x, In in, Out y) {
  DDPM_CHECK(x.positive() && in && y, "upsample: x %s", to_string(x).c_str());
  return by_width(type_, {x.c}, [=]<typename T, int V>() -> Call {
    const uint32_t runs = runs_of("upsample", x.count(), V);
    const Divisor per_pixel(x.c / V), width(x.w);
    return {"upsample", {in}, {y}, 0, [=](const Run& r) {
              launch<upsample_kernel<T, V>>({.grid_x = blocks_for(runs, 1)}, r.stream, r.in<T>(in),
                                            r.out<T>(y), runs, per_pixel, width, x.w, x.c);
            }};
  });
}

Call CudaBackend::upsample_backward(const Shape& x, In dy, Out dx, Write write) {
  DDPM_CHECK(x.positive() && dy && dx, "upsample_backward: x %s", to_string(x).c_str());
  const bool add = write == Write::kAccumulate;
  return by_width(type_, {x.c}, [=]<typename T, int V>() -> Call {
    const uint32_t runs = runs_of("upsample_backward", x.count(), V);
    const Divisor per_pixel(x.c / V), width(x.w);
    return {"upsample_backward", {dy}, {dx}, 0, [=](const Run& r) {
              launch<upsample_backward_kernel<T, V>>({.grid_x = blocks_for(runs, 1)}, r.stream,
                                                     r.in<T>(dy), r.out<T>(dx), runs, per_pixel,
                                                     width, x.w, x.c, add);
            }};
  });
}

}  // namespace ddpm::cuda
