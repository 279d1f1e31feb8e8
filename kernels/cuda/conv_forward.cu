// Convolution and its gradient by the input on the tensor cores (mma.m16n8k16, bf16, fp32 sums).
//
// A block computes 128 pixels x Columns channels. Input channels come 32 at a time: the tile's halo
// by cp.async into one of two buffers, where the thread that copied a piece also transforms it
// (scale and shift, SiLU, dropout: once per halo element and block, not per tap) while the taps of
// the chunk before are multiplied. A tap is then only another offset into the halo: every row that
// ldmatrix reads is one pixel's 16 bytes. Filters come tap by tap through a ring of three. Rows are
// padded by 16 bytes, so that eight consecutive pixels lie in different banks.
//
// Moves x once per Columns output channels (neighbouring blocks share it in L2), the filter once
// per tile from L2, y once. Limited by the tensor cores' rate for mma, at 8x8 and 4x4 by the number
// of blocks: there the input channels are split over blocks, whose sums are added in order by a
// second kernel.
#include <device/mma.h>

#include "kernels/cuda/conv_plan.h"

namespace ddpm::cuda {
namespace {

constexpr int kChunk = 32, kPitch = kChunk + 8;  // channels of a chunk, elements of a row
constexpr int kUnits = kChunk / 8;               // 16-byte pieces
constexpr int kRows = 128, kStages = 3;

// All a block needs to know.
struct ConvProblem {
  ConvTiles tiles;
  ConvInput<bf16> in, shortcut;
  Global<const bf16> filter = nullptr, shortcut_filter = nullptr;
  ConvOutput<bf16> out;
  Global<float> partial = nullptr;  // (splits, tiles * 128, blocks * Columns)
  int splits = 1;
  int blocks = 1;   // over output channels
  int buffers = 2;  // of halo
};

constexpr int filter_stage(bool gradient, int columns) {
  return gradient ? kChunk * (columns + 8) : columns * kPitch;
}

// Copies chunk c0.. of a tap of the filter (outer, taps, inner). Forward: rows are output channels,
// so columns of the sum; for the gradient rows are summed over, and taps are turned round.
template <bool Gradient, int Columns, bool Aligned>
class FilterCopy {
 public:
  __device__ FilterCopy(const Global<const bf16>& filter, int in_channels, int out_channels,
                        int taps, int k0)
      : filter_(filter), taps_(taps), inner_(Gradient ? out_channels : in_channels) {
    const int row = static_cast<int>(threadIdx.x) / kPieces;
    const int piece = static_cast<int>(threadIdx.x) % kPieces * 8;
    from_ = Gradient ? (row * taps + taps - 1) * inner_ + k0 + piece
                     : (k0 + row) * taps * inner_ + piece;
    to_ = row * kRowPitch + piece;
    rows_ = (Gradient ? in_channels : out_channels - k0) - row;
    left_ = (Gradient ? out_channels - k0 : in_channels) - piece;
  }

  __device__ __forceinline__ void operator()(int tap, int c0, const Smem<bf16>& to) const {
    const int at = from_ + (Gradient ? (c0 * taps_ - tap) * inner_ : tap * inner_ + c0);
    const int jump = kRowsAtOnce * taps_ * inner_;
    const int rows = Gradient ? rows_ - c0 : rows_, left = Gradient ? left_ : left_ - c0;
#pragma unroll
    for (int j = 0; j < kCount; ++j)
      copy_run<Aligned>(to + (to_ + j * kRowsAtOnce * kRowPitch), filter_ + (at + j * jump),
                        j * kRowsAtOnce < rows ? left : 0);
  }

 private:
  static constexpr int kPieces = Gradient ? Columns / 8 : kUnits;  // of a row
  static constexpr int kRowPitch = Gradient ? Columns + 8 : kPitch;
  static constexpr int kRowsAtOnce = kConvThreads / kPieces;
  static constexpr int kCount = Columns * kUnits / kConvThreads;

