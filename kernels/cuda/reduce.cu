// Statistics and sums over pixels and rows, in a fixed order. All are limited by memory: each reads
// its input once. Statistics write 8 bytes per channel and 64 pixels (6 % more at bf16), sums 4 per
// channel and 128 pixels, which a second, small launch adds up.
#include <algorithm>

#include "kernels/cuda/channel_tile.h"
#include "kernels/cuda/conv_plan.h"

namespace ddpm::cuda {
namespace {

// A running mean and sum of squared deviations of V channels (Chan, Golub & LeVeque).
template <int V>
struct Moments {
  float count = 0;
  float mean[V] = {}, m2[V] = {};

  template <int Hold>
  __device__ __forceinline__ void add(const float (&v)[Hold][V]) {
    constexpr float kTaken = Hold;
    const float share = fast_divide(kTaken, count + kTaken);
#pragma unroll
    for (int j = 0; j < V; ++j) {
      float sum = 0, squares = 0;
#pragma unroll
      for (int i = 0; i < Hold; ++i) sum += v[i][j];
      const float average = sum * (1 / kTaken);
#pragma unroll
      for (int i = 0; i < Hold; ++i) squares += (v[i][j] - average) * (v[i][j] - average);
      const float delta = average - mean[j];
      mean[j] += delta * share;
      m2[j] += squares + delta * delta * (count * share);
    }
    count += kTaken;
  }
};

// A block: one tile of pixels. All of it is measured from the tile's first pixel, so that a large
// common offset costs no digits.
template <typename T, int V>
__global__ void __launch_bounds__(kTileThreads, 3)
    channel_stats_kernel(Tiling t, Global<const T> x, Global<float> stats) {
  SharedMemory shared;
  const Smem<float> means = shared.take<float>(kTileThreads * V);
  const Smem<float> m2s = shared.take<float>(kTileThreads * V);
  const Stand<V> at(t, static_cast<int>(blockIdx.x));
  const Global<const T> tile = x + at.pixel(t) * t.channels;
  Moments<V> own;
  if (at.inside) {
    float first[V];
    load_floats<T>(tile + at.channel, first);
    for_pixels<8 / sizeof(T)>(at, [&]<int Hold>(int p) {
      float v[Hold][V];
#pragma unroll
      for (int i = 0; i < Hold; ++i)
        load_floats<T>(tile + int64_t{p + i * at.rows} * t.channels + at.channel, v[i]);
#pragma unroll
      for (int i = 0; i < Hold; ++i)
#pragma unroll
        for (int j = 0; j < V; ++j) v[i][j] -= first[j];
      own.add(v);
    });
  }
  const int slab = at.lanes * V;
  store_floats<float>(means + at.row * slab + at.lane * V, own.mean);
  store_floats<float>(m2s + at.row * slab + at.lane * V, own.m2);
  block_sync();
  // A thread per channel merges the rows, of which the first few may hold a pixel more.
  const auto pixels_of = [&](int row) {
    return static_cast<float>((at.count - row + at.rows - 1) >> at.row_bits);
  };
  const int rows = at.rows < at.count ? at.rows : at.count;
  for (int c = static_cast<int>(threadIdx.x); c < at.width(t); c += kTileThreads) {
    float mean = 0, m2 = 0;
    for (int r = 0; r < rows; ++r) mean += pixels_of(r) * means[r * slab + c];
    mean /= static_cast<float>(at.count);
    for (int r = 0; r < rows; ++r) {
      const float d = means[r * slab + c] - mean;
      m2 += m2s[r * slab + c] + pixels_of(r) * d * d;
    }
    const T first = tile[at.first_channel + c];
    const float pair[2] = {to_float(first) + mean, m2};
    const int64_t to = (int64_t{at.n} * t.runs + at.run) * t.channels + at.first_channel + c;
    store_floats<float>(stats + 2 * to, pair);
  }
}

// Rows of `stride` elements, of which the tiling's channels are summed; where a run's sums go.
struct Sums {
  int stride = 0;
  int64_t image_stride = 0, run_stride = 0;
  bool accumulate = false;
};

template <typename T, int V>
__global__ void __launch_bounds__(kTileThreads)
    column_sums_kernel(Tiling t, Sums s, Global<const T> x, Global<float> sums) {
  SharedMemory shared;
  const Smem<float> part = shared.take<float>(kTileThreads * V);
  const Stand<V> at(t, static_cast<int>(blockIdx.x));
  float sum[V] = {};
  if (at.inside) {
    const Global<const T> from = x + at.pixel(t) * s.stride + at.channel;
    for_pixels<4>(at, [&]<int Hold>(int p) {
      float v[Hold][V];
#pragma unroll
      for (int i = 0; i < Hold; ++i)
        load_floats<T>(from + int64_t{p + i * at.rows} * s.stride, v[i]);
#pragma unroll
      for (int i = 0; i < Hold; ++i)
#pragma unroll
        for (int j = 0; j < V; ++j) sum[j] += v[i][j];
    });
  }
  const int slab = at.lanes * V;
  store_floats<float>(part + at.row * slab + at.lane * V, sum);
  block_sync();
  for (int c = static_cast<int>(threadIdx.x); c < at.width(t); c += kTileThreads) {
    float all = 0;
    for (int r = 0; r < at.rows; ++r) all += part[r * slab + c];
    const int64_t to = at.n * s.image_stride + at.run * s.run_stride + at.first_channel + c;
    sums[to] = s.accumulate ? sums[to] + all : all;
  }
}

// sums (+)= the runs' sums, partial (images, runs, channels), 32 channels a block.
__global__ void merge_sums_kernel(int runs, int channels, Sums s, Global<const float> partial,
                                  Global<float> sums) {
  SharedMemory shared;
  const Smem<double> scratch = shared.take<double>(static_cast<int>(blockDim.x));
  const int slabs = (channels + 31) / 32;
  const int n = static_cast<int>(blockIdx.x) / slabs;
  const int c = static_cast<int>(blockIdx.x) % slabs * 32 + lane_id();
  const bool inside = c < channels;
  double sum = column_total(partial + int64_t{n} * runs * channels + (inside ? c : 0), channels,
                            runs, inside, scratch);
  if (warp_id() > 0 || !inside) return;
  const int64_t to = n * s.image_stride + c;
  if (s.accumulate) sum += static_cast<double>(sums[to]);
  sums[to] = static_cast<float>(sum);
}

void merge_sums(void* stream, int images, int runs, int channels, const Sums& s,
                const float* partial, float* sums) {
  const unsigned block = std::min(32 * ((runs + 3) / 4), 1024);
  launch<merge_sums_kernel>({.grid_x = static_cast<unsigned>(images * ((channels + 31) / 32)),
                             .block = block,
                             .shared = shared_bytes<double>(block)},
                            stream, runs, channels, s, partial, sums);
}

size_t sums_workspace(const Tiling& t) {
  return t.runs == 1 ? 0 : sizeof(float) * static_cast<size_t>(t.images) * t.runs * t.channels;
}

// sums[n * s.image_stride + c] (+)= the column sums of image n.
template <typename T, int V>
void launch_sums(const Tiling& t, const Sums& s, const Run& r, const T* x, float* sums) {
  const LaunchShape shape{
      .grid_x = t.blocks(), .block = kTileThreads, .shared = shared_bytes<float>(kTileThreads * V)};
  if (t.runs == 1) {
    launch<column_sums_kernel<T, V>>(shape, r.stream, t, s, x, sums);
    return;
  }
  float* partial = static_cast<float*>(r.workspace);
  const Sums runs{s.stride, int64_t{t.runs} * t.channels, t.channels, false};
  launch<column_sums_kernel<T, V>>(shape, r.stream, t, runs, x, partial);
  merge_sums(r.stream, t.images, t.runs, t.channels, s, partial, sums);
}

constexpr int kSumPixels = 8;  // of a thread

}  // namespace

void launch_merge_sums(void* stream, int images, int runs, int channels, const float* partial,
                       float* sums, int stride) {
  merge_sums(stream, images, runs, channels, {0, stride, 0, false}, partial, sums);
}

Call CudaBackend::channel_stats(const StatsDesc& d, In x, Out stats) {
  DDPM_CHECK(d.x.positive() && d.tile > 0, "channel_stats: x %s, tile %d", to_string(d.x).c_str(),
             d.tile);
  const auto call = [&]<typename T, int V>(T, std::integral_constant<int, V>) -> Call {
    const Tiling t(d.x.n, d.x.pixels(), d.x.c, V, 0, d.tile);
    const LaunchShape shape{.grid_x = t.blocks(),
                            .block = kTileThreads,
                            .shared = 2 * shared_bytes<float>(kTileThreads * V)};
    return {"channel_stats", {x}, {stats}, 0, [=](const Run& r) {
              launch<channel_stats_kernel<T, V>>(shape, r.stream, t, r.in<T>(x),
                                                 r.out<float>(stats));
            }};
  };
  return dispatch_width(type_, d.x.c % 8 == 0, call);
}

Call CudaBackend::pixel_sum(const Shape& x, In in, Out sums, int stride, int offset) {
  DDPM_CHECK(x.positive() && offset >= 0 && offset + x.c <= stride,
             "pixel_sum: x %s into columns %d.. of %d", to_string(x).c_str(), offset, stride);
  const auto call = [&]<typename T, int V>(T, std::integral_constant<int, V>) -> Call {
    const Tiling t(x.n, x.pixels(), x.c, V, kSumPixels, 0);
    const Sums s{x.c, stride, 0, false};
    return {"pixel_sum", {in}, {sums}, sums_workspace(t), [=](const Run& r) {
              launch_sums<T, V>(t, s, r, r.in<T>(in), r.out<float>(sums) + offset);
            }};
  };
  return dispatch_width(type_, x.c % 8 == 0, call);
}

Call CudaBackend::row_sum(int rows, int columns, int stride, int offset, DType type, In x, Out sums,
                          Write write) {
  DDPM_CHECK(type == DType::kF32 || type == DType::kBF16, "row_sum: %s", name_of(type));
  DDPM_CHECK(rows > 0 && columns > 0 && offset >= 0 && offset + columns <= stride,
             "row_sum: %d rows, columns %d..%d of %d", rows, offset, offset + columns, stride);
  const auto call = [&]<typename T, int V>(T, std::integral_constant<int, V>) -> Call {
    const Tiling t(1, rows, columns, V, kSumPixels, 0);
    const Sums s{stride, 0, 0, write == Write::kAccumulate};
    return {"row_sum", {x}, {sums}, sums_workspace(t), [=](const Run& r) {
              launch_sums<T, V>(t, s, r, r.in<T>(x) + offset, r.out<float>(sums));
            }};
  };
  return dispatch_width(type, columns % 8 == 0 && stride % 8 == 0 && offset % 8 == 0, call);
}

}  // namespace ddpm::cuda
