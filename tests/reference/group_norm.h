// Group norm, SiLU and dropout in double, on one concatenated input.
#pragma once

#include <cmath>
#include <vector>

#include "kernels/desc.h"
#include "kernels/philox.h"
#include "kernels/step_state.h"
#include "tests/reference/pointwise.h"

namespace ddpm::ref {

// What dropout multiplies each element of (N,H,W,C) by: 0 or 1 / (1 - p).
inline Vector dropout_factor(const Shape& s, const Dropout& dropout, const StepState& state) {
  Vector factor;
  for (int n = 0; n < s.n; ++n)
    for (int64_t i = 0; i < s.pixels() * s.c; ++i) {
      const RandomStream stream{.seed = state.seed,
                                .purpose = Purpose::kDropout,
                                .sample = state.first_image + static_cast<uint64_t>(n),
                                .step = static_cast<uint32_t>(state.step),
                                .layer = dropout.layer};
      const uint32_t word = stream.block(static_cast<uint32_t>(i / 8))[i % 8 / 2];
      const uint32_t draw = i % 2 == 0 ? word % 65536 : word / 65536;
      const double p = static_cast<double>(dropout.p);
      factor.push_back(draw < std::round(p * 65536) ? 0 : 1 / (1 - p));
    }
  return factor;
}

struct GroupNorm {
  Vector mean, rstd;  // (N,G)
  Vector normalised;  // (N,H,W,C), before the affine part
  Vector y;
};

// x (N,H,W,C) is the concatenation; factor as above, or empty.
inline GroupNorm group_norm(const GroupNormDesc& d, const Vector& x, const Vector& gamma,
                            const Vector& beta, const Vector& factor) {
  const int64_t pixels = d.x.pixels(), channels = d.c(), size = channels / d.groups;
  const double count = static_cast<double>(pixels * size);
  GroupNorm out;
  out.normalised.resize(x.size());
  out.y.resize(x.size());
  for (int64_t n = 0; n < d.x.n; ++n)
    for (int64_t g = 0; g < d.groups; ++g) {
      const auto each = [&](const auto& f) {
        for (int64_t p = 0; p < pixels; ++p)
          for (int64_t c = g * size; c < (g + 1) * size; ++c) f((n * pixels + p) * channels + c, c);
      };
      double sum = 0, squares = 0;
      each([&](int64_t i, int64_t) { sum += x[i]; });
      const double mean = sum / count;
      each([&](int64_t i, int64_t) { squares += (x[i] - mean) * (x[i] - mean); });
      const double rstd = 1 / std::sqrt(squares / count + static_cast<double>(d.epsilon));
      out.mean.push_back(mean);
      out.rstd.push_back(rstd);
      each([&](int64_t i, int64_t c) {
        out.normalised[i] = (x[i] - mean) * rstd;
        const double z = out.normalised[i] * gamma[c] + beta[c];
        out.y[i] = (d.silu ? silu(z) : z) * (factor.empty() ? 1 : factor[i]);
      });
    }
  return out;
}

struct GroupNormGradient {
  Vector dx, dgamma, dbeta;
};

inline GroupNormGradient group_norm_backward(const GroupNormDesc& d, const Vector& x,
                                             const Vector& gamma, const Vector& beta,
                                             const Vector& factor, const Vector& dy) {
  const GroupNorm forward = group_norm(d, x, gamma, beta, factor);
  const int64_t pixels = d.x.pixels(), channels = d.c(), size = channels / d.groups;
  const double count = static_cast<double>(pixels * size);
  GroupNormGradient out{Vector(x.size()), Vector(channels), Vector(channels)};
  for (int64_t n = 0; n < d.x.n; ++n)
    for (int64_t g = 0; g < d.groups; ++g) {
      const auto each = [&](const auto& f) {
        for (int64_t p = 0; p < pixels; ++p)
          for (int64_t c = g * size; c < (g + 1) * size; ++c) {
            const int64_t i = (n * pixels + p) * channels + c;
            const double xhat = forward.normalised[i];
            double dz = dy[i] * (factor.empty() ? 1 : factor[i]);
            if (d.silu) dz *= silu_slope(xhat * gamma[c] + beta[c]);
            f(i, c, xhat, dz);
          }
      };
      double mean_dxhat = 0, mean_product = 0;
      each([&](int64_t, int64_t c, double xhat, double dz) {
        out.dgamma[c] += dz * xhat;
        out.dbeta[c] += dz;
        mean_dxhat += dz * gamma[c] / count;
        mean_product += dz * gamma[c] * xhat / count;
      });
      const double rstd = forward.rstd[n * d.groups + g];
      each([&](int64_t i, int64_t c, double xhat, double dz) {
        out.dx[i] = rstd * (dz * gamma[c] - mean_dxhat - xhat * mean_product);
      });
    }
  return out;
}

}  // namespace ddpm::ref