  Global<const bf16> filter_;
  int taps_, inner_;
  int from_ = 0, to_ = 0;    // where the thread's first piece of tap 0 and channel 0 is, and goes
  int rows_ = 0, left_ = 0;  // rows from there on, elements of the row from there on
};

template <bool Aligned>
__device__ __forceinline__ void copy_halo(const ConvProblem& a, const Smem<int>& pixels, int c0,
                                          const Smem<bf16>& to) {
  const int count = a.tiles.halo() * kUnits;
#pragma unroll 2  // more would cost registers
  for (int i = static_cast<int>(threadIdx.x); i < count; i += kConvThreads) {
    const int unit = i % kUnits * 8;
    copy_input<Aligned>(a.in, pixels[i / kUnits], c0 + unit, to + (i / kUnits * kPitch + unit));
  }
}

// The thread's own pieces first, first + 1, .. before `last`.
__device__ __forceinline__ void transform_halo(const ConvProblem& a, int n, const Smem<int>& pixels,
                                               int c0, const Smem<bf16>& halo, int first,
                                               int last) {
  const int count = a.tiles.halo() * kUnits;
#pragma unroll 1
  for (int j = first; j < last; ++j) {
    const int i = static_cast<int>(threadIdx.x) + j * kConvThreads, unit = i % kUnits * 8;
    if (i >= count) return;
    transform_copied(a.in, n, pixels[i / kUnits], c0 + unit, halo + (i / kUnits * kPitch + unit));
  }
}

// Rows of the shortcut's input.
__device__ __forceinline__ void copy_rows(const ConvProblem& a, const Tile& tile, int c0,
                                          const Smem<bf16>& to) {
#pragma unroll
  for (int j = 0; j < kRows * kUnits / kConvThreads; ++j) {
    const int i = static_cast<int>(threadIdx.x) + j * kConvThreads;
    const int m = i / kUnits, unit = i % kUnits * 8;
    const int pixel = m < tile.rows ? static_cast<int>(output_pixel(a.tiles, tile, m)) : -1;
    copy_input<true>(a.shortcut, pixel, c0 + unit, to + (m * kPitch + unit));
  }
}

// Warps stand over the tile as (8 / (Columns / 32)) x (Columns / 32); each has 32 columns.
template <int Columns>
struct WarpTile {
  static constexpr int kAcross = Columns / 32, kDown = 8 / kAcross;
  static constexpr int kM = kRows / kDown / 16;  // mma tiles down; four across
  int row, column;
  __device__ WarpTile() : row(warp_id() / kAcross * (kM * 16)), column(warp_id() % kAcross * 32) {}
};

// sums += a (rows, 32) b (32, columns). rows: where this lane's row of each mma tile begins.
template <bool Gradient, int Columns, int M>
__device__ __forceinline__ void multiply(const Smem<bf16>& a, const int (&rows)[M],
                                         const Smem<bf16>& b, int column, float (&sums)[M][4][4]) {
  const int lane = lane_id();
#pragma unroll
  for (int step = 0; step < kChunk; step += 16) {
    uint32_t fa[M][4], fb[2][4];
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      if constexpr (Gradient)
        ldmatrix_x4_transposed(
            fb[j], b + ((step + lane % 16) * (Columns + 8) + column + j * 16 + lane / 16 * 8));
      else
        ldmatrix_x4(fb[j], b + ((column + j * 16 + lane / 16 * 8 + lane % 8) * kPitch + step +
                                lane / 8 % 2 * 8));
    }
#pragma unroll
    for (int i = 0; i < M; ++i) ldmatrix_x4(fa[i], a + (rows[i] + step));
#pragma unroll
    for (int i = 0; i < M; ++i)
#pragma unroll
      for (int j = 0; j < 4; ++j)
        mma_16816(sums[i][j], fa[i], {fb[j / 2][j % 2 * 2], fb[j / 2][j % 2 * 2 + 1]});
  }
}

// f(row, column, sum, sum of the next column) of each pair that this lane holds.
template <int M, typename F>
__device__ __forceinline__ void for_sums(int row, int column, const float (&sums)[M][4][4], F f) {
  const int lane = lane_id();
#pragma unroll
  for (int i = 0; i < M; ++i)
#pragma unroll
    for (int j = 0; j < 4; ++j)
#pragma unroll
      for (int half = 0; half < 2; ++half)
        f(row + i * 16 + half * 8 + lane / 4, column + j * 8 + lane % 4 * 2,
          {sums[i][j][half * 2], sums[i][j][half * 2 + 1]});
}

// Where the block stands in the list of (chunk, tap) that it sums over: chunks of the input with
// all taps, then chunks of the shortcut with one.
struct Cursor {
  int chunk, tap, shortcut, stage;

