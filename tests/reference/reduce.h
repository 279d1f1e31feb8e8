// Sums and statistics in double, straight from their definitions.
#pragma once

#include <algorithm>
#include <vector>

#include "kernels/desc.h"

namespace ddpm::ref {

using Vector = std::vector<double>;

// (N, tiles, C, 2): mean and sum of squared deviations.
inline Vector channel_stats(const StatsDesc& d, const Vector& x) {
  Vector stats;
  const int64_t pixels = d.x.pixels(), c_count = d.x.c;
  for (int64_t n = 0; n < d.x.n; ++n)
    for (int64_t begin = 0; begin < pixels; begin += d.tile)
      for (int64_t c = 0; c < c_count; ++c) {
        const int64_t end = std::min(begin + d.tile, pixels);
        double sum = 0, squares = 0;
        for (int64_t p = begin; p < end; ++p) sum += x[(n * pixels + p) * c_count + c];
        const double mean = sum / static_cast<double>(end - begin);
        for (int64_t p = begin; p < end; ++p) {
          const double v = x[(n * pixels + p) * c_count + c] - mean;
          squares += v * v;
        }
        stats.push_back(mean);
        stats.push_back(squares);
      }
  return stats;
}

// (N, C)
inline Vector pixel_sum(const Shape& s, const Vector& x) {
  Vector sums(static_cast<size_t>(s.n) * s.c, 0.0);
  for (int64_t n = 0; n < s.n; ++n)
    for (int64_t p = 0; p < s.pixels(); ++p)
      for (int64_t c = 0; c < s.c; ++c) sums[n * s.c + c] += x[(n * s.pixels() + p) * s.c + c];
  return sums;
}

inline Vector row_sum(int rows, int columns, int stride, int offset, const Vector& x) {
  Vector sums(static_cast<size_t>(columns), 0.0);
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < columns; ++c) sums[c] += x[r * stride + offset + c];
  return sums;
}

}  // namespace ddpm::ref
