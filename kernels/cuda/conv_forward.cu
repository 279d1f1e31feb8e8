// Convolution and its gradient by the input on the tensor cores (mma.m16n8k16, bf16, fp32 sums).
//
// A block computes 128 pixels x Columns channels. Input channels come 32 at a time: the tile's halo
// by cp.async into one of two buffers, where the thread that copied a piece also transforms it
// (scale and shift, SiLU, dropout: once per halo element and block, not per tap) while the taps of
// the chunk before are multiplied. A tap is then only another offset into the halo: every row that
// ldmatrix reads is one pixel's 16 bytes. Filters come three taps at a time, a step ahead. Rows are
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
constexpr int kRows = 128;

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

// A step multiplies Group taps of a chunk: three, whose filters then need two buffers, or one,
// where there is no more, with three. A step of the shortcut's chunks keeps its input behind its
// filter.
template <bool Gradient, int Columns, int Group>
struct Steps {
  static constexpr int kStages = Group == 1 ? 3 : 2, kAhead = kStages - 1;
  static constexpr int kFilter = Gradient ? kChunk * (Columns + 8) : Columns * kPitch;
  static constexpr int kStage = Group * kFilter;
  static constexpr bool kFused = !Gradient && Group > 1;
  static_assert(!kFused || kStage >= kFilter + kRows * kPitch);
};

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

// Where the block stands in the list of steps: chunks of the input with groups of taps, then chunks
// of the shortcut.
template <int Group, int Stages>
struct Cursor {
  int chunk, tap, shortcut, stage;

