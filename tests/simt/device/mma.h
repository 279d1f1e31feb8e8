// The host's version of kernels/cuda/device/mma.h.
#pragma once

#include <cstdint>
#include <cstring>

#include "device/memory.h"
#include "tests/simt/machine.h"

namespace ddpm::cuda {

inline float low_half(uint32_t pair) { return to_float(bf16{static_cast<uint16_t>(pair)}); }
inline float high_half(uint32_t pair) { return to_float(bf16{static_cast<uint16_t>(pair >> 16)}); }

struct MmaLane {
  float* d;
  const uint32_t *a, *b;
};

inline void finish_mma(void* const* lanes) {
  float a[16][16], b[8][16], d[16][8];  // b by column
  for (int lane = 0; lane < 32; ++lane) {
    const auto& l = *static_cast<const MmaLane*>(lanes[lane]);
    const int row = lane / 4, pair = lane % 4 * 2;
    for (int i = 0; i < 4; ++i) {
      const int r = row + i % 2 * 8, c = pair + i / 2 * 8;
      a[r][c] = low_half(l.a[i]);
      a[r][c + 1] = high_half(l.a[i]);
      d[row + i / 2 * 8][pair + i % 2] = l.d[i];
    }
    for (int i = 0; i < 2; ++i) {
      b[row][pair + i * 8] = low_half(l.b[i]);
      b[row][pair + i * 8 + 1] = high_half(l.b[i]);
    }
  }
  for (int m = 0; m < 16; ++m)
    for (int n = 0; n < 8; ++n) {
      float sum = 0;
      for (int k = 0; k < 16; ++k) sum += a[m][k] * b[n][k];
      d[m][n] += sum;
    }
  for (int lane = 0; lane < 32; ++lane)
    for (int i = 0; i < 4; ++i)
      static_cast<const MmaLane*>(lanes[lane])->d[i] =
          d[lane / 4 + i / 2 * 8][lane % 4 * 2 + i % 2];
}

inline void mma_16816(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  MmaLane mine{d, a, b};
  simt::warp_meet("mma_16816", &mine, finish_mma);
}

struct LdmatrixLane {
  const bf16* row;
  uint32_t* r;
};

template <bool Transposed>
void finish_ldmatrix(void* const* lanes) {
  for (int lane = 0; lane < 32; ++lane)
    for (int i = 0; i < 4; ++i) {
      const auto row = [&](int r) { return static_cast<LdmatrixLane*>(lanes[8 * i + r])->row; };
      const int major = lane / 4, minor = lane % 4 * 2;
      const bf16 low = Transposed ? row(minor)[major] : row(major)[minor];
      const bf16 high = Transposed ? row(minor + 1)[major] : row(major)[minor + 1];
      static_cast<LdmatrixLane*>(lanes[lane])->r[i] = uint32_t{high.bits} << 16 | low.bits;
    }
}

template <bool Transposed>
void ldmatrix(const char* what, uint32_t (&r)[4], Smem<const bf16> row) {
  check_alignment(row.raw(), 16);
  row.check(row.raw(), 16, simt::Access::kRead);
  LdmatrixLane mine{row.raw(), r};
  simt::warp_meet(what, &mine, finish_ldmatrix<Transposed>);
}

inline void ldmatrix_x4(uint32_t (&r)[4], const Smem<const bf16>& row) {
  ldmatrix<false>("ldmatrix_x4", r, row);
}
inline void ldmatrix_x4_transposed(uint32_t (&r)[4], const Smem<const bf16>& row) {
  ldmatrix<true>("ldmatrix_x4_transposed", r, row);
}

}  // namespace ddpm::cuda
