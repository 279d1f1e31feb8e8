// ReLU, pooling and bilinear resizing.
#include <algorithm>
#include <memory>
#include <vector>

#include "kernels/cpu/cpu_backend.h"
#include "kernels/cpu/parallel.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/pooling.cpp"
#include <hwy/foreach_target.h>

#include "kernels/cpu/simd-inl.h"

#ifndef DDPM_KERNELS_CPU_POOLING_TYPES_
#define DDPM_KERNELS_CPU_POOLING_TYPES_
namespace ddpm::cpu {

// Between which two elements along an axis of x an element of y lies, and how far from the first.
struct Between {
  int64_t first = 0, second = 0;
  float second_weight = 0;
};

}  // namespace ddpm::cpu
#endif

HWY_BEFORE_NAMESPACE();
namespace ddpm::cpu::HWY_NAMESPACE {

// Rows of `length`, `stride` apart in y.
void relu_loop(const float* x, int64_t rows, int64_t length, float* y, int64_t stride) {
  const Float zero = hn::Zero(FloatTag());
  for (int64_t r = 0; r < rows; ++r, x += length, y += stride)
    for (int64_t i = 0; i < length; i += lanes()) {
      const Float v = load(x + i, length - i);
      store(hn::IfThenZeroElse(hn::Lt(v, zero), v), y + i, length - i);
    }
}

// One pixel of y from the window x (r, s, C), whose rows are `row` apart.
void pool_loop(const float* x, int64_t row, int64_t r, int64_t s, int64_t c, bool average,
               float* y) {
  const Float count = hn::Set(FloatTag(), static_cast<float>(r * s));
  for (int64_t i = 0; i < c; i += lanes()) {
    Float result = load(x + i, c - i);
    for (int64_t tap = 1; tap < r * s; ++tap) {
      const Float v = load(x + tap / s * row + tap % s * c + i, c - i);
      // A NaN is larger than all, and stays.
      result = average ? hn::Add(result, v)
                       : hn::IfThenElse(hn::Or(hn::Lt(result, v), hn::IsNaN(v)), v, result);
    }
    store(average ? hn::Div(result, count) : result, y + i, c - i);
  }
}

// A row of y between two rows of x.
void resize_row_loop(const float* top, const float* bottom, float bottom_weight,
                     const Between* columns, int64_t w, int64_t c, float* y) {
  const FloatTag d;
  const Float low = hn::Set(d, bottom_weight), high = hn::Set(d, 1.0f - bottom_weight);
  for (int64_t q = 0; q < w; ++q, y += c) {
    const int64_t a = columns[q].first * c, b = columns[q].second * c;
    const Float right = hn::Set(d, columns[q].second_weight);
    const Float left = hn::Set(d, 1.0f - columns[q].second_weight);
    for (int64_t i = 0; i < c; i += lanes()) {
      const int64_t rest = c - i;
      const Float above =
          hn::MulAdd(right, load(top + b + i, rest), hn::Mul(left, load(top + a + i, rest)));
      const Float below =
          hn::MulAdd(right, load(bottom + b + i, rest), hn::Mul(left, load(bottom + a + i, rest)));
      store(hn::MulAdd(low, below, hn::Mul(high, above)), y + i, rest);
    }
  }
}

}  // namespace ddpm::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace ddpm::cpu {

HWY_EXPORT(relu_loop);
HWY_EXPORT(pool_loop);
HWY_EXPORT(resize_row_loop);

Call CpuBackend::relu(const Shape& x, In in, Out y, const Columns& to) {
  DDPM_CHECK(x.positive() && to.hold(x.c), "relu: x %s to channel %d of %d", to_string(x).c_str(),
             to.offset, to.channels);
  const int64_t pixels = x.n * x.pixels(), c = x.c;
  return {"relu", {in}, {y}, 0, [=, threads = threads_](const Run& r) {
            parallel_for(threads_for(threads, pixels * c), pixels, [&](int64_t begin, int64_t end) {
              HWY_DYNAMIC_DISPATCH(relu_loop)
              (r.in<float>(in) + begin * c, end - begin, c,
               r.out<float>(y) + begin * to.channels + to.offset, to.channels);
            });
          }};
}

