// Matrix products in double, straight from the formula.
#pragma once

#include <vector>

#include "kernels/desc.h"

namespace ddpm::ref {

using Vector = std::vector<double>;

// c = op(a) op(b) + bias + residual; an empty vector is an absent term.
inline Vector gemm(const GemmDesc& g, const Vector& a, const Vector& b, const Vector& bias,
                   const Vector& residual) {
  Vector c;
  c.reserve(static_cast<size_t>(g.batch) * g.m * g.n);
  for (int64_t t = 0; t < g.batch; ++t)
    for (int64_t i = 0; i < g.m; ++i)
      for (int64_t j = 0; j < g.n; ++j) {
        double sum = 0;
        for (int64_t l = 0; l < g.k; ++l) {
          const double at = a[t * g.m * g.k + (g.transpose_a ? l * g.m + i : i * g.k + l)];
          const double bt = b[t * g.k * g.n + (g.transpose_b ? j * g.k + l : l * g.n + j)];
          sum += at * bt;
        }
        if (!bias.empty()) sum += bias[j];
        if (!residual.empty()) sum += residual[(t * g.m + i) * g.n + j];
        c.push_back(sum);
      }
  return c;
}

}  // namespace ddpm::ref
