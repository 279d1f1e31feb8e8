// Sums over pixels and rows, and the statistics group norm reads. Every sum is cut into tiles of a
// fixed number of pixels or rows and the tiles are added in order, so no bit depends on threads.
#include <algorithm>
#include <vector>

#include "kernels/cpu/cpu_backend.h"
#include "kernels/cpu/parallel.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/reduce.cpp"
#include <hwy/foreach_target.h>

#include "kernels/cpu/simd-inl.h"

HWY_BEFORE_NAMESPACE();
namespace ddpm::cpu::HWY_NAMESPACE {

// Vectors of channels that are summed side by side: enough to hide the latency of an addition, few
// enough that a tile of them stays in the L1 cache between two passes.
constexpr int kBlock = 4;

HWY_INLINE HWY_ATTR void store_pairs(Float first, Float second, float* p, int64_t remaining) {
  const FloatTag d;
  if (remaining >= lanes()) {
    hn::StoreInterleaved2(first, second, d, p);
    return;
  }
  HWY_ALIGN float pairs[2 * hn::MaxLanes(FloatTag())];
  hn::StoreInterleaved2(first, second, d, pairs);
  std::copy(pairs, pairs + 2 * remaining, p);
}

// Mean and M2 of up to `Blocks` vectors of channels over `pixels` rows of `stride` floats. Sums are
// of the deviation from the first pixel: a large common offset costs the mean no digits.
template <int Blocks>
HWY_INLINE HWY_ATTR void tile_stats(const float* x, int64_t stride, int64_t pixels,
                                    int64_t channels, float* stats) {
  const FloatTag d;
  const int64_t step = lanes();
  Float first[Blocks], mean[Blocks], m2[Blocks];
  for (int b = 0; b < Blocks; ++b) {
    first[b] = load(x + b * step, channels - b * step);
    mean[b] = m2[b] = hn::Zero(d);
  }
  for (int64_t p = 1; p < pixels; ++p)
    for (int b = 0; b < Blocks; ++b)
      mean[b] =
          hn::Add(mean[b], hn::Sub(load(x + p * stride + b * step, channels - b * step), first[b]));
  const Float scale = hn::Set(d, 1.0f / static_cast<float>(pixels));
  for (int b = 0; b < Blocks; ++b) mean[b] = hn::MulAdd(mean[b], scale, first[b]);
  for (int64_t p = 0; p < pixels; ++p)
    for (int b = 0; b < Blocks; ++b) {
      const Float v = hn::Sub(load(x + p * stride + b * step, channels - b * step), mean[b]);
      m2[b] = hn::MulAdd(v, v, m2[b]);
    }
  for (int b = 0; b < Blocks; ++b)
    store_pairs(mean[b], m2[b], stats + 2 * b * step, channels - b * step);
}

// stats (channels, 2) of one tile of x (pixels, channels).
void tile_stats_loop(const float* x, int64_t pixels, int64_t channels, float* stats) {
  int64_t c = 0;
  for (; c + kBlock * lanes() <= channels; c += kBlock * lanes())
    tile_stats<kBlock>(x + c, channels, pixels, channels - c, stats + 2 * c);
  for (; c < channels; c += lanes())
    tile_stats<1>(x + c, channels, pixels, channels - c, stats + 2 * c);
}

template <int Blocks>
HWY_INLINE HWY_ATTR void sum_rows(const float* x, int64_t stride, int64_t rows, int64_t columns,
                                  float* sums) {
  const int64_t step = lanes();
  Float sum[Blocks];
  for (int b = 0; b < Blocks; ++b) sum[b] = load(x + b * step, columns - b * step);
  for (int64_t r = 1; r < rows; ++r)
    for (int b = 0; b < Blocks; ++b)
      sum[b] = hn::Add(sum[b], load(x + r * stride + b * step, columns - b * step));
  for (int b = 0; b < Blocks; ++b) store(sum[b], sums + b * step, columns - b * step);
}

// sums (columns) over `rows` rows of `stride` floats.
void sum_rows_loop(const float* x, int64_t stride, int64_t rows, int64_t columns, float* sums) {
  int64_t c = 0;
  for (; c + kBlock * lanes() <= columns; c += kBlock * lanes())
    sum_rows<kBlock>(x + c, stride, rows, columns - c, sums + c);
  for (; c < columns; c += lanes()) sum_rows<1>(x + c, stride, rows, columns - c, sums + c);
}

}  // namespace ddpm::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace ddpm::cpu {