  __device__ __forceinline__ void advance(int taps, int end) {
    stage = stage == kStages - 1 ? 0 : stage + 1;
    if (chunk == end) {
      ++shortcut;
    } else if (++tap == taps) {
      tap = 0;
      ++chunk;
    }
  }
};

__device__ __forceinline__ int part(int count, int parts, int index) {
  return static_cast<int>(int64_t{count} * index / parts);
}
constexpr __host__ __device__ int chunks_of(int channels) {
  return (channels + kChunk - 1) / kChunk;
}

// Aligned: all channel counts are multiples of 8; else nothing but taps, and pieces come by
// scalars.
template <bool Gradient, int Columns, bool Aligned>
__global__ void __launch_bounds__(kConvThreads, 2) conv_kernel(const ConvProblem a) {
  constexpr int kFilterStage = filter_stage(Gradient, Columns);
  const ConvTiles& t = a.tiles;
  const int taps = t.taps(), channels = a.in.channels(), more = a.shortcut.channels();
  SharedMemory shared;
  const int halo_size = t.halo() * kPitch;
  const Smem<bf16> halo = shared.take<bf16>(a.buffers * halo_size);
  const Smem<bf16> filters = shared.take<bf16>(kStages * kFilterStage);
  const Smem<bf16> rows = shared.take<bf16>(more > 0 ? kStages * kRows * kPitch : 0);
  const Smem<int> pixels = shared.take<int>(t.halo());

  const int index = static_cast<int>(blockIdx.x), split = static_cast<int>(blockIdx.y);
  const int tile_index = index / a.blocks, k0 = (index - tile_index * a.blocks) * Columns;
  const Tile tile = find_tile(t, tile_index);
  for (int i = static_cast<int>(threadIdx.x); i < t.halo(); i += kConvThreads)
    pixels[i] = halo_pixel(t, tile, i);
  block_sync();

  const int first = part(chunks_of(channels), a.splits, split);
  const int end = part(chunks_of(channels), a.splits, split + 1);
  const int more_first = part(chunks_of(more), a.splits, split);
  const int more_end = part(chunks_of(more), a.splits, split + 1);
  const int steps = (end - first) * taps + more_end - more_first;

  const FilterCopy<Gradient, Columns, Aligned> copy_filter(a.filter, channels, a.out.k, taps, k0);
  Cursor load{first, 0, more_first, 0};
  const auto copy_step = [&](int step) {
    if (step < steps) {
      const Smem<bf16> to = filters + load.stage * kFilterStage;
      if (load.chunk < end) {
        copy_filter(load.tap, load.chunk * kChunk, to);
      } else if constexpr (!Gradient && Aligned) {
        FilterCopy<false, Columns, true>(a.shortcut_filter, more, a.out.k, 1, k0)(
            0, load.shortcut * kChunk, to);
        copy_rows(a, tile, load.shortcut * kChunk, rows + load.stage * (kRows * kPitch));
      }
      load.advance(taps, end);
    }
    copy_async_commit();
  };
  const auto halo_of_chunk = [&](int chunk) {
    return halo + ((chunk - first) & (a.buffers - 1)) * halo_size;
  };
  const int pieces = (t.halo() * kUnits + kConvThreads - 1) / kConvThreads;

  // A chunk's halo is under way from `buffers - 1` chunks before it on, and has come two steps
  // later.
  for (int i = first; i < end && i < first + a.buffers - 1; ++i)
    copy_halo<Aligned>(a, pixels, i * kChunk, halo_of_chunk(i));
  copy_step(0);
  copy_step(1);
  const bool transforms = !Gradient && Aligned && a.in.transforms();
  if (transforms && first < end) {
    copy_async_wait<1>();
    transform_halo(a, only_image(t, tile), pixels, first * kChunk, halo_of_chunk(first), 0, pieces);
  }

  const WarpTile<Columns> warp;
  constexpr int kM = WarpTile<Columns>::kM;
  const bool active = warp.row < tile.rows && k0 + warp.column < a.out.k;
  const int lane_row = lane_id() % 16, lane_column = lane_id() / 16 * 8;
  int at[kM];  // of this lane's rows, in a halo or in the shortcut's rows
#pragma unroll
  for (int i = 0; i < kM; ++i)
    at[i] = halo_of(t, tile, warp.row + i * 16 + lane_row) * kPitch + lane_column;
  float sums[kM][4][4] = {};

  Cursor now{first, 0, more_first, 0};
  int tap_column = 0, tap_offset = 0;  // offset: halo pixels from tap (0,0)
  for (int step = 0; step < steps; ++step) {
    copy_async_wait<1>();
    block_sync();
    const bool main = now.chunk < end;
    if (main && now.tap == 0 && now.chunk + a.buffers - 1 < end)
      copy_halo<Aligned>(a, pixels, (now.chunk + a.buffers - 1) * kChunk,
                         halo_of_chunk(now.chunk + a.buffers - 1));
    copy_step(step + 2);
    if (transforms && main && now.chunk + 1 < end) {
      const int from = taps < 3 ? taps - 1 : 2;  // the step by which the next chunk has come
      if (now.tap >= from)
        transform_halo(a, only_image(t, tile), pixels, (now.chunk + 1) * kChunk,
                       halo_of_chunk(now.chunk + 1), now.tap - from,
                       now.tap == taps - 1 ? pieces : now.tap - from + 1);
    }
    if (!Gradient && now.chunk == end && now.shortcut == more_first) {
#pragma unroll
      for (int i = 0; i < kM; ++i) at[i] = (warp.row + i * 16 + lane_row) * kPitch + lane_column;
    }
    if (active) {
      const Smem<bf16> from = main ? halo_of_chunk(now.chunk) + tap_offset * kPitch
                                   : rows + now.stage * (kRows * kPitch);
      multiply<Gradient, Columns, kM>(from, at, filters + now.stage * kFilterStage, warp.column,
                                      sums);
    }
    ++tap_offset;
    if (++tap_column == t.s) {
      tap_column = 0;
      tap_offset = now.tap == taps - 1 ? 0 : tap_offset + t.halo_w - t.s;
    }
    now.advance(taps, end);
  }
  copy_async_wait<0>();

  if (a.splits > 1) {
    const int pitch = a.blocks * Columns;
    const auto to = a.partial + ((int64_t{split} * t.count + tile_index) * kRows * pitch + k0);
    if (active)
      for_sums(warp.row, warp.column, sums, [&](int m, int k, const float(&pair)[2]) {
        store_floats<float>(to + (int64_t{m} * pitch + k), pair);
      });
    return;
  }
  block_sync();
  SharedMemory again;
  const Smem<float> staged = again.take<float>(kRows * sums_pitch(Columns));
  if (active)
    for_sums(warp.row, warp.column, sums, [&](int m, int k, const float(&pair)[2]) {
      store_floats<float>(staged + (m * sums_pitch(Columns) + k), pair);
    });
  block_sync();
  finish_tile<bf16, Columns>(a.out, t, tile, k0, staged);
}

// The sum over splits of 128 pixels x 32 channels, and what follows it.
constexpr int kFinishColumns = 32;
__global__ void __launch_bounds__(kConvThreads) conv_finish_kernel(const ConvProblem a, int pitch) {
  const ConvTiles& t = a.tiles;
  SharedMemory shared;
  const Smem<float> staged = shared.take<float>(kRows * sums_pitch(kFinishColumns));
  const int blocks = (a.out.k + kFinishColumns - 1) / kFinishColumns;
  const int index = static_cast<int>(blockIdx.x), tile_index = index / blocks;
  const int k0 = (index - tile_index * blocks) * kFinishColumns;
  const Tile tile = find_tile(t, tile_index);
  const int column = static_cast<int>(threadIdx.x) % 8 * 4;
  if (k0 + column < a.out.k) {
    for (int m = static_cast<int>(threadIdx.x) / 8; m < tile.rows; m += kConvThreads / 8) {
      float v[4] = {};
      for (int split = 0; split < a.splits; ++split) {
        float more[4];
        load_floats<float>(
            a.partial +
                (((int64_t{split} * t.count + tile_index) * kRows + m) * pitch + k0 + column),
            more);
#pragma unroll
        for (int i = 0; i < 4; ++i) v[i] += more[i];
      }
      store_floats<float>(staged + (m * sums_pitch(kFinishColumns) + column), v);
    }
  }
  block_sync();
  finish_tile<bf16, kFinishColumns>(a.out, t, tile, k0, staged);
}

// ---- host ----

constexpr int kBlocksWanted = 264;  // two on each of 132 multiprocessors

struct Shape2 {
  int columns = 128, splits = 1, buffers = 2;
  size_t shared = 0;
};

// How the problem is cut into blocks; shared = more than there is where it does not fit.
Shape2 choose_shape(const ConvTiles& t, int channels, int more, int k, bool gradient,
                    bool aligned) {
  Shape2 s;
  const int rest = k % 128;
  s.columns = !aligned || (rest > 0 && rest <= 64) ? 64 : 128;
  s.buffers = t.taps() < 3 ? 4 : 2;
  const size_t halo = static_cast<size_t>(t.halo()) * kPitch;
  s.shared = shared_bytes<bf16>(static_cast<size_t>(s.buffers) * halo) +
             shared_bytes<bf16>(static_cast<size_t>(kStages) *
                                static_cast<size_t>(filter_stage(gradient, s.columns))) +
             shared_bytes<bf16>(more > 0 ? size_t{kStages} * kRows * kPitch : 0) +
             shared_bytes<int>(static_cast<size_t>(t.halo()));
  const size_t staged =
      shared_bytes<float>(size_t{kRows} * static_cast<size_t>(sums_pitch(s.columns)));
  if (s.shared < staged) s.shared = staged;
  // A split keeps at least two chunks; more of them than fill the device once only cost traffic.
  const int64_t blocks = int64_t{t.count} * ((k + s.columns - 1) / s.columns);
  const int chunks = chunks_of(channels);
  while (blocks * s.splits * 2 <= kBlocksWanted && chunks >= s.splits * 4) s.splits *= 2;
  return s;
}

// Everything but pointers.
struct Launch {
  ConvTiles tiles;
  Shape2 shape = {};
  int k = 0;
  bool gradient = false, aligned = true;