Call CpuBackend::pool(const PoolDesc& d, In in, Out y, const Columns& to) {
  DDPM_CHECK(d.valid() && to.hold(d.x.c), "pool: %dx%d of %s, pad %d, to channel %d of %d", d.r,
             d.s, to_string(d.x).c_str(), d.pad, to.offset, to.channels);
  const Shape out = d.y();
  const int64_t work = out.count() * d.r * d.s;
  return {"pool", {in}, {y}, 0, [=, threads = threads_](const Run& r) {
            const int64_t row = int64_t{d.x.w} * d.x.c;
            const auto pixel = [&](int64_t image_row, int q) {
              const int64_t n = image_row / out.h;
              const int top = static_cast<int>(image_row % out.h) * d.stride - d.pad;
              const int left = q * d.stride - d.pad;
              const int h0 = std::max(top, 0), h1 = std::min(top + d.r, d.x.h);
              const int w0 = std::max(left, 0), w1 = std::min(left + d.s, d.x.w);
              const float* x = r.in<float>(in) + ((n * d.x.h + h0) * d.x.w + w0) * d.x.c;
              float* to_pixel = r.out<float>(y) + (image_row * out.w + q) * to.channels + to.offset;
              HWY_DYNAMIC_DISPATCH(pool_loop)
              (x, row, h1 - h0, w1 - w0, d.x.c, d.average, to_pixel);
            };
            parallel_for(threads_for(threads, work), int64_t{out.n} * out.h,
                         [&](int64_t begin, int64_t end) {
                           for (int64_t i = begin; i < end; ++i)
                             for (int q = 0; q < out.w; ++q) pixel(i, q);
                         });
          }};
}

namespace {

// Of an axis of `from` elements that becomes `to`: element i lies at ((2 i + 1) from - to) / (2
// to).
std::vector<Between> neighbours(int64_t from, int64_t to) {
  std::vector<Between> all;
  for (int64_t i = 0; i < to; ++i) {
    const int64_t place = std::max<int64_t>((2 * i + 1) * from - to, 0);
    const int64_t first = place / (2 * to);
    all.push_back({first, std::min(first + 1, from - 1),
                   static_cast<float>(place % (2 * to)) / static_cast<float>(2 * to)});
  }
  return all;
}

}  // namespace

Call CpuBackend::resize(const Shape& x, int h, int w, In in, Out y) {
  DDPM_CHECK(x.positive() && h > 0 && w > 0, "resize: %s to %dx%d", to_string(x).c_str(), h, w);
  const auto rows = std::make_shared<const std::vector<Between>>(neighbours(x.h, h));
  const auto columns = std::make_shared<const std::vector<Between>>(neighbours(x.w, w));
  return {"resize", {in}, {y}, 0, [=, threads = threads_](const Run& r) {
            const int64_t from_row = int64_t{x.w} * x.c, to_row = int64_t{w} * x.c;
            parallel_for(threads_for(threads, x.n * h * to_row), int64_t{x.n} * h,
                         [&](int64_t begin, int64_t end) {
                           for (int64_t i = begin; i < end; ++i) {
                             const float* image = r.in<float>(in) + i / h * x.h * from_row;
                             const Between& at = (*rows)[static_cast<size_t>(i % h)];
                             HWY_DYNAMIC_DISPATCH(resize_row_loop)
                             (image + at.first * from_row, image + at.second * from_row,
                              at.second_weight, columns->data(), w, x.c,
                              r.out<float>(y) + i * to_row);
                           }
                         });
          }};
}

}  // namespace ddpm::cpu
#endif
