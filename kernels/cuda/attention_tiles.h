// Tiles of bf16 rows in shared memory and their products on tensor cores.
#pragma once

#include <device/async.h>
#include <device/launch.h>
#include <device/math.h>
#include <device/memory.h>
#include <device/mma.h>
#include <device/warp.h>

namespace ddpm::cuda {

// From a row to the next: 16 bytes more than a multiple of 32, so that the eight rows of an 8x8
// matrix lie in different banks.
template <int Columns>
inline constexpr int kPitch = Columns + 8;

// A block's threads over the 16-byte units of a tile: f(row, unit's place in the tile, its place in
// a matrix with `stride` elements per row). Places are carried from one to the next: were they
// computed from a counter, the compiler would keep all of them in registers.
template <int Rows, int Columns, int Threads, typename F>
__device__ __forceinline__ void for_units(int64_t stride, F f) {
  constexpr int kUnits = Columns / 8, kStep = Threads / kUnits;
  static_assert(Threads % kUnits == 0 && Rows % kStep == 0);
  const int column = static_cast<int>(threadIdx.x) % kUnits * 8;
  int row = static_cast<int>(threadIdx.x) / kUnits, in_tile = row * kPitch<Columns> + column;
  int64_t in_matrix = row * stride + column;
#pragma unroll 2
  for (int i = 0; i < Rows / kStep; ++i) {
    f(row, column, in_tile, in_matrix);
    row += kStep;
    in_tile += kStep * kPitch<Columns>;
    in_matrix += kStep * stride;
  }
}

// Rows [0, rows) and columns [0, columns) of a matrix into a tile, zeros around them. The caller
// commits and waits.
template <int Rows, int Columns, int Threads>
__device__ __forceinline__ void copy_rows(const Smem<bf16>& to, const Global<const bf16>& from,
                                          int64_t stride, int rows, int columns) {
  for_units<Rows, Columns, Threads>(
      stride, [&](int row, int column, int in_tile, int64_t in_matrix) {
        const bool valid = row < rows && column < columns;
        copy_async(to + in_tile, from + (valid ? in_matrix : 0), valid);
      });
}

// And back.
template <int Rows, int Columns, int Threads>
__device__ __forceinline__ void store_rows(const Global<bf16>& to, int64_t stride,
                                           const Smem<bf16>& from, int rows, int columns) {
  for_units<Rows, Columns, Threads>(stride,
                                    [&](int row, int column, int in_tile, int64_t in_matrix) {
                                      if (row < rows && column < columns)
                                        store_words(to + in_matrix, load_words<4>(from + in_tile));
                                    });
}

// A warp's accumulators (16 RT, 8 CT): d[r][c] is mma_16816's of rows 16 r and columns 8 c. A lane
// holds rows 16 r + lane / 4 and 8 below it, columns 8 c + 2 (lane % 4) and the next.

template <int RT, int CT>
__device__ __forceinline__ void clear(float (&d)[RT][CT][4]) {
#pragma unroll
  for (int r = 0; r < RT; ++r)
#pragma unroll
    for (int c = 0; c < CT; ++c)
#pragma unroll
      for (int i = 0; i < 4; ++i) d[r][c][i] = 0;
}

// d += a b^T for a (16 RT, K), b (8 CT, K).
template <int K, int RT, int CT>
__device__ __forceinline__ void multiply_transposed(float (&d)[RT][CT][4], const Smem<bf16>& a,
                                                    const Smem<bf16>& b) {
  const int lane = lane_id();
  const Smem<bf16> a_row = a + (lane % 16 * kPitch<K> + lane / 16 * 8);
  const Smem<bf16> b_row = b + ((lane % 8 + lane / 16 * 8) * kPitch<K> + lane / 8 % 2 * 8);
#pragma unroll
  for (int k = 0; k < K; k += 16) {
    uint32_t af[RT][4];
#pragma unroll
    for (int r = 0; r < RT; ++r) ldmatrix_x4(af[r], a_row + (16 * r * kPitch<K> + k));
#pragma unroll
    for (int c = 0; c < CT; c += 2) {
      uint32_t bf[4];
      ldmatrix_x4(bf, b_row + (8 * c * kPitch<K> + k));
#pragma unroll
      for (int r = 0; r < RT; ++r) {
        mma_16816(d[r][c], af[r], {bf[0], bf[1]});
        mma_16816(d[r][c + 1], af[r], {bf[2], bf[3]});
      }
    }
  }
}

// d += a b for a (16 RT, K), b (K, 8 CT) in a tile of `Columns`.
template <int K, int Columns, int RT, int CT>
__device__ __forceinline__ void multiply(float (&d)[RT][CT][4], const Smem<bf16>& a,
                                         const Smem<bf16>& b) {
  const int lane = lane_id();
  const Smem<bf16> a_row = a + (lane % 16 * kPitch<K> + lane / 16 * 8);
  const Smem<bf16> b_row = b + (lane % 16 * kPitch<Columns> + lane / 16 * 8);
#pragma unroll
  for (int k = 0; k < K; k += 16) {
    uint32_t af[RT][4];
#pragma unroll
    for (int r = 0; r < RT; ++r) ldmatrix_x4(af[r], a_row + (16 * r * kPitch<K> + k));
#pragma unroll
    for (int c = 0; c < CT; c += 2) {
      uint32_t bf[4];
      ldmatrix_x4_transposed(bf, b_row + (k * kPitch<Columns> + 8 * c));
#pragma unroll
      for (int r = 0; r < RT; ++r) {
        mma_16816(d[r][c], af[r], {bf[0], bf[1]});
        mma_16816(d[r][c + 1], af[r], {bf[2], bf[3]});
      }
    }
  }
}

// Rounds accumulators into a tile of `Columns`.
template <int Columns, int RT, int CT>
__device__ __forceinline__ void put(const Smem<bf16>& to, const float (&d)[RT][CT][4]) {
  const Smem<bf16> mine = to + (lane_id() / 4 * kPitch<Columns> + lane_id() % 4 * 2);
#pragma unroll
  for (int r = 0; r < RT; ++r)
#pragma unroll
    for (int half = 0; half < 2; ++half)
#pragma unroll
      for (int c = 0; c < CT; ++c)
        store_words(mine + ((16 * r + 8 * half) * kPitch<Columns> + 8 * c),
                    Words<1>{{pack_bf16(d[r][c][2 * half], d[r][c][2 * half + 1])}});
}

// d = -infinity from column `count` on.
template <int RT, int CT>
__device__ __forceinline__ void mask_columns(float (&d)[RT][CT][4], int count) {
#pragma unroll
  for (int c = 0; c < CT; ++c)
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (8 * c + lane_id() % 4 * 2 + i < count) continue;
#pragma unroll
      for (int r = 0; r < RT; ++r) d[r][c][i] = d[r][c][2 + i] = -INFINITY;
    }
}

// Over the four lanes that share an accumulator's row.
__device__ __forceinline__ float row_max(float v) {
#pragma unroll
  for (int mask = 1; mask < 4; mask *= 2) v = fmaxf(v, shuffle_xor(v, mask));
  return v;
}
__device__ __forceinline__ float row_sum(float v) {
#pragma unroll
  for (int mask = 1; mask < 4; mask *= 2) v += shuffle_xor(v, mask);
  return v;
}

}  // namespace ddpm::cuda
