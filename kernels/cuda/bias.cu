// Passes around a library's convolution. add_bias moves what it must: y read and written once, the
// residual read once; the biases come from cache. convert reads x once, writes y once. All are
// limited by memory.
#include "kernels/cuda/bias.h"

#include "kernels/cuda/cuda_backend.h"
#include "kernels/cuda/vec.h"

namespace ddpm::cuda {
namespace {

constexpr unsigned kThreads = 256;

template <int N>
__device__ __forceinline__ void accumulate(float (&sum)[N], const float (&v)[N]) {
#pragma unroll
  for (int j = 0; j < N; ++j) sum[j] += v[j];
}

// A block works on one image, so a thread's place in it gives its channel; N divides k.
template <typename T, int N>
__global__ void bias_kernel(Global<T> y, Global<const float> bias, Global<const float> sample_bias,
                            Global<const T> residual, uint32_t image, uint32_t k, int64_t stride) {
  const uint32_t within = (blockIdx.x * blockDim.x + threadIdx.x) * N;
  if (within >= image) return;
  const int64_t i = int64_t{blockIdx.y} * image + within;
  const uint32_t channel = within % k;
  float sum[N], v[N];
  load_floats<T>(y + i, sum);
  if (bias != nullptr) {
    load_floats<float>(bias + channel, v);
    accumulate(sum, v);
  }
  if (sample_bias != nullptr) {
    load_floats<float>(sample_bias + (int64_t{blockIdx.y} * stride + channel), v);
    accumulate(sum, v);
  }
  if (residual != nullptr) {
    load_floats<T>(residual + i, v);
    accumulate(sum, v);
  }
  store_floats<T>(y + i, sum);
}

template <typename From, typename To, bool Accumulate>
__global__ void convert_kernel(Global<const From> x, Global<To> y, int64_t count) {
  for_run<8>(count, [&]<int N>(int64_t i) {
    float v[N];
    load_floats<From>(x + i, v);
    if constexpr (Accumulate) {
      float old[N];
      load_floats<To>(y + i, old);
      accumulate(v, old);
    }
    store_floats<To>(y + i, v);
  });
}

}  // namespace

void check(const BiasPass& p) {
  DDPM_CHECK(p.y.positive() && p.y.n <= 65535 && p.y.pixels() * p.y.c < int64_t{1} << 30,
             "add_bias: y %s", to_string(p.y).c_str());
  DDPM_CHECK(p.type == DType::kF32 || p.type == DType::kBF16, "add_bias: y of %s", name_of(p.type));
  DDPM_CHECK(p.sample_bias_stride == 0 || (p.sample_bias_offset >= 0 &&
                                           p.sample_bias_offset + p.y.c <= p.sample_bias_stride),
             "add_bias: y %s, sample bias %lld + %d of stride %lld", to_string(p.y).c_str(),
             static_cast<long long>(p.sample_bias_offset), p.y.c,
             static_cast<long long>(p.sample_bias_stride));
}

void add_bias(const BiasPass& p, void* stream, void* y, const float* bias, const float* sample_bias,
              const void* residual) {
  const int64_t image = p.y.pixels() * p.y.c;
  const bool wide =
      p.y.c % 8 == 0 && p.sample_bias_stride % 4 == 0 && p.sample_bias_offset % 4 == 0;
  if (sample_bias != nullptr) sample_bias += p.sample_bias_offset;
  const LaunchShape shape{.grid_x = blocks_for(image, wide ? 8 : 1, kThreads),
                          .grid_y = static_cast<unsigned>(p.y.n),
                          .block = kThreads};
  dispatch(p.type, [&]<typename T>(T) {
    const auto go = [&]<int N>() {
      launch<bias_kernel<T, N>>(shape, stream, static_cast<T*>(y), bias, sample_bias,
                                static_cast<const T*>(residual), static_cast<uint32_t>(image),
                                static_cast<uint32_t>(p.y.c), p.sample_bias_stride);
    };
    if (wide)
      go.template operator()<8>();
    else
      go.template operator()<1>();
  });
}

void convert(void* stream, int64_t count, DType from, const void* x, DType to, void* y,
             Write write) {
  DDPM_CHECK(count > 0 && count < int64_t{1} << 40, "convert: %lld elements",
             static_cast<long long>(count));
  dispatch(from, [&]<typename From>(From) {
    dispatch(to, [&]<typename To>(To) {
      const LaunchShape shape{.grid_x = blocks_for(count, 8)};
      const auto* source = static_cast<const From*>(x);
      auto* target = static_cast<To*>(y);
      if (write == Write::kAccumulate) {
        if constexpr (std::is_same_v<From, To> || std::is_same_v<To, float>)
          return launch<convert_kernel<From, To, true>>(shape, stream, source, target, count);
      } else if constexpr (!std::is_same_v<From, To>) {
        return launch<convert_kernel<From, To, false>>(shape, stream, source, target, count);
      }
      fail(Status::kBug, "convert: %s to %s, which nothing needs", name_of(from), name_of(to));
    });
  });
}

}  // namespace ddpm::cuda
