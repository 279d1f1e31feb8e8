// Concatenation along channels, nearest x2 upsampling, and their backward passes.
#include <algorithm>
#include <cstring>
#include <vector>

#include "kernels/cpu/cpu_backend.h"
#include "kernels/cpu/parallel.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/resample.cpp"
#include <hwy/foreach_target.h>

#include "kernels/cpu/simd-inl.h"

HWY_BEFORE_NAMESPACE();
namespace ddpm::cpu::HWY_NAMESPACE {

// to (rows, length) (+)= from, rows `from_stride` and `to_stride` apart.
void copy_rows_loop(const float* from, int64_t from_stride, float* to, int64_t to_stride,
                    int64_t rows, int64_t length, bool accumulate) {
  for (int64_t r = 0; r < rows; ++r, from += from_stride, to += to_stride)
    for (int64_t i = 0; i < length; i += lanes()) {
      Float v = load(from + i, length - i);
      if (accumulate) v = hn::Add(load(to + i, length - i), v);
      store(v, to + i, length - i);
    }
}

// Rows y[2i] and y[2i + 1] (2W,C) of row x[i] (W,C).
void upsample_row_loop(const float* x, int64_t w, int64_t c, float* y) {
  const int64_t row = 2 * w * c;
  for (int64_t p = 0; p < w; ++p, x += c, y += 2 * c)
    for (int64_t i = 0; i < c; i += lanes()) {
      const int64_t left = c - i;
      const Float v = load(x + i, left);
      store(v, y + i, left);
      store(v, y + c + i, left);
      store(v, y + row + i, left);
      store(v, y + row + c + i, left);
    }
}

// Row dx[i] (W,C) (+)= the four gradients of each pixel in rows dy[2i] and dy[2i + 1] (2W,C).
void upsample_backward_row_loop(const float* dy, int64_t w, int64_t c, bool accumulate, float* dx) {
  const int64_t row = 2 * w * c;
  for (int64_t p = 0; p < w; ++p, dx += c, dy += 2 * c)
    for (int64_t i = 0; i < c; i += lanes()) {
      const int64_t left = c - i;
      const Float top = hn::Add(load(dy + i, left), load(dy + c + i, left));
      const Float bottom = hn::Add(load(dy + row + i, left), load(dy + row + c + i, left));
      Float v = hn::Add(top, bottom);
      if (accumulate) v = hn::Add(load(dx + i, left), v);
      store(v, dx + i, left);
    }
}

}  // namespace ddpm::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace ddpm::cpu {

HWY_EXPORT(copy_rows_loop);
HWY_EXPORT(upsample_row_loop);
HWY_EXPORT(upsample_backward_row_loop);

Call CpuBackend::concat(const Shape& x, int c2, In in, In x2, Out y) {
  DDPM_CHECK(x.positive() && c2 > 0, "concat: x %s and %d channels", to_string(x).c_str(), c2);
  const int64_t pixels = x.n * x.pixels(), c1 = x.c, c = x.c + c2;
  return {"concat", {in, x2}, {y}, 0, [=, threads = threads_](const Run& r) {
            parallel_for(threads_for(threads, pixels * c), pixels, [&](int64_t begin, int64_t end) {
              float* to = r.out<float>(y) + begin * c;
              HWY_DYNAMIC_DISPATCH(copy_rows_loop)
              (r.in<float>(in) + begin * c1, c1, to, c, end - begin, c1, false);
              HWY_DYNAMIC_DISPATCH(copy_rows_loop)
              (r.in<float>(x2) + begin * c2, c2, to + c1, c, end - begin, c2, false);
            });
          }};
}

Call CpuBackend::split(const Shape& x, int c2, In dy, Out dx, Write write, Out dx2, Write write2) {
  DDPM_CHECK(x.positive() && c2 > 0, "split: x %s and %d channels", to_string(x).c_str(), c2);
  const int64_t pixels = x.n * x.pixels(), c1 = x.c, c = x.c + c2;
  return {"split", {dy}, {dx, dx2}, 0, [=, threads = threads_](const Run& r) {
            parallel_for(threads_for(threads, pixels * c), pixels, [&](int64_t begin, int64_t end) {
              const float* from = r.in<float>(dy) + begin * c;
              HWY_DYNAMIC_DISPATCH(copy_rows_loop)
              (from, c, r.out<float>(dx) + begin * c1, c1, end - begin, c1,
               write == Write::kAccumulate);
              HWY_DYNAMIC_DISPATCH(copy_rows_loop)
              (from + c1, c, r.out<float>(dx2) + begin * c2, c2, end - begin, c2,
               write2 == Write::kAccumulate);
            });
          }};
}

Call CpuBackend::upsample(const Shape& x, In in, Out y) {
  DDPM_CHECK(x.positive(), "upsample: x %s", to_string(x).c_str());
  return {"upsample", {in}, {y}, 0, [=, threads = threads_](const Run& r) {
            const int64_t row = int64_t{x.w} * x.c;
            parallel_for(threads_for(threads, 4 * x.count()), int64_t{x.n} * x.h,
                         [&](int64_t begin, int64_t end) {
                           for (int64_t i = begin; i < end; ++i)
                             HWY_DYNAMIC_DISPATCH(upsample_row_loop)
                           (r.in<float>(in) + i * row, x.w, x.c, r.out<float>(y) + i * row * 4);
                         });
          }};
}

Call CpuBackend::upsample_backward(const Shape& x, In dy, Out dx, Write write) {
  DDPM_CHECK(x.positive(), "upsample_backward: x %s", to_string(x).c_str());
  return {"upsample_backward", {dy}, {dx}, 0, [=, threads = threads_](const Run& r) {
            const int64_t row = int64_t{x.w} * x.c;
            parallel_for(threads_for(threads, 4 * x.count()), int64_t{x.n} * x.h,
                         [&](int64_t begin, int64_t end) {
                           for (int64_t i = begin; i < end; ++i)
                             HWY_DYNAMIC_DISPATCH(upsample_backward_row_loop)
                           (r.in<float>(dy) + i * row * 4, x.w, x.c, write == Write::kAccumulate,
                            r.out<float>(dx) + i * row);
                         });
          }};
}

}  // namespace ddpm::cpu
#endif
