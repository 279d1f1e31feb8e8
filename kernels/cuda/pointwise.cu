// SiLU, copies and casts. Each moves what it must: one read of every input, one write of the
// output; all are limited by memory. 16 bytes and more per thread and access.
#include "kernels/cuda/cuda_backend.h"
#include "kernels/cuda/silu.h"
#include "kernels/cuda/vec.h"

namespace ddpm::cuda {
namespace {

// y (+)= f(x), and y (+)= f(x, dy) below; 8 elements a thread.
__global__ void silu_kernel(Global<const float> x, Global<float> y, int64_t count) {
  for_run<8>(count, [&]<int N>(int64_t i) {
    float v[N];
    load_floats<float>(x + i, v);
#pragma unroll
    for (int j = 0; j < N; ++j) v[j] = silu_value(v[j]);
    store_floats<float>(y + i, v);
  });
}

template <bool Accumulate>
__global__ void silu_backward_kernel(Global<const float> x, Global<const float> dy,
                                     Global<float> dx, int64_t count) {
  for_run<8>(count, [&]<int N>(int64_t i) {
    float v[N], d[N];
    load_floats<float>(x + i, v);
    load_floats<float>(dy + i, d);
#pragma unroll
    for (int j = 0; j < N; ++j) d[j] *= silu_slope(v[j]);
    if constexpr (Accumulate) {
      load_floats<float>(dx + i, v);
#pragma unroll
      for (int j = 0; j < N; ++j) d[j] += v[j];
    }
    store_floats<float>(dx + i, d);
  });
}

template <typename From, typename To, bool Accumulate>
__global__ void copy_kernel(Global<const From> x, Global<To> y, int64_t count) {
  for_run<8>(count, [&]<int N>(int64_t i) {
    float v[N];
    load_floats<From>(x + i, v);
    if constexpr (Accumulate) {
      float old[N];
      load_floats<To>(y + i, old);
#pragma unroll
      for (int j = 0; j < N; ++j) v[j] += old[j];
    }
    store_floats<To>(y + i, v);
  });
}

void check_count(const char* op, int64_t count) {
  DDPM_CHECK(count > 0 && count < int64_t{1} << 40, "%s: %lld elements", op,
             static_cast<long long>(count));
}

}  // namespace

Call CudaBackend::silu(int64_t count, In x, Out y) {
  check_count("silu", count);
  return {"silu", {x}, {y}, 0, [=](const Run& r) {
            launch<silu_kernel>({.grid_x = blocks_for(count, 8)}, r.stream, r.in<float>(x),
                                r.out<float>(y), count);
          }};
}

Call CudaBackend::silu_backward(int64_t count, In x, In dy, Out dx, Write write) {
  check_count("silu_backward", count);
  return {"silu_backward", {x, dy}, {dx}, 0, [=](const Run& r) {
            const LaunchShape shape{.grid_x = blocks_for(count, 8)};
            if (write == Write::kAccumulate)
              launch<silu_backward_kernel<true>>(shape, r.stream, r.in<float>(x), r.in<float>(dy),
                                                 r.out<float>(dx), count);
            else
              launch<silu_backward_kernel<false>>(shape, r.stream, r.in<float>(x), r.in<float>(dy),
                                                  r.out<float>(dx), count);
          }};
}

Call CudaBackend::cast(int64_t count, DType from, In x, DType to, Out y) {
  check_count("cast", count);
  DDPM_CHECK(
      (from == DType::kF32 || from == DType::kBF16) && (to == DType::kF32 || to == DType::kBF16),
      "cast: %s to %s", name_of(from), name_of(to));
  return dispatch(from, [&]<typename From>(From) {
    return dispatch(to, [&]<typename To>(To) -> Call {
      return {"cast", {x}, {y}, 0, [=](const Run& r) {
                launch<copy_kernel<From, To, false>>({.grid_x = blocks_for(count, 8)}, r.stream,
                                                     r.in<From>(x), r.out<To>(y), count);
              }};
    });
  });
}

Call CudaBackend::copy(int64_t count, DType type, In x, Out y, Write write) {
  check_count("copy", count);
  DDPM_CHECK(type == DType::kF32 || type == type_, "copy: of %s", name_of(type));
  return dispatch(type, [&]<typename T>(T) -> Call {
    return {"copy", {x}, {y}, 0, [=](const Run& r) {
              const LaunchShape shape{.grid_x = blocks_for(count, 8)};
              if (write == Write::kAccumulate)
                launch<copy_kernel<T, T, true>>(shape, r.stream, r.in<T>(x), r.out<T>(y), count);
              else
                launch<copy_kernel<T, T, false>>(shape, r.stream, r.in<T>(x), r.out<T>(y), count);
            }};
  });
}

}  // namespace ddpm::cuda
