// SiLU and the embeddings in double, straight from their formulas.
#pragma once

#include <cmath>
#include <cstdint>
#include <vector>

#include "kernels/desc.h"

namespace ddpm::ref {

using Vector = std::vector<double>;

inline double silu(double x) { return x / (1 + std::exp(-x)); }  // -0 where exp overflows

// sigmoid + x sigmoid', by exp(-|x|), which does not overflow.
inline double silu_slope(double x) {
  const double e = std::exp(-std::abs(x));
  return (x < 0 ? e : 1) / (1 + e) + x * e / ((1 + e) * (1 + e));
}

inline Vector silu(const Vector& x) {
  Vector y;
  for (const double v : x) y.push_back(silu(v));
  return y;
}

inline Vector silu_backward(const Vector& x, const Vector& dy) {
  Vector dx;
  for (size_t i = 0; i < x.size(); ++i) dx.push_back(dy[i] * silu_slope(x[i]));
  return dx;
}

inline Vector embedding(int dim, const Vector& table, const std::vector<int32_t>& index) {
  Vector y;
  for (const int32_t row : index)
    for (int i = 0; i < dim; ++i) y.push_back(table.at(static_cast<size_t>(row) * dim + i));
  return y;
}

inline Vector embedding_backward(int rows, int dim, const std::vector<int32_t>& index,
                                 const Vector& dy) {
  Vector dtable(static_cast<size_t>(rows) * dim, 0.0);
  for (size_t n = 0; n < index.size(); ++n)
    for (int i = 0; i < dim; ++i)
      dtable.at(static_cast<size_t>(index[n]) * dim + i) += dy[n * dim + i];
  return dtable;
}

inline Vector step_row(int n, int dim, const Vector& table, uint64_t step) {
  return embedding(dim, table,
                   std::vector<int32_t>(static_cast<size_t>(n), static_cast<int32_t>(step)));
}

inline Vector time_embedding(const TimeEmbeddingDesc& d, const std::vector<int32_t>& t) {
  const int half = d.dim / 2;
  Vector y;
  for (const int32_t step : t)
    for (int i = 0; i < d.dim; ++i) {
      const double angle =
          step * std::pow(10000.0, -static_cast<double>(i % half) / (half - d.freq_shift));
      const bool sine = (i < half) != d.flip_sin_to_cos;
      y.push_back(i >= 2 * half ? 0 : sine ? std::sin(angle) : std::cos(angle));
    }
  return y;
}

}  // namespace ddpm::ref
