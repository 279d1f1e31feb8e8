// SiLU, copies and additions, the embeddings.
#include <cmath>
#include <cstring>
#include <memory>
#include <numbers>
#include <vector>

#include "kernels/bf16.h"
#include "kernels/cpu/cpu_backend.h"
#include "kernels/cpu/parallel.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/pointwise.cpp"
#include <hwy/foreach_target.h>

#include "kernels/cpu/simd-inl.h"

HWY_BEFORE_NAMESPACE();
namespace ddpm::cpu::HWY_NAMESPACE {

void silu_loop(const float* x, float* y, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; i += lanes()) store(silu(load(x + i, end - i)), y + i, end - i);
}

void silu_backward_loop(const float* x, const float* dy, float* dx, bool accumulate, int64_t begin,
                        int64_t end) {
  for (int64_t i = begin; i < end; i += lanes()) {
    const int64_t left = end - i;
    Float v = hn::Mul(load(dy + i, left), silu_slope(load(x + i, left)));
    if (accumulate) v = hn::Add(load(dx + i, left), v);
    store(v, dx + i, left);
  }
}

void add_loop(const float* x, float* y, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; i += lanes())
    store(hn::Add(load(y + i, end - i), load(x + i, end - i)), y + i, end - i);
}

}  // namespace ddpm::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace ddpm::cpu {

HWY_EXPORT(silu_loop);
HWY_EXPORT(silu_backward_loop);
HWY_EXPORT(add_loop);

Call CpuBackend::silu(int64_t count, In x, Out y) {
  DDPM_CHECK(count > 0, "silu: %lld elements", static_cast<long long>(count));
  return {"silu", {x}, {y}, 0, [=, threads = threads_](const Run& r) {
            parallel_elements(threads, count, [&](int64_t begin, int64_t end) {
              HWY_DYNAMIC_DISPATCH(silu_loop)(r.in<float>(x), r.out<float>(y), begin, end);
            });
          }};
}

Call CpuBackend::silu_backward(int64_t count, In x, In dy, Out dx, Write write) {
  DDPM_CHECK(count > 0, "silu_backward: %lld elements", static_cast<long long>(count));
  const bool accumulate = write == Write::kAccumulate;
  return {"silu_backward", {x, dy}, {dx}, 0, [=, threads = threads_](const Run& r) {
            parallel_elements(threads, count, [&](int64_t begin, int64_t end) {
              HWY_DYNAMIC_DISPATCH(silu_backward_loop)
              (r.in<float>(x), r.in<float>(dy), r.out<float>(dx), accumulate, begin, end);
            });
          }};
}

namespace {

template <typename From, typename To, typename F>
Call cast_elements(int threads, int64_t count, In x, Out y, F convert) {
  DDPM_CHECK(count > 0, "cast: %lld elements", static_cast<long long>(count));
  return {"cast", {x}, {y}, 0, [=](const Run& r) {
            const From* from = r.in<From>(x);
            To* to = r.out<To>(y);
            parallel_elements(threads, count, [&](int64_t begin, int64_t end) {
              for (int64_t i = begin; i < end; ++i) to[i] = convert(from[i]);
            });
          }};
}

}  // namespace

Call CpuBackend::cast(int64_t count, DType from, In x, DType to, Out y) {
  if (from == DType::kF32 && to == DType::kF32)
    return copy(count, DType::kF32, x, y, Write::kOverwrite);
  if (from == DType::kF32 && to == DType::kBF16)
    return cast_elements<float, bf16>(threads_, count, x, y, to_bf16);
  if (from == DType::kBF16 && to == DType::kF32)
    return cast_elements<bf16, float>(threads_, count, x, y, [](bf16 v) { return to_float(v); });
  fail(Status::kBug, "cast: %s to %s", name_of(from), name_of(to));
}

Call CpuBackend::copy(int64_t count, DType type, In x, Out y, Write write) {
  DDPM_CHECK(count > 0 && type == DType::kF32, "copy: %lld elements of %s",
             static_cast<long long>(count), name_of(type));
  const bool accumulate = write == Write::kAccumulate;
  return {"copy", {x}, {y}, 0, [=, threads = threads_](const Run& r) {
            const float* from = r.in<float>(x);
            float* to = r.out<float>(y);
            parallel_elements(threads, count, [&](int64_t begin, int64_t end) {
              if (accumulate)
                HWY_DYNAMIC_DISPATCH(add_loop)(from, to, begin, end);
              else
                std::memcpy(to + begin, from + begin,
                            static_cast<size_t>(end - begin) * sizeof(float));
            });
          }};
}

