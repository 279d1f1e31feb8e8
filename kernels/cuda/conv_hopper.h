// What the kernels of conv_hopper.cu share: sizes, the order of steps, and the filter laid out in
// that order.
#pragma once

#include <device/launch.h>
#include <device/memory.h>
#include <device/warpgroup.h>

#include "kernels/cuda/conv_epilogue.h"
#include "kernels/cuda/conv_tile.h"

namespace ddpm::cuda {

inline constexpr int kHopperRows = 256, kHopperColumns = 128;  // pixels and channels of a tile
inline constexpr int kHopperPart = 64;                         // rows of a product
inline constexpr int kHopperChunk = 32;                        // channels summed over in a step
inline constexpr int kHopperPitch = kHopperChunk + 8;          // elements of a pixel in a slot
inline constexpr int kHopperStage = kHopperColumns * kHopperChunk;

// The order of a tile's steps: chunks of the input, each with all taps, then chunks of the
// shortcut's input.
struct HopperSteps {
  int channels = 0, more = 0;  // of the input, of the shortcut's
  int taps = 1;

  __host__ __device__ static int chunks_of(int count) {
    return (count + kHopperChunk - 1) / kHopperChunk;
  }
  __host__ __device__ int chunks() const { return chunks_of(channels); }
  __host__ __device__ int all_chunks() const { return chunks() + chunks_of(more); }
  __host__ __device__ int count() const { return chunks() * taps + chunks_of(more); }
};

struct HopperProblem {
  ConvTiles tiles;
  HopperSteps steps;
  ConvInput<bf16> in, shortcut;
  Global<const bf16> packed = nullptr;
  ConvOutput<bf16> out;
  int blocks = 1;  // over output channels
  int slots = 2;   // for chunks of a halo
  int slot = 0;    // elements of one

  __host__ __device__ int count() const { return tiles.count * blocks; }
};

// Runs of eight elements in the packed filter.
constexpr int64_t packed_runs(int blocks, int steps) {
  return int64_t{blocks} * steps * kHopperStage / 8;
}

// Run `index` of the packed filter: for each 128 output channels and each step, (128, 32), with the
// pieces of 16 bytes where wgmma looks for them (wgmma.h: rows of 64 bytes). filter is (k, taps,
// channels), for the gradient (channels, taps, k) with taps turned round; zeros beyond either.
template <bool Gradient>
__device__ __forceinline__ void pack_run(const HopperSteps& s, int k, Global<const bf16> filter,
                                         Global<const bf16> shortcut, Global<bf16> packed,
                                         int64_t index) {
  const int row = static_cast<int>(index % kHopperColumns);
  const int piece = static_cast<int>(index / kHopperColumns % 4);
  const int64_t stage = index / (kHopperStage / 8);
  const int block = static_cast<int>(stage / s.count());
  int step = static_cast<int>(stage - int64_t{block} * s.count());
  const int column = block * kHopperColumns + row;
  const bool main = step < s.chunks() * s.taps;
  if (!main) step -= s.chunks() * s.taps;
  const int taps = main ? s.taps : 1, channels = main ? s.channels : s.more;
  const int tap = step % taps, c = step / taps * kHopperChunk + piece * 8;
  Words<4> words{};
  if (column < k && c < channels) {
    if constexpr (Gradient) {
      const auto from = filter + ((int64_t{c} * taps + taps - 1 - tap) * k + column);
#pragma unroll
      for (int i = 0; i < 8; ++i)
        words.w[i / 2] |= uint32_t{bf16(from[int64_t{i} * taps * k]).bits} << (16 * (i % 2));
    } else {
      const auto at = (int64_t{column} * taps + tap) * channels + c;
      words = load_words<4>((main ? filter : shortcut) + at);
    }
  }
  store_words(packed + (stage * kHopperStage + row * kHopperChunk + (piece ^ row / 2 % 4) * 8),
              words);
}

// 64 rows of a tile as a tile of their own, for what follows the sums.
__device__ __forceinline__ Tile part_of(const ConvTiles& t, const Tile& tile, int row) {
  Tile part = tile;
  if (t.tile_images > 1) part.n += row / t.pixels();
  part.first = output_pixel(t, tile, row);
  const int left = tile.rows - row;
  part.rows = left < 0 ? 0 : left < kHopperPart ? left : kHopperPart;
  return part;
}

// Finishes 64 rows with the threads of a warpgroup, which meet at named barriers from here on.
inline constexpr unsigned kHopperTeamMeets = 2;
struct HopperTeam {
  static constexpr int kThreads = 128;
  int group;
  __device__ __forceinline__ int thread() const { return static_cast<int>(threadIdx.x) % kThreads; }
  __device__ __forceinline__ void sync() const {
    named_barrier(kHopperTeamMeets + static_cast<unsigned>(group), kThreads);
  }
};

}  // namespace ddpm::cuda