  __device__ __forceinline__ void advance(int taps, int end) {
    stage = stage == Stages - 1 ? 0 : stage + 1;
    if (chunk == end) {
      ++shortcut;
      return;
    }
    tap += Group;
    if (tap >= taps) {
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
template <bool Gradient, int Columns, int Group, bool Aligned>
__global__ void __launch_bounds__(kConvThreads, 2) conv_kernel(const ConvProblem a) {
  using S = Steps<Gradient, Columns, Group>;
  constexpr bool kFused = S::kFused && Aligned;
  const ConvTiles& t = a.tiles;
  const int taps = t.taps(), channels = a.in.channels(), more = a.shortcut.channels();
  SharedMemory shared;
  const int halo_size = t.halo() * kPitch;
  const Smem<bf16> halo = shared.take<bf16>(a.buffers * halo_size);
  const Smem<bf16> stages = shared.take<bf16>(S::kStages * S::kStage);
  const Smem<int> pixels = shared.take<int>(t.halo());

  const int index = static_cast<int>(blockIdx.x), split = static_cast<int>(blockIdx.y);
  const int tile_index = index / a.blocks, k0 = (index - tile_index * a.blocks) * Columns;
  const Tile tile = find_tile(t, tile_index);
  for (int i = static_cast<int>(threadIdx.x); i < t.halo(); i += kConvThreads)
    pixels[i] = halo_pixel(t, tile, halo_place(t, i));
  block_sync();

  const int first = part(chunks_of(channels), a.splits, split);
  const int end = part(chunks_of(channels), a.splits, split + 1);
  const int more_first = part(chunks_of(more), a.splits, split);
  const int more_end = part(chunks_of(more), a.splits, split + 1);
  const int groups = (taps + Group - 1) / Group;
  const int steps = (end - first) * groups + more_end - more_first;

  const FilterCopy<Gradient, Columns, Aligned> copy_filter(a.filter, channels, a.out.k, taps, k0);
  Cursor<Group, S::kStages> load{first, 0, more_first, 0};
  const auto copy_step = [&](int step) {
    if (step < steps) {
      const Smem<bf16> to = stages + load.stage * S::kStage;
      if (load.chunk < end) {
#pragma unroll
        for (int i = 0; i < Group; ++i)
          if (load.tap + i < taps)
            copy_filter(load.tap + i, load.chunk * kChunk, to + i * S::kFilter);
      } else if constexpr (kFused) {
        FilterCopy<false, Columns, true>(a.shortcut_filter, more, a.out.k, 1, k0)(
            0, load.shortcut * kChunk, to);
        copy_rows(a, tile, load.shortcut * kChunk, to + S::kFilter);
      }
      load.advance(taps, end);
    }
    copy_async_commit();
  };
  const auto halo_of_chunk = [&](int chunk) {
    return halo + ((chunk - first) & (a.buffers - 1)) * halo_size;
  };

  // A chunk's halo is sent for in the first step of the chunk `buffers - 1` before it, and has come
  // kAhead steps later; its transform is spread over the steps that then are left.
  for (int i = first; i < end && i < first + a.buffers - 1; ++i)
    copy_halo<Aligned>(a, pixels, i * kChunk, halo_of_chunk(i));
#pragma unroll
  for (int i = 0; i < S::kAhead; ++i) copy_step(i);
  const int pieces = (t.halo() * kUnits + kConvThreads - 1) / kConvThreads;
  const int from = S::kAhead < groups ? S::kAhead : groups - 1;
  const int at_once = (pieces + groups - from - 1) / (groups - from);
  const bool transforms = kFused && a.in.transforms();
  if (transforms && first < end) {
    copy_async_wait<S::kAhead - 1>();
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

  Cursor<Group, S::kStages> now{first, 0, more_first, 0};
  int tap_column = 0, tap_offset = 0;  // offset: halo pixels from tap (0,0)
  for (int step = 0; step < steps; ++step) {
    copy_async_wait<S::kAhead - 1>();
    block_sync();
    const bool main = now.chunk < end;
    if (main && now.tap == 0 && now.chunk + a.buffers - 1 < end)
      copy_halo<Aligned>(a, pixels, (now.chunk + a.buffers - 1) * kChunk,
                         halo_of_chunk(now.chunk + a.buffers - 1));
    copy_step(step + S::kAhead);
    if (transforms && main && now.chunk + 1 < end) {
      const int group = now.tap / Group - from;
      if (group >= 0)
        transform_halo(a, only_image(t, tile), pixels, (now.chunk + 1) * kChunk,
                       halo_of_chunk(now.chunk + 1), group * at_once, (group + 1) * at_once);
    }
    const Smem<bf16> stage = stages + now.stage * S::kStage;
    if (!main) {
      if constexpr (kFused) {
        if (now.shortcut == more_first) {
#pragma unroll
          for (int i = 0; i < kM; ++i)
            at[i] = (warp.row + i * 16 + lane_row) * kPitch + lane_column;
        }
      }
    }
    const Smem<bf16> rows = main ? halo_of_chunk(now.chunk) : stage + S::kFilter;
#pragma unroll
    for (int i = 0; i < Group; ++i) {
      if (i > 0 && (!main || now.tap + i >= taps)) break;
      if (active)
        multiply<Gradient, Columns, kM>(rows + tap_offset * kPitch, at, stage + i * S::kFilter,
                                        warp.column, sums);
      if (!main) break;
      ++tap_offset;
      if (++tap_column == t.s) {
        tap_column = 0;
        tap_offset += t.halo_w - t.s;
      }
    }
    now.advance(taps, end);
    if (now.tap == 0) tap_offset = 0;
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
  finish_tile<bf16, Columns, Gradient>(a.out, t, tile, k0, staged, BlockTeam{});
}

// The sum over splits of 128 pixels x 32 channels, and what follows it.
constexpr int kFinishColumns = 32;
template <bool Gradient>
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
  finish_tile<bf16, kFinishColumns, Gradient>(a.out, t, tile, k0, staged, BlockTeam{});
}

// ---- host ----

constexpr int kBlocksWanted = 264;  // two on each of 132 multiprocessors

// How a problem is cut into blocks.
struct Cut {
  int columns = 128, group = 3, splits = 1, buffers = 2;
  size_t shared = 0;
};

template <bool Gradient, int Columns, int Group>
size_t stage_bytes() {
  using S = Steps<Gradient, Columns, Group>;
  return shared_bytes<bf16>(size_t{S::kStages} * S::kStage);
}
template <bool Gradient>
size_t stage_bytes(const Cut& cut) {
  if (cut.columns == 128)
    return cut.group == 3 ? stage_bytes<Gradient, 128, 3>() : stage_bytes<Gradient, 128, 1>();
  return cut.group == 3 ? stage_bytes<Gradient, 64, 3>() : stage_bytes<Gradient, 64, 1>();
}

// tiles: those to fill the device with. fused: with a transform or a shortcut.
Cut choose_cut(const ConvTiles& t, int tiles, int channels, bool fused, int k, bool gradient,
               bool aligned) {
  Cut cut;
  const int rest = k % 128;
  cut.columns = !aligned || (rest > 0 && rest <= 64) ? 64 : 128;
  cut.group = aligned && t.taps() < 3 && !fused ? 1 : 3;
  const int groups = (t.taps() + cut.group - 1) / cut.group;
  cut.buffers = groups > (cut.group == 1 ? 2 : 1) ? 2 : 4;
  const size_t halo = static_cast<size_t>(t.halo());
  cut.shared = shared_bytes<bf16>(static_cast<size_t>(cut.buffers) * halo * kPitch) +
               (gradient ? stage_bytes<true>(cut) : stage_bytes<false>(cut)) +
               shared_bytes<int>(halo);
  const size_t staged =
      shared_bytes<float>(size_t{kRows} * static_cast<size_t>(sums_pitch(cut.columns)));
  if (cut.shared < staged) cut.shared = staged;
  // A split keeps at least two chunks; more of them than fill the device once only cost traffic.
  const int64_t blocks = int64_t{tiles} * ((k + cut.columns - 1) / cut.columns);
  const int chunks = chunks_of(channels);
  while (blocks * cut.splits * 2 <= kBlocksWanted && chunks >= cut.splits * 4) cut.splits *= 2;
  return cut;
}

// Everything but pointers.
struct Launch {
  ConvTiles tiles;
  Cut cut = {};
  int k = 0;
  bool gradient = false, aligned = true;

  int blocks() const { return (k + cut.columns - 1) / cut.columns; }
  int pitch() const { return blocks() * cut.columns; }
  size_t workspace() const {
    if (cut.splits == 1) return 0;
    return sizeof(float) * static_cast<size_t>(cut.splits) * static_cast<size_t>(tiles.count) *
           kRows * static_cast<size_t>(pitch());
  }
  bool fits(size_t shared_bytes) const {
    return cut.shared <= shared_bytes && tiles.halo_h <= kMaxHaloSide &&
           tiles.halo_w <= kMaxHaloSide;
  }
  template <bool Gradient>
  void start(const LaunchShape& grid, const Run& r, const ConvProblem& a) const {
    if (!aligned)
      launch<conv_kernel<Gradient, 64, 3, false>>(grid, r.stream, a);
    else if (cut.columns == 128 && cut.group == 3)
      launch<conv_kernel<Gradient, 128, 3, true>>(grid, r.stream, a);
    else if (cut.columns == 128)
      launch<conv_kernel<Gradient, 128, 1, true>>(grid, r.stream, a);
    else if (cut.group == 3)
      launch<conv_kernel<Gradient, 64, 3, true>>(grid, r.stream, a);
    else
      launch<conv_kernel<Gradient, 64, 1, true>>(grid, r.stream, a);
  }
  void run(ConvProblem a, const Run& r) const {
    a.tiles = tiles;
    a.splits = cut.splits;
    a.buffers = cut.buffers;
    a.blocks = blocks();
    a.partial = static_cast<float*>(cut.splits > 1 ? r.workspace : nullptr);
    const LaunchShape grid{.grid_x = static_cast<unsigned>(tiles.count * blocks()),
                           .grid_y = static_cast<unsigned>(cut.splits),
                           .block = kConvThreads,
                           .shared = cut.shared};
    if (gradient)
      start<true>(grid, r, a);
    else
      start<false>(grid, r, a);
    if (cut.splits == 1) return;
    const int finish = tiles.count * ((k + kFinishColumns - 1) / kFinishColumns);
    const LaunchShape rest{
        .grid_x = static_cast<unsigned>(finish),
        .block = kConvThreads,
        .shared = shared_bytes<float>(static_cast<size_t>(kRows * sums_pitch(kFinishColumns)))};
    if (gradient)
      launch<conv_finish_kernel<true>>(rest, r.stream, a, pitch());
    else
      launch<conv_finish_kernel<false>>(rest, r.stream, a, pitch());
  }
};

}  // namespace

ConvPlan tensor_forward(size_t shared_bytes, const ConvDesc& d, const ConvSlots& s, Out y,
                        Out statistics, bool batch_invariant) {
  const bool aligned =
      d.x.c % 8 == 0 && d.c2 % 8 == 0 && d.shortcut_c % 8 == 0 && d.shortcut_c2 % 8 == 0;
  if (!aligned && (d.c2 > 0 || d.transform.any() || d.shortcut_c > 0)) return {};
  Launch plan{.tiles = {}, .k = d.k, .aligned = aligned};
  const bool fused = d.transform.any() || d.shortcut_c > 0;
  const ConvTiles& t = plan.tiles;
  // A halo that is too large shrinks with its tile, whose other rows then idle. A part of an image
  // keeps the 64 pixels of the statistics.
  for (int rows = kRows; rows >= 16; rows /= 2) {
    plan.tiles = forward_tiles(d, rows);
    const int tiles = !batch_invariant ? t.count : t.tile_images > 1 ? 1 : t.per_image;
    plan.cut = choose_cut(t, tiles, d.c(), fused, d.k, false, aligned);
    if (plan.fits(shared_bytes) || (rows == 64 && t.per_image > 1)) break;
  }
  if (!plan.fits(shared_bytes)) return {};
  return {plan.workspace(),
          [=](const Run& r) {
            ConvProblem a;
            a.in = make_input<bf16>(d, s, r);
            a.filter = r.in<bf16>(s.filter);
            if (d.shortcut_c > 0) {
              a.shortcut = make_shortcut<bf16>(d, s, r);
              a.shortcut_filter = r.in<bf16>(s.shortcut_filter);
            }
            a.out = make_output<bf16>(d, s, r, y, statistics);
            plan.run(a, r);
          },
          {.blocks = plan.tiles.count * plan.blocks(),
           .splits = plan.cut.splits,
           .columns = plan.cut.columns,
           .shared = plan.cut.shared}};
}

ConvPlan tensor_dgrad(size_t shared_bytes, const ConvDesc& d, const ConvSlots& s, In dy,
                      const GradientSlots& to) {
  const bool aligned = d.c() % 8 == 0 && d.k % 8 == 0;
  Launch plan{.tiles = dgrad_tiles(d, kRows), .k = d.c(), .gradient = true, .aligned = aligned};
  plan.cut = choose_cut(plan.tiles, plan.tiles.count, d.k, false, d.c(), true, aligned);
  if (!plan.fits(shared_bytes)) return {};
  return {plan.workspace(), [=](const Run& r) {
            ConvProblem a;
            a.in = plain_input(r.in<bf16>(dy), d.k, d.y().pixels());
            a.filter = r.in<bf16>(s.filter);
            a.out = gradient_output<bf16>(d, s, to, r);
            plan.run(a, r);
          }};
}

}  // namespace ddpm::cuda