  int blocks() const { return (k + shape.columns - 1) / shape.columns; }
  int pitch() const { return blocks() * shape.columns; }
  size_t workspace() const {
    if (shape.splits == 1) return 0;
    return sizeof(float) * static_cast<size_t>(shape.splits) * static_cast<size_t>(tiles.count) *
           kRows * static_cast<size_t>(pitch());
  }
  bool fits() const { return shape.shared <= kMaxSharedBytes; }
  template <bool Gradient>
  void start(const LaunchShape& grid, const Run& r, const ConvProblem& a) const {
    if (!aligned)
      launch<conv_kernel<Gradient, 64, false>>(grid, r.stream, a);
    else if (shape.columns == 128)
      launch<conv_kernel<Gradient, 128, true>>(grid, r.stream, a);
    else
      launch<conv_kernel<Gradient, 64, true>>(grid, r.stream, a);
  }
  void run(ConvProblem a, const Run& r) const {
    a.tiles = tiles;
    a.splits = shape.splits;
    a.buffers = shape.buffers;
    a.blocks = blocks();
    a.partial = static_cast<float*>(shape.splits > 1 ? r.workspace : nullptr);
    const LaunchShape grid{.grid_x = static_cast<unsigned>(tiles.count * blocks()),
                           .grid_y = static_cast<unsigned>(shape.splits),
                           .block = kConvThreads,
                           .shared = shape.shared};
    if (gradient)
      start<true>(grid, r, a);
    else
      start<false>(grid, r, a);
    if (shape.splits == 1) return;
    const int finish = tiles.count * ((k + kFinishColumns - 1) / kFinishColumns);
    launch<conv_finish_kernel>(
        {.grid_x = static_cast<unsigned>(finish),
         .block = kConvThreads,
         .shared = shared_bytes<float>(static_cast<size_t>(kRows * sums_pitch(kFinishColumns)))},
        r.stream, a, pitch());
  }
};

}  // namespace