HWY_EXPORT(tile_stats_loop);
HWY_EXPORT(sum_rows_loop);

Call CpuBackend::channel_stats(const StatsDesc& d, In x, Out stats) {
  if (!d.x.positive() || d.tile <= 0)
    fail(Status::kBug, "channel_stats: x %s, tile %d", to_string(d.x).c_str(), d.tile);
  return {"channel_stats", {x}, {stats}, 0, [=, threads = threads_](const Run& r) {
            const int64_t tiles = d.tiles(), pixels = d.x.pixels(), c = d.x.c;
            const auto body = [&](int64_t begin, int64_t end) {
              for (int64_t i = begin; i < end; ++i) {
                const int64_t first = i % tiles * d.tile;
                HWY_DYNAMIC_DISPATCH(tile_stats_loop)
                (r.in<float>(x) + (i / tiles * pixels + first) * c,
                 std::min<int64_t>(d.tile, pixels - first), c, r.out<float>(stats) + i * c * 2);
              }
            };
            parallel_for(threads_for(threads, d.x.count()), d.x.n * tiles, body);
          }};
}

namespace {

constexpr int64_t kTile = 128;  // rows of one partial sum

// `batch` matrices (rows, columns) of row stride `stride`, one after the other, and where each
// one's column sums go: sums[b * sums_stride + c].
struct Sums {
  int64_t batch = 1, rows = 0, columns = 0, stride = 0, sums_stride = 0;
  bool accumulate = false;

  int64_t tiles() const { return (rows + kTile - 1) / kTile; }
  size_t workspace() const {
    return sizeof(float) * static_cast<size_t>(batch * tiles() * columns);
  }
};

// partial (batch, tiles, columns) is the workspace.
void column_sums(const Sums& s, int threads, const float* x, float* partial, float* sums) {
  const int64_t tiles = s.tiles();
  threads = threads_for(threads, s.batch * s.rows * s.columns);
  parallel_for(threads, s.batch * tiles, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = i % tiles * kTile;
      HWY_DYNAMIC_DISPATCH(sum_rows_loop)
      (x + (i / tiles * s.rows + first) * s.stride, s.stride, std::min(kTile, s.rows - first),
       s.columns, partial + i * s.columns);
    }
  });
  parallel_elements(threads, s.batch * s.columns, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin / s.columns; b * s.columns < end; ++b) {
      const int64_t first = std::max(begin - b * s.columns, int64_t{0});
      const int64_t last = std::min(end - b * s.columns, s.columns);
      for (int64_t c = first; c < last; ++c) {
        float& to = sums[b * s.sums_stride + c];
        double sum = s.accumulate ? to : 0;
        for (int64_t t = 0; t < tiles; ++t) sum += partial[(b * tiles + t) * s.columns + c];
        to = static_cast<float>(sum);
      }
    }
  });
}

}  // namespace

Call CpuBackend::pixel_sum(const Shape& x, In in, Out sums, int stride, int offset) {
  if (!x.positive() || offset < 0 || offset + x.c > stride)
    fail(Status::kBug, "pixel_sum: x %s into columns %d.. of %d", to_string(x).c_str(), offset,
         stride);
  const Sums s{x.n, x.pixels(), x.c, x.c, stride};
  return {"pixel_sum", {in}, {sums}, s.workspace(), [=, threads = threads_](const Run& r) {
            column_sums(s, threads, r.in<float>(in), static_cast<float*>(r.workspace),
                        r.out<float>(sums) + offset);
          }};
}

Call CpuBackend::row_sum(int rows, int columns, int stride, int offset, DType type, In x, Out sums,
                         Write write) {
  DDPM_CHECK(type == DType::kF32, "row_sum: %s", name_of(type));
  if (rows <= 0 || columns <= 0 || offset < 0 || offset + columns > stride)
    fail(Status::kBug, "row_sum: %d rows, columns %d..%d of %d", rows, offset, offset + columns,
         stride);
  const Sums s{1, rows, columns, stride, columns, write == Write::kAccumulate};
  return {"row_sum", {x}, {sums}, s.workspace(), [=, threads = threads_](const Run& r) {
            column_sums(s, threads, r.in<float>(x) + offset, static_cast<float*>(r.workspace),
                        r.out<float>(sums));
          }};
}

}  // namespace ddpm::cpu
#endif
