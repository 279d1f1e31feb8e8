// A small matrix product for one thread: panels of B are packed, A is read in place, a block of C
// stays in registers. An element of C is one chain of fused multiply-adds in the order of k, cut
// every kDepth, whatever the block it falls into. Compiled once per instruction set, like
// simd-inl.h.
#if defined(DDPM_KERNELS_CPU_MATMUL_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef DDPM_KERNELS_CPU_MATMUL_INL_H_
#undef DDPM_KERNELS_CPU_MATMUL_INL_H_
#else
#define DDPM_KERNELS_CPU_MATMUL_INL_H_
#endif

#include <algorithm>

#include "kernels/cpu/simd-inl.h"

HWY_BEFORE_NAMESPACE();
namespace ddpm::cpu::HWY_NAMESPACE {

// Element (row, column) of a matrix is at[row * row_stride + column * column_stride].
struct MatrixView {
  const float* at;
  int64_t row_stride, column_stride;
};

constexpr int64_t kDepth = 256;                      // k of a packed panel
constexpr int kVectors = 2;                          // vectors of columns in a panel
constexpr int kRows = HWY_MAX_BYTES >= 64 ? 12 : 6;  // rows of C in registers

// panel (depth, columns rounded up to whole vectors) = b, zero beyond `columns`.
inline HWY_ATTR void pack_panel(const MatrixView& b, int64_t depth, int64_t columns, float* panel) {
  const FloatTag d;
  const int64_t width = (columns + lanes() - 1) / lanes() * lanes();
  if (b.column_stride == 1) {
    for (int64_t k = 0; k < depth; ++k)
      for (int64_t j = 0; j < columns; j += lanes())
        hn::Store(load(b.at + k * b.row_stride + j, columns - j), d, panel + k * width + j);
    return;
  }
  for (int64_t j = 0; j < columns; ++j)
    for (int64_t k = 0; k < depth; ++k)
      panel[k * width + j] = b.at[k * b.row_stride + j * b.column_stride];
  for (int64_t k = 0; k < depth; ++k)
    std::fill(panel + k * width + columns, panel + (k + 1) * width, 0.0f);
}

// c (R, columns) (+)= a (R, depth) panel.
template <int R, int V>
HWY_INLINE HWY_ATTR void multiply_block(const MatrixView& a, const float* panel, int64_t depth,
                                        int64_t columns, bool accumulate, float* c,
                                        int64_t c_stride) {
  const FloatTag d;
  const int64_t step = lanes();
  Float sum[R][V];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) sum[r][v] = hn::Zero(d);
  for (int64_t k = 0; k < depth; ++k) {
    Float b[V];
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) b[v] = hn::Load(d, panel + (k * V + v) * step);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const Float scalar = hn::Set(d, a.at[r * a.row_stride + k * a.column_stride]);
#pragma GCC unroll 16
      for (int v = 0; v < V; ++v) sum[r][v] = hn::MulAdd(scalar, b[v], sum[r][v]);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) {
      const int64_t left = columns - v * step;
      float* to = c + r * c_stride + v * step;
      store(accumulate ? hn::Add(load(to, left), sum[r][v]) : sum[r][v], to, left);
    }
}

template <int V>
HWY_ATTR void multiply_panel(MatrixView a, const float* panel, int64_t m, int64_t depth,
                             int64_t columns, bool accumulate, float* c, int64_t c_stride) {
  const auto advance = [&](int rows) {
    a.at += rows * a.row_stride;
    c += rows * c_stride;
    m -= rows;
  };
  for (; m >= kRows; advance(kRows))
    multiply_block<kRows, V>(a, panel, depth, columns, accumulate, c, c_stride);
  for (; m >= 4; advance(4))
    multiply_block<4, V>(a, panel, depth, columns, accumulate, c, c_stride);
  for (; m > 0; advance(1)) multiply_block<1, V>(a, panel, depth, columns, accumulate, c, c_stride);
}

// c (m,n) (+)= a (m,k) b (k,n); rows of c are c_stride apart.
inline HWY_ATTR void matmul(int64_t m, int64_t n, int64_t k, const MatrixView& a,
                            const MatrixView& b, bool accumulate, float* c, int64_t c_stride) {
  HWY_ALIGN float panel[kDepth * kVectors * hn::MaxLanes(FloatTag())];  // at most 32 KiB
  for (int64_t k0 = 0; k0 < k; k0 += kDepth) {
    const int64_t depth = std::min(kDepth, k - k0);
    const bool add = accumulate || k0 > 0;
    const MatrixView a_part{a.at + k0 * a.column_stride, a.row_stride, a.column_stride};
    for (int64_t j = 0; j < n; j += kVectors * lanes()) {
      const int64_t columns = std::min(kVectors * lanes(), n - j);
      const MatrixView b_part{b.at + k0 * b.row_stride + j * b.column_stride, b.row_stride,
                              b.column_stride};
      pack_panel(b_part, depth, columns, panel);
      if (columns > lanes())
        multiply_panel<2>(a_part, panel, m, depth, columns, add, c + j, c_stride);
      else
        multiply_panel<1>(a_part, panel, m, depth, columns, add, c + j, c_stride);
    }
  }
}

}  // namespace ddpm::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif
