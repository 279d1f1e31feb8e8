// ReLU, pooling and bilinear resizing in double, by index.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "kernels/desc.h"
#include "tests/reference/resample.h"

namespace ddpm::ref {

inline Vector relu(const Vector& x) {
  Vector y;
  for (const double v : x) y.push_back(v < 0 ? 0 : v);
  return y;
}

inline Vector pool(const PoolDesc& d, const Vector& x) {
  Vector y;
  for_each(d.y(), [&](int64_t n, int64_t p, int64_t q, int64_t c) {
    double sum = 0, most = -std::numeric_limits<double>::infinity();
    int count = 0;
    for (int64_t r = 0; r < d.r; ++r)
      for (int64_t s = 0; s < d.s; ++s) {
        const int64_t h = p * d.stride - d.pad + r, w = q * d.stride - d.pad + s;
        if (h < 0 || h >= d.x.h || w < 0 || w >= d.x.w) continue;
        const double v = x[index_of(d.x, n, h, w, c)];
        sum += v;
        most = std::max(most, v);
        ++count;
      }
    y.push_back(d.average ? sum / count : most);
  });
  return y;
}

// PyTorch's interpolate(mode="bilinear", align_corners=False).
inline Vector resize(const Shape& s, int h, int w, const Vector& x) {
  const auto place = [](int64_t i, int from, int to) {
    return std::max((static_cast<double>(i) + 0.5) * from / to - 0.5, 0.0);
  };
  Vector y;
  for_each({s.n, h, w, s.c}, [&](int64_t n, int64_t i, int64_t j, int64_t c) {
    const double row = place(i, s.h, h), column = place(j, s.w, w);
    double sum = 0;
    for (int64_t m = 0; m < s.h; ++m)
      for (int64_t k = 0; k < s.w; ++k) {
        // Behind the last pixel the image goes on as it ends.
        const double down =
            std::max(1 - std::abs(std::min(row, s.h - 1.0) - static_cast<double>(m)), 0.0);
        const double across =
            std::max(1 - std::abs(std::min(column, s.w - 1.0) - static_cast<double>(k)), 0.0);
        if (down * across > 0) sum += down * across * x[index_of(s, n, m, k, c)];
      }
    y.push_back(sum);
  });
  return y;
}

}  // namespace ddpm::ref