namespace {

void check(const char* op, int n, int rows, int dim) {
  if (n <= 0 || rows <= 0 || dim <= 0)
    fail(Status::kBug, "%s: %d images, a table of %d rows of %d", op, n, rows, dim);
}

int64_t checked_row(const char* op, int64_t row, int rows) {
  if (row < 0 || row >= rows)
    fail(Status::kBug, "%s: row %lld of %d", op, static_cast<long long>(row), rows);
  return row;
}

}  // namespace

Call CpuBackend::embedding(int n, int rows, int dim, In table, In index, Out y, Write write) {
  check("embedding", n, rows, dim);
  const bool accumulate = write == Write::kAccumulate;
  return {"embedding", {table, index}, {y}, 0, [=](const Run& r) {
            for (int i = 0; i < n; ++i) {
              const int64_t row = checked_row("embedding", r.in<int32_t>(index)[i], rows);
              const float* from = r.in<float>(table) + row * dim;
              float* to = r.out<float>(y) + int64_t{i} * dim;
              if (accumulate)
                HWY_DYNAMIC_DISPATCH(add_loop)(from, to, 0, dim);
              else
                std::memcpy(to, from, static_cast<size_t>(dim) * sizeof(float));
            }
          }};
}

Call CpuBackend::embedding_backward(int n, int rows, int dim, In index, In dy, Out dtable,
                                    Write write) {
  check("embedding_backward", n, rows, dim);
  const bool accumulate = write == Write::kAccumulate;
  return {"embedding_backward", {index, dy}, {dtable}, 0, [=](const Run& r) {
            float* to = r.out<float>(dtable);
            if (!accumulate) std::memset(to, 0, sizeof(float) * static_cast<size_t>(rows) * dim);
            for (int i = 0; i < n; ++i) {
              const int64_t row = checked_row("embedding_backward", r.in<int32_t>(index)[i], rows);
              HWY_DYNAMIC_DISPATCH(add_loop)
              (r.in<float>(dy) + int64_t{i} * dim, to + row * dim, 0, dim);
            }
          }};
}

namespace {

// All timesteps' embeddings, in double: arguments reach 999 rad, where fp32 products are off by
// 3e-5.
std::vector<float> time_table(const TimeEmbeddingDesc& d) {
  const int half = d.dim / 2;
  std::vector<float> table(static_cast<size_t>(d.timesteps) * d.dim, 0.0f);
  for (int i = 0; i < half; ++i) {
    const double frequency = std::exp(-std::log(10000.0) * i / (half - d.freq_shift));
    for (int t = 0; t < d.timesteps; ++t) {
      float* row = table.data() + static_cast<size_t>(t) * d.dim;
      row[i + (d.flip_sin_to_cos ? half : 0)] = static_cast<float>(std::sin(t * frequency));
      row[i + (d.flip_sin_to_cos ? 0 : half)] = static_cast<float>(std::cos(t * frequency));
    }
  }
  return table;
}

}  // namespace

Call CpuBackend::time_embedding(const TimeEmbeddingDesc& d, In t, Out y) {
  check("time_embedding", d.n, d.timesteps, d.dim);
  if (!(static_cast<float>(d.dim / 2) > d.freq_shift))
    fail(Status::kConfig, "time_embedding: %d channels with freq_shift %g; use more channels",
         d.dim, static_cast<double>(d.freq_shift));
  auto table = std::make_shared<const std::vector<float>>(time_table(d));
  return {
      "time_embedding", {t}, {y}, 0, [=, n = d.n, dim = d.dim, count = d.timesteps](const Run& r) {
        for (int i = 0; i < n; ++i) {
          const int64_t step = checked_row("time_embedding", r.in<int32_t>(t)[i], count);
          std::memcpy(r.out<float>(y) + int64_t{i} * dim, table->data() + step * dim,
                      sizeof(float) * dim);
        }
      }};
}

Call CpuBackend::step_row(int n, int rows, int dim, In table, In state, Out y) {
  check("step_row", n, rows, dim);
  return {"step_row", {table, state}, {y}, 0, [=](const Run& r) {
            const auto step = static_cast<int64_t>(r.in<StepState>(state)->step);
            const float* from = r.in<float>(table) + checked_row("step_row", step, rows) * dim;
            for (int i = 0; i < n; ++i)
              std::memcpy(r.out<float>(y) + int64_t{i} * dim, from, sizeof(float) * dim);
          }};
}

}  // namespace ddpm::cpu
#endif
