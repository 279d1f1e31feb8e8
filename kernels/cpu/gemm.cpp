// Matrix products. Our own wherever rows are pixels or images: an element is one chain of
// multiply-adds in the order of k, so a row's bits depend neither on its place nor on the number of
// rows, which oneDNN promises on no machine and keeps on AVX-512 alone. Products over the rows (a
// transposed: gradients of weights) are oneDNN's.
#include <algorithm>
#include <memory>

#include "kernels/cpu/cpu_backend.h"
#include "kernels/cpu/onednn.h"
#include "kernels/cpu/parallel.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/gemm.cpp"
#include <hwy/foreach_target.h>

#include "kernels/cpu/matmul-inl.h"
#include "kernels/cpu/simd-inl.h"

#ifndef DDPM_KERNELS_CPU_GEMM_ONCE_
#define DDPM_KERNELS_CPU_GEMM_ONCE_
namespace ddpm::cpu {

// A block of c, and where its operands begin.
struct GemmBlock {
  int64_t rows, columns, k, n;  // n: between rows of c and residual
  int64_t b_row, b_column;      // strides of b; a's rows are k apart
  const float *a, *b, *bias, *residual;
  float* c;
  bool accumulate;
};

}  // namespace ddpm::cpu
#endif

HWY_BEFORE_NAMESPACE();
namespace ddpm::cpu::HWY_NAMESPACE {

void gemm_block(const GemmBlock& g) {
  constexpr int64_t kRowsAtOnce = 384;  // of a, whose panel then stays in L2
  for (int64_t row = 0; row < g.rows; row += kRowsAtOnce) {
    const int64_t rows = std::min(kRowsAtOnce, g.rows - row);
    matmul(rows, g.columns, g.k, {g.a + row * g.k, g.k, 1}, {g.b, g.b_row, g.b_column},
           g.accumulate, g.c + row * g.n, g.n);
  }
  if (g.bias == nullptr && g.residual == nullptr) return;
  for (int64_t row = 0; row < g.rows; ++row)
    for (int64_t j = 0; j < g.columns; j += lanes()) {
      const int64_t left = g.columns - j, at = row * g.n + j;
      Float v = load(g.c + at, left);
      if (g.bias != nullptr) v = hn::Add(v, load(g.bias + j, left));
      if (g.residual != nullptr) v = hn::Add(v, load(g.residual + at, left));
      store(v, g.c + at, left);
    }
}

}  // namespace ddpm::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace ddpm::cpu {
namespace {

HWY_EXPORT(gemm_block);

// How c is cut: by rows where there are enough of them for every thread, else by columns.
struct Cut {
  int64_t row_parts = 1, column_parts = 1;

  Cut(const GemmDesc& g, int threads) {
    constexpr int64_t kFewRows = 64, kColumns = 32;  // a packed panel serves so many
    const int workers = threads_for(threads, int64_t{g.batch} * g.m * g.n * g.k / 8);
    if (g.m >= workers * kFewRows)
      row_parts = workers;
    else
      column_parts = std::clamp<int64_t>(g.n / kColumns, 1, workers);
  }
};

// `count` cut into parts; all but the last are whole multiples of `unit`.
int64_t part(int64_t count, int64_t parts, int64_t index, int64_t unit) {
  const int64_t units = (count + unit - 1) / unit;
  return std::min(count, units * index / parts * unit);
}

void check(const GemmDesc& g, In a, In b, In bias, In residual, Out c) {
  DDPM_CHECK(g.in == DType::kF32 && g.out == DType::kF32, "gemm: %s to %s", name_of(g.in),
             name_of(g.out));
  DDPM_CHECK(g.m > 0 && g.n > 0 && g.k > 0 && g.batch > 0, "gemm: batch %d of (%d,%d,%d)", g.batch,
             g.m, g.n, g.k);
  DDPM_CHECK(a && b && c, "gemm: a, b and c must be present");
  DDPM_CHECK(g.bias == static_cast<bool>(bias) && g.residual == static_cast<bool>(residual),
             "gemm: bias and residual must be present as the desc says");
}

}  // namespace

Call CpuBackend::gemm(const GemmDesc& g, In a, In b, In bias, In residual, Out c, Write write) {
  check(g, a, b, bias, residual, c);
  Call call{"gemm", {a, b}, {c}, 0, nullptr};
  if (bias) call.reads.push_back(bias);
  if (residual) call.reads.push_back(residual);
  if (g.transpose_a) {
    const DnnPrimitivePtr product = dnn_->matmul(g, write == Write::kAccumulate);
    call.workspace = product->scratchpad_bytes();
    call.run = [=](const Run& r) {
      product->run({.src = r.in<float>(a),
                    .weights = r.in<float>(b),
                    .bias = r.in<float>(bias),
                    .addend = r.in<float>(residual),
                    .dst = r.out<float>(c),
                    .scratchpad = r.workspace});
    };
    return call;
  }
  const Cut cut(g, threads_);
  const int threads = static_cast<int>(cut.row_parts * cut.column_parts);
  call.run = [=, accumulate = write == Write::kAccumulate](const Run& r) {
    const int64_t m = g.m, n = g.n, k = g.k, parts = threads;
    parallel_for(threads, parts, [&](int64_t first, int64_t last) {
      for (int64_t i = first * g.batch; i < last * g.batch; ++i) {
        const int64_t batch = i % g.batch, p = i / g.batch;
        const int64_t row_part = p / cut.column_parts, column_part = p % cut.column_parts;
        const int64_t row = part(m, cut.row_parts, row_part, 12);
        const int64_t column = part(n, cut.column_parts, column_part, 32);
        const int64_t b_row = g.transpose_b ? 1 : n, b_column = g.transpose_b ? k : 1;
        const int64_t at = (batch * m + row) * n + column;
        HWY_DYNAMIC_DISPATCH(gemm_block)
        ({.rows = part(m, cut.row_parts, row_part + 1, 12) - row,
          .columns = part(n, cut.column_parts, column_part + 1, 32) - column,
          .k = k,
          .n = n,
          .b_row = b_row,
          .b_column = b_column,
          .a = r.in<float>(a) + (batch * m + row) * k,
          .b = r.in<float>(b) + batch * n * k + column * b_column,
          .bias = bias ? r.in<float>(bias) + column : nullptr,
          .residual = residual ? r.in<float>(residual) + at : nullptr,
          .c = r.out<float>(c) + at,
          .accumulate = accumulate});
      }
    });
  };
  return call;
}

}  // namespace ddpm::cpu
#endif
