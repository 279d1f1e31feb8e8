// Concatenation and nearest upsampling in double, by index.
#pragma once

#include <vector>

#include "kernels/shape.h"

namespace ddpm::ref {

using Vector = std::vector<double>;

inline size_t index_of(const Shape& s, int64_t n, int64_t h, int64_t w, int64_t c) {
  return static_cast<size_t>(((n * s.h + h) * s.w + w) * s.c + c);
}

// Calls f(n, h, w, c) for every element in memory order.
template <typename F>
void for_each(const Shape& s, const F& f) {
  for (int64_t n = 0; n < s.n; ++n)
    for (int64_t h = 0; h < s.h; ++h)
      for (int64_t w = 0; w < s.w; ++w)
        for (int64_t c = 0; c < s.c; ++c) f(n, h, w, c);
}

inline Vector concat(const Shape& s, int c2, const Vector& x, const Vector& x2) {
  const Shape s2{s.n, s.h, s.w, c2};
  Vector y;
  for_each({s.n, s.h, s.w, s.c + c2}, [&](int64_t n, int64_t h, int64_t w, int64_t c) {
    y.push_back(c < s.c ? x[index_of(s, n, h, w, c)] : x2[index_of(s2, n, h, w, c - s.c)]);
  });
  return y;
}

// Channels [first, first + count) of y.
inline Vector channels(const Shape& y_shape, const Vector& y, int first, int count) {
  Vector x;
  for_each({y_shape.n, y_shape.h, y_shape.w, count},
           [&](int64_t n, int64_t h, int64_t w, int64_t c) {
             x.push_back(y[index_of(y_shape, n, h, w, first + c)]);
           });
  return x;
}

inline Vector upsample(const Shape& s, const Vector& x) {
  Vector y;
  for_each({s.n, 2 * s.h, 2 * s.w, s.c}, [&](int64_t n, int64_t h, int64_t w, int64_t c) {
    y.push_back(x[index_of(s, n, h / 2, w / 2, c)]);
  });
  return y;
}

inline Vector upsample_backward(const Shape& s, const Vector& dy) {
  const Shape big{s.n, 2 * s.h, 2 * s.w, s.c};
  Vector dx(static_cast<size_t>(s.count()), 0.0);
  for_each(big, [&](int64_t n, int64_t h, int64_t w, int64_t c) {
    dx[index_of(s, n, h / 2, w / 2, c)] += dy[index_of(big, n, h, w, c)];
  });
  return dx;
}

}  // namespace ddpm::ref