ConvPlan tensor_forward(const ConvDesc& d, const ConvSlots& s, Out y, Out statistics) {
  const bool aligned =
      d.x.c % 8 == 0 && d.c2 % 8 == 0 && d.shortcut_c % 8 == 0 && d.shortcut_c2 % 8 == 0;
  if (!aligned && (d.c2 > 0 || d.transform.any() || d.shortcut_c > 0)) return {};
  Launch plan{.tiles = forward_tiles(d, kRows), .k = d.k, .aligned = aligned};
  const int more = d.shortcut_c + d.shortcut_c2;
  plan.shape = choose_shape(plan.tiles, d.c(), more, d.k, false, aligned);
  if (!plan.fits()) return {};
  return {plan.workspace(), [=](const Run& r) {
            ConvProblem a;
            a.in = make_input<bf16>(d, s, r);
            a.filter = r.in<bf16>(s.filter);
            if (d.shortcut_c > 0) {
              a.shortcut = make_shortcut<bf16>(d, s, r);
              a.shortcut_filter = r.in<bf16>(s.shortcut_filter);
            }
            a.out = make_output<bf16>(d, s, r, y, statistics);
            plan.run(a, r);
          }};
}

ConvPlan tensor_dgrad(const ConvDesc& d, const ConvSlots& s, In dy, Out dx, Write write) {
  const bool aligned = d.x.c % 8 == 0 && d.k % 8 == 0;
  Launch plan{.tiles = dgrad_tiles(d, kRows), .k = d.x.c, .gradient = true, .aligned = aligned};
  plan.shape = choose_shape(plan.tiles, d.k, 0, d.x.c, true, aligned);
  if (!plan.fits()) return {};
  return {plan.workspace(), [=](const Run& r) {
            ConvProblem a;
            a.in = plain_input(r.in<bf16>(dy), d.k, d.y().pixels());
            a.filter = r.in<bf16>(s.filter);
            a.out = gradient_output(r.out<bf16>(dx), d.x.c, write);
            plan.run(a, r);
          }};
}

}  // namespace ddpm::cuda
