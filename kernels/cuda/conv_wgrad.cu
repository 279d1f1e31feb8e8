// The gradient by the filter on the tensor cores: for every tap, dy^T (k, pixels) times the input
// (pixels, c) as the forward pass saw it, whose transform is done again here.
//
// A block computes 128 output channels x 32 input channels x 9 taps (or x 128 x 1 tap) over a share
// of the pixel tiles: dy's tile and the input's halo lie in shared memory, both read by transposed
// ldmatrix, so a tap is again only an offset. The next tile is copied, and transformed by the
// threads that copied it, while the present one is multiplied. A warp has 64 x 8 channels of all
// taps, 144 sums a thread: fewer would make shared memory the limit (4 + 9 / 2 loads for 36
// products).
//
// Moves dy once per 32 input channels and the input once per 128 output channels (from L2, where
// neighbouring blocks meet), and the fp32 sums once per share. Limited by the tensor cores' rate.
#include <device/mma.h>

#include "kernels/cuda/conv_plan.h"

namespace ddpm::cuda {
namespace {

constexpr int kRows = 128;     // pixels of a tile
constexpr int kOutputs = 128;  // output channels of a block
constexpr int kOutputPitch = kOutputs + 8;
constexpr int kSumRows = 32;  // pixels that dy is summed over at a time

struct FilterProblem {
  ConvTiles tiles;
  ConvInput<bf16> in;
  Global<const bf16> dy = nullptr;
  int k = 0;
  int splits = 1;
  int across = 1;                   // blocks over the input channels
  Global<float> partial = nullptr;  // (splits, k, taps, c)
  Global<float> dy_sums = nullptr;  // (n, runs of kSumRows pixels, k); or nowhere
};

// A block's input channels are Across groups of 8 for each of four warps.
template <int Across>
constexpr int kInputs = 32 * Across;

// What a block has of a tile in shared memory.
struct TileParts {
  Smem<bf16> x, dy;
  Smem<int> pixels;  // of each piece of x, for the thread that copied it
  Smem<int> places;  // of the halo
};

template <int Across, bool Aligned>
__device__ __forceinline__ void copy_tile(const FilterProblem& a, const Tile& tile, int k0, int c0,
                                          const TileParts& to) {
  constexpr int kUnits = kInputs<Across> / 8, kPitch = kInputs<Across> + 8;
  const int thread = static_cast<int>(threadIdx.x);
#pragma unroll 1  // more would cost registers
  for (int i = thread; i < a.tiles.halo() * kUnits; i += kConvThreads) {
    const int pixel = halo_pixel(a.tiles, tile, to.places[i / kUnits]), unit = i % kUnits * 8;
    to.pixels[i] = pixel;
    copy_input<Aligned>(a.in, pixel, c0 + unit, to.x + (i / kUnits * kPitch + unit));
  }
#pragma unroll 4
  for (int i = thread; i < kRows * (kOutputs / 8); i += kConvThreads) {
    const int m = i / (kOutputs / 8), unit = i % (kOutputs / 8) * 8;
    const bool valid = m < tile.rows;
    const int64_t row = valid ? output_pixel(a.tiles, tile, m) * a.k + k0 + unit : 0;
    copy_run<Aligned>(to.dy + (m * kOutputPitch + unit), a.dy + row, valid ? a.k - k0 - unit : 0);
  }
  copy_async_commit();
}

// The thread's own pieces from `first` on, every `step`-th.
template <int Across>
__device__ __forceinline__ void transform_tile(const FilterProblem& a, int n, int c0,
                                               const TileParts& at, int first, int step) {
  constexpr int kUnits = kInputs<Across> / 8, kPitch = kInputs<Across> + 8;
  for (int i = static_cast<int>(threadIdx.x) + first * kConvThreads; i < a.tiles.halo() * kUnits;
       i += step * kConvThreads) {
    const int unit = i % kUnits * 8;
    transform_copied(a.in, n, at.pixels[i], c0 + unit, at.x + (i / kUnits * kPitch + unit));
  }
}

// The sums of dy over kSumRows pixels from row m on, as a product with ones on fragments that are
// there already: each of the four warps that have the same rows takes 16 channels.
__device__ __forceinline__ void sum_dy(const FilterProblem& a, const Tile& tile, int m, int k,
                                       const uint32_t (&fa)[2][4][4]) {
  constexpr uint32_t kOnes = 0x3F803F80;
  const int part = warp_id() % 4;
  float v[4] = {};
#pragma unroll
  for (int i = 0; i < 4; ++i)
#pragma unroll
    for (int step = 0; step < 2; ++step)
      if (i == part) mma_16816(v, fa[step][i], {kOnes, kOnes});
  if (lane_id() % 4 > 0) return;  // all columns are equal
  k += part * 16 + lane_id() / 4;
  const auto to = a.dy_sums + output_pixel(a.tiles, tile, m) / kSumRows * a.k;
  if (k < a.k) to[k] = v[0];
  if (k + 8 < a.k) to[k + 8] = v[2];
}

// sums += dy^T x over 32 pixels from row m on; `k` and `c` are the warp's first channels.
template <int Taps, int Across>
__device__ __forceinline__ void multiply(const FilterProblem& a, const Tile& tile,
                                         const TileParts& at, int m, int k0, int k, int c,
                                         bool summed, float (&sums)[4][Taps][Across][4]) {
  const ConvTiles& t = a.tiles;
  constexpr int kPitch = kInputs<Across> + 8;
  const int lane = lane_id();
  uint32_t fa[2][4][4];
#pragma unroll
  for (int step = 0; step < 2; ++step)
#pragma unroll
    for (int i = 0; i < 4; ++i)
      ldmatrix_x4_transposed(
          fa[step][i], at.dy + ((m + step * 16 + lane / 16 * 8 + lane % 8) * kOutputPitch + k +
                                i * 16 + lane / 8 % 2 * 8));
  if (summed) sum_dy(a, tile, m, k0 + k, fa);
  const Smem<bf16> x = at.x + (halo_of(t, tile, m + lane) * kPitch + c);
#pragma unroll
  for (int tap = 0; tap < Taps; ++tap)
#pragma unroll
    for (int n = 0; n < Across; ++n) {
      uint32_t fb[4];
      ldmatrix_x4_transposed(fb, x + ((tap / 3 * t.halo_w + tap % 3) * kPitch + n * 8));
#pragma unroll
      for (int step = 0; step < 2; ++step)
#pragma unroll
        for (int i = 0; i < 4; ++i)
          mma_16816(sums[i][tap][n], fa[step][i], {fb[step * 2], fb[step * 2 + 1]});
    }
}

// This lane's sums to its split's share of the filter.
template <int Taps, int Across>
__device__ __forceinline__ void write_sums(const FilterProblem& a, int k0, int c0,
                                           const float (&sums)[4][Taps][Across][4]) {
  const int channels = a.in.channels(), lane = lane_id();
  const auto to = a.partial + static_cast<int64_t>(blockIdx.y) * a.k * Taps * channels;
#pragma unroll
  for (int i = 0; i < 4; ++i)
#pragma unroll
    for (int tap = 0; tap < Taps; ++tap)
#pragma unroll
      for (int n = 0; n < Across; ++n)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int k = k0 + i * 16 + half * 8 + lane / 4, c = c0 + n * 8 + lane % 4 * 2;
          if (k >= a.k || c >= channels) continue;
          const int64_t index = (int64_t{k} * Taps + tap) * channels + c;
          const float pair[2] = {sums[i][tap][n][half * 2], sums[i][tap][n][half * 2 + 1]};
          if (channels % 2 == 0) {
            store_floats<float>(to + index, pair);
          } else {
            to[index] = pair[0];
            if (c + 1 < channels) to[index + 1] = pair[1];
          }
        }
}

// Aligned: all channel counts are multiples of 8; else no transform, and pieces come by scalars.
template <int Taps, int Across, bool Aligned>
__global__ void __launch_bounds__(kConvThreads, 1) conv_wgrad_kernel(const FilterProblem a) {
  constexpr int kUnits = kInputs<Across> / 8, kPitch = kInputs<Across> + 8;
  const ConvTiles& t = a.tiles;
  SharedMemory shared;
  const Smem<bf16> x = shared.take<bf16>(2 * t.halo() * kPitch);
  const Smem<bf16> dy = shared.take<bf16>(2 * kRows * kOutputPitch);
  const Smem<int> pixels = shared.take<int>(2 * t.halo() * kUnits);
  const Smem<int> places = shared.take<int>(t.halo());
  for (int i = static_cast<int>(threadIdx.x); i < t.halo(); i += kConvThreads)
    places[i] = halo_place(t, i);
  block_sync();
  const auto parts = [&](int buffer) {
    return TileParts{x + buffer * (t.halo() * kPitch), dy + buffer * (kRows * kOutputPitch),
                     pixels + buffer * (t.halo() * kUnits), places};
  };

  const int index = static_cast<int>(blockIdx.x), down = index / a.across;
  const int k0 = down * kOutputs, c0 = (index - down * a.across) * kInputs<Across>;
  const int64_t split = blockIdx.y;
  const int first = static_cast<int>(split * t.count / a.splits);
  const int end = static_cast<int>((split + 1) * t.count / a.splits);
  const int k = warp_id() / 4 * 64, c = warp_id() % 4 * (8 * Across);
  const bool active = k0 + k < a.k && c0 + c < a.in.channels();
  const bool transforms = Aligned && a.in.transforms();
  float sums[4][Taps][Across][4] = {};
  // The blocks of the first input channels sum dy as well.
  const bool summed = Aligned && a.dy_sums != nullptr && c0 == 0;

  Tile tile = find_tile(t, first);
  copy_tile<Across, Aligned>(a, tile, k0, c0, parts(0));
  copy_async_wait<0>();
  if (transforms) transform_tile<Across>(a, only_image(t, tile), c0, parts(0), 0, 1);
  for (int i = first; i < end; ++i) {
    block_sync();
    const TileParts now = parts((i - first) & 1), next = parts((i - first + 1) & 1);
    const Tile next_tile = find_tile(t, i + 1 < end ? i + 1 : i);
    if (i + 1 < end) copy_tile<Across, Aligned>(a, next_tile, k0, c0, next);
#pragma unroll 1
    for (int step = 0; step < 4; ++step) {
      if (i + 1 < end && step >= 2) {
        copy_async_wait<0>();
        if (a.in.transforms())
          transform_tile<Across>(a, only_image(t, next_tile), c0, next, step - 2, 2);
      }
      if (active && step * 32 < tile.rows)
        multiply<Taps, Across>(a, tile, now, step * 32, k0, k, c, summed, sums);
    }
    tile = next_tile;
  }
  if (active) write_sums<Taps, Across>(a, k0 + k, c0 + c, sums);
}

// ---- host ----

template <int Across>
size_t shared_of(const ConvTiles& t) {
  const size_t halo = 2 * static_cast<size_t>(t.halo());
  return shared_bytes<bf16>(halo * (kInputs<Across> + 8)) +
         shared_bytes<bf16>(size_t{2} * kRows * kOutputPitch) +
         shared_bytes<int>(halo * kInputs<Across> / 8) + shared_bytes<int>(halo / 2);
}

// Runs of dy's sums lie within an image and a tile; four warps of input channels are busy.
template <int Across>
bool can_sum(const ConvDesc& d, const ConvTiles& t) {
  return d.c() >= kInputs<Across> && t.pixels() % kSumRows == 0 && t.rows % kSumRows == 0;
}

template <int Taps, int Across, bool Aligned>
ConvPlan plan_wgrad(size_t shared_bytes, const ConvDesc& d, const ConvSlots& s, In dy, Out dfilter,
                    Write write, const GradientSums& to) {
  constexpr int kBlocksWanted = 132;  // one on each multiprocessor
  ConvTiles tiles;
  LaunchShape probe;
  const auto fits = [&] {
    return probe.shared <= shared_bytes && tiles.halo_h <= kMaxHaloSide &&
           tiles.halo_w <= kMaxHaloSide;
  };
  // A halo that is too large shrinks with its tile.
  for (int rows = kRows; rows >= 16; rows /= 2) {
    tiles = forward_tiles(d, rows);
    probe.shared = shared_of<Across>(tiles);
    if (fits()) break;
  }
  if (!fits()) return {};
  const bool sums_dy = static_cast<bool>(to.slot);
  if (sums_dy && !can_sum<Across>(d, tiles)) return {};
  const int runs = static_cast<int>(d.y().pixels() / kSumRows);
  const int across = (d.c() + kInputs<Across> - 1) / kInputs<Across>;
  const int blocks = across * ((d.k + kOutputs - 1) / kOutputs);
  int splits = kBlocksWanted / blocks;
  if (splits > tiles.count) splits = tiles.count;
  if (splits < 1) splits = 1;
  const int64_t count = d.filter().count();
  const bool direct = splits == 1 && write == Write::kOverwrite;
  const size_t filters = direct ? 0 : static_cast<size_t>(splits) * static_cast<size_t>(count);
  const size_t rows = sums_dy ? static_cast<size_t>(d.x.n) * static_cast<size_t>(runs) : 0;
  return {(filters + rows * static_cast<size_t>(d.k)) * sizeof(float), [=](const Run& r) {
            FilterProblem a;
            a.tiles = tiles;
            a.in = make_input<bf16>(d, s, r);
            a.dy = r.in<bf16>(dy);
            a.k = d.k;
            a.splits = splits;
            a.across = across;
            float* const sums = direct ? r.out<float>(dfilter) : static_cast<float*>(r.workspace);
            a.partial = sums;
            float* const partial = static_cast<float*>(r.workspace) + filters;
            if (sums_dy) a.dy_sums = partial;
            launch<conv_wgrad_kernel<Taps, Across, Aligned>>(
                {.grid_x = static_cast<unsigned>(blocks),
                 .grid_y = static_cast<unsigned>(splits),
                 .block = kConvThreads,
                 .shared = probe.shared},
                r.stream, a);
            if (!direct)
              launch_filter_sum(r.stream, sums, r.out<float>(dfilter), count, splits, write);
            if (sums_dy)
              launch_merge_sums(r.stream, d.x.n, runs, d.k, partial,
                                r.out<float>(to.slot) + to.offset, to.stride);
          }};
}

}  // namespace

ConvPlan tensor_wgrad(size_t shared_bytes, const ConvDesc& d, const ConvSlots& s, In dy,
                      Out dfilter, Write write, const GradientSums& sums) {
  const bool aligned = d.x.c % 8 == 0 && d.c2 % 8 == 0 && d.k % 8 == 0;
  if (!aligned && (d.c2 > 0 || d.transform.any())) return {};
  if (!aligned && sums.slot) return {};
  if (d.r == 3 && d.s == 3)
    return aligned ? plan_wgrad<9, 1, true>(shared_bytes, d, s, dy, dfilter, write, sums)
                   : plan_wgrad<9, 1, false>(shared_bytes, d, s, dy, dfilter, write, sums);
  if (d.r == 1 && d.s == 1 && aligned)
    return plan_wgrad<1, 4, true>(shared_bytes, d, s, dy, dfilter, write, sums);
  return {};
}

}  // namespace ddpm::cuda
