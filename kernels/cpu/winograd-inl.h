// Winograd's arithmetic on vectors of channels: the one-dimensional transforms of F(4, 3), their
// two-dimensional use, and the matrix product between them.
#if defined(DDPM_KERNELS_CPU_WINOGRAD_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef DDPM_KERNELS_CPU_WINOGRAD_INL_H_
#undef DDPM_KERNELS_CPU_WINOGRAD_INL_H_
#else
#define DDPM_KERNELS_CPU_WINOGRAD_INL_H_
#endif

#include "kernels/cpu/simd-inl.h"

HWY_BEFORE_NAMESPACE();
namespace ddpm::cpu::winograd::HWY_NAMESPACE {

using cpu::HWY_NAMESPACE::Float;
using cpu::HWY_NAMESPACE::FloatTag;
using cpu::HWY_NAMESPACE::lanes;
namespace hn = hwy::HWY_NAMESPACE;

// The interpolation points are 0, +-kA, +-kB and infinity. These two halve the error of the usual 1
// and 2, and their products below are exact.
constexpr float kA = 0.75f, kB = 1.5f;
constexpr float kA2 = kA * kA, kB2 = kB * kB, kA3 = kA2 * kA, kB3 = kB2 * kB;
constexpr float kG0 = 1 / (kA2 * kB2);              // 1 / m'(0), m = x (x^2-a^2) (x^2-b^2)
constexpr float kGA = 1 / (2 * kA2 * (kA2 - kB2));  // 1 / m'(+-a)
constexpr float kGB = 1 / (2 * kB2 * (kB2 - kA2));  // 1 / m'(+-b)

HWY_INLINE Float set(float v) { return hn::Set(FloatTag(), v); }

// One-dimensional transforms of vectors of channels; the two-dimensional ones apply them to
// columns, then to rows.
struct InputTransform {  // B^T
  static constexpr int kIn = 6, kOut = 6;
  static HWY_INLINE void apply(const Float* d, Float* v) {
    const Float even_a = hn::NegMulAdd(set(kB2), d[2], d[4]);
    const Float odd_a = hn::Mul(set(kA), hn::NegMulAdd(set(kB2), d[1], d[3]));
    const Float even_b = hn::NegMulAdd(set(kA2), d[2], d[4]);
    const Float odd_b = hn::Mul(set(kB), hn::NegMulAdd(set(kA2), d[1], d[3]));
    v[0] = hn::MulAdd(set(kA2 * kB2), d[0], hn::NegMulAdd(set(kA2 + kB2), d[2], d[4]));
    v[1] = hn::Add(even_a, odd_a);
    v[2] = hn::Sub(even_a, odd_a);
    v[3] = hn::Add(even_b, odd_b);
    v[4] = hn::Sub(even_b, odd_b);
    v[5] = hn::MulAdd(set(kA2 * kB2), d[1], hn::NegMulAdd(set(kA2 + kB2), d[3], d[5]));
  }
};
struct OutputTransform {  // A^T
  static constexpr int kIn = 6, kOut = 4;
  static HWY_INLINE void apply(const Float* m, Float* y) {
    const Float sum_a = hn::Add(m[1], m[2]), diff_a = hn::Sub(m[1], m[2]);
    const Float sum_b = hn::Add(m[3], m[4]), diff_b = hn::Sub(m[3], m[4]);
    y[0] = hn::Add(m[0], hn::Add(sum_a, sum_b));
    y[1] = hn::MulAdd(set(kA), diff_a, hn::Mul(set(kB), diff_b));
    y[2] = hn::MulAdd(set(kA2), sum_a, hn::Mul(set(kB2), sum_b));
    y[3] = hn::MulAdd(set(kA3), diff_a, hn::MulAdd(set(kB3), diff_b, m[5]));
  }
};
struct OutputAdjoint {  // A
  static constexpr int kIn = 4, kOut = 6;
  static HWY_INLINE void apply(const Float* y, Float* w) {
    const Float even_a = hn::MulAdd(set(kA2), y[2], y[0]);
    const Float odd_a = hn::MulAdd(set(kA3), y[3], hn::Mul(set(kA), y[1]));
    const Float even_b = hn::MulAdd(set(kB2), y[2], y[0]);
    const Float odd_b = hn::MulAdd(set(kB3), y[3], hn::Mul(set(kB), y[1]));
    w[0] = y[0];
    w[1] = hn::Add(even_a, odd_a);
    w[2] = hn::Sub(even_a, odd_a);
    w[3] = hn::Add(even_b, odd_b);
    w[4] = hn::Sub(even_b, odd_b);
    w[5] = y[3];
  }
};
struct FilterTransform {  // G
  static constexpr int kIn = 3, kOut = 6;
  static HWY_INLINE void apply(const Float* g, Float* u) {
    const Float even_a = hn::Mul(set(kGA), hn::MulAdd(set(kA2), g[2], g[0]));
    const Float odd_a = hn::Mul(set(kGA * kA), g[1]);
    const Float even_b = hn::Mul(set(kGB), hn::MulAdd(set(kB2), g[2], g[0]));
    const Float odd_b = hn::Mul(set(kGB * kB), g[1]);
    u[0] = hn::Mul(set(kG0), g[0]);
    u[1] = hn::Add(even_a, odd_a);
    u[2] = hn::Sub(even_a, odd_a);
    u[3] = hn::Add(even_b, odd_b);
    u[4] = hn::Sub(even_b, odd_b);
    u[5] = g[2];
  }
};
struct FilterAdjoint {  // G^T
  static constexpr int kIn = 6, kOut = 3;
  static HWY_INLINE void apply(const Float* m, Float* g) {
    const Float sum_a = hn::Mul(set(kGA), hn::Add(m[1], m[2]));
    const Float sum_b = hn::Mul(set(kGB), hn::Add(m[3], m[4]));
    g[0] = hn::MulAdd(set(kG0), m[0], hn::Add(sum_a, sum_b));
    g[1] =
        hn::MulAdd(set(kGA * kA), hn::Sub(m[1], m[2]), hn::Mul(set(kGB * kB), hn::Sub(m[3], m[4])));
    g[2] = hn::MulAdd(set(kA2), sum_a, hn::MulAdd(set(kB2), sum_b, m[5]));
  }
};

// out = T in T^T, in[i][j] = load(i * kIn + j).
template <typename T, typename Load>
HWY_INLINE void transform(const Load& load, Float (&out)[T::kOut][T::kOut]) {
  Float half[T::kIn][T::kOut];  // column by column, so transposed
  for (int j = 0; j < T::kIn; ++j) {
    Float column[T::kIn];
    for (int i = 0; i < T::kIn; ++i) column[i] = load(i * T::kIn + j);
    T::apply(column, half[j]);
  }
  for (int i = 0; i < T::kOut; ++i) {
    Float row[T::kIn];
    for (int j = 0; j < T::kIn; ++j) row[j] = half[j][i];
    T::apply(row, out[i]);
  }
}

// ---- matrix product: c (rows, width) (+)= a (rows, depth) b (depth, width) ----

struct Product {
  const float* a;
  int64_t a_row, a_depth;  // strides
  const float* b;
  int64_t b_depth;
  float* c;
  int64_t c_row;
  int64_t rows, width, depth;
  bool accumulate;
};

// Rows x Vectors accumulators, summed over depth in order: a value's bits do not depend on the
// blocking.
template <int kRows, int kVectors>
HWY_INLINE void multiply_block(const Product& p, int64_t row, int64_t column) {
  const FloatTag d;
  Float sum[kRows][kVectors];
  const float* a = p.a + row * p.a_row;
  const float* b = p.b + column;
  float* c = p.c + row * p.c_row + column;
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j)
      sum[i][j] = p.accumulate ? hn::LoadU(d, c + i * p.c_row + j * lanes()) : hn::Zero(d);
  const int64_t a_row = p.a_row;
  for (int64_t l = 0; l < p.depth; ++l) {
    Float right[kVectors];
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) right[j] = hn::LoadU(d, b + j * lanes());
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) {
      const Float left = hn::Set(d, a[i * a_row]);
#pragma GCC unroll 4
      for (int j = 0; j < kVectors; ++j) sum[i][j] = hn::MulAdd(left, right[j], sum[i][j]);
    }
    a += p.a_depth;
    b += p.b_depth;
  }
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) hn::StoreU(sum[i][j], d, c + i * p.c_row + j * lanes());
}

template <int kVectors>
HWY_INLINE void multiply_column(const Product& p, int64_t column) {
  // As many accumulators as the register file holds beside the operands: 32 with AVX-512, else 16.
  constexpr int kMost = HWY_MAX_BYTES >= 64 ? 8 : 4;
  int64_t row = 0;
  for (; row + kMost <= p.rows; row += kMost) multiply_block<kMost, kVectors>(p, row, column);
  for (; row + 4 <= p.rows; row += 4) multiply_block<4, kVectors>(p, row, column);
  for (; row + 2 <= p.rows; row += 2) multiply_block<2, kVectors>(p, row, column);
  for (; row < p.rows; ++row) multiply_block<1, kVectors>(p, row, column);
}

inline void multiply(const Product& p) {
  int64_t column = 0;
  for (; column + 2 * lanes() <= p.width; column += 2 * lanes()) multiply_column<2>(p, column);
  if (column < p.width) multiply_column<1>(p, column);
}

}  // namespace ddpm::cpu::winograd::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif
