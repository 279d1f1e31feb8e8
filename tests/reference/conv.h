// Convolutions in double with everything a ConvDesc can say, straight from the formulas.
#pragma once

#include <cmath>
#include <vector>

#include "kernels/desc.h"

namespace ddpm::ref {

using Vector = std::vector<double>;

// Tensors of a convolution; what the desc does not name stays empty.
struct ConvTensors {
  Vector x{}, x2{};                // (N,H,W,C1), (N,H,W,c2)
  Vector scale_shift{};            // (N,C,2)
  Vector mask{};                   // (N,H,W,C): dropout's factors, 0 or 1 / (1 - p); empty = none
  Vector filter{}, bias{};         // (K,R,S,C), (K)
  Vector sample_bias{};            // (N, sample_bias_stride)
  Vector residual{};               // (N,P,Q,K)
  Vector shortcut{}, shortcut2{};  // (N,P,Q,shortcut_c), (N,P,Q,shortcut_c2)
  Vector shortcut_filter{}, shortcut_bias{};  // (K, shortcut_c + shortcut_c2), (K)
};

// What the taps see: concatenated, transformed, upsampled; (N, in_h, in_w, C).
inline Vector conv_input(const ConvDesc& d, const ConvTensors& t) {
  const int c1 = d.x.c, c = d.c(), up = d.upsample ? 2 : 1;
  Vector out;
  out.reserve(static_cast<size_t>(d.x.n) * d.in_h() * d.in_w() * c);
  for (int64_t n = 0; n < d.x.n; ++n)
    for (int i = 0; i < d.in_h(); ++i)
      for (int j = 0; j < d.in_w(); ++j) {
        const int64_t pixel = (n * d.x.h + i / up) * d.x.w + j / up;
        for (int k = 0; k < c; ++k) {
          double v = k < c1 ? t.x[pixel * c1 + k] : t.x2[pixel * d.c2 + (k - c1)];
          if (d.transform.affine)
            v = v * t.scale_shift[(n * c + k) * 2] + t.scale_shift[(n * c + k) * 2 + 1];
          if (d.transform.silu) v = v / (1 + std::exp(-v));
          if (!t.mask.empty()) v *= t.mask[pixel * c + k];
          out.push_back(v);
        }
      }
  return out;
}

// Calls visit(output pixel, tap, input pixel) for every product that does not fall on padding.
template <typename Visit>
void conv_taps(const ConvDesc& d, const Visit& visit) {
  for (int64_t n = 0; n < d.x.n; ++n)
    for (int p = 0; p < d.p(); ++p)
      for (int q = 0; q < d.q(); ++q)
        for (int r = 0; r < d.r; ++r)
          for (int s = 0; s < d.s; ++s) {
            const int i = p * d.stride + r - d.pad_top, j = q * d.stride + s - d.pad_left;
            if (i < 0 || i >= d.in_h() || j < 0 || j >= d.in_w()) continue;
            visit((n * d.p() + p) * d.q() + q, int64_t{r} * d.s + s,
                  (n * d.in_h() + i) * d.in_w() + j);
          }
}

inline Vector conv_forward(const ConvDesc& d, const ConvTensors& t) {
  const Vector x = conv_input(d, t);
  const int64_t c = d.c(), taps = int64_t{d.r} * d.s, pixels = d.y().pixels();
  Vector y(static_cast<size_t>(d.y().count()), 0.0);
  conv_taps(d, [&](int64_t out, int64_t tap, int64_t in) {
    for (int64_t k = 0; k < d.k; ++k) {
      double sum = 0;
      for (int64_t i = 0; i < c; ++i) sum += x[in * c + i] * t.filter[(k * taps + tap) * c + i];
      y[out * d.k + k] += sum;
    }
  });
  const int64_t sc = d.shortcut_c, sc2 = d.shortcut_c2;
  for (int64_t out = 0; out < d.x.n * pixels; ++out)
    for (int64_t k = 0; k < d.k; ++k) {
      double& v = y[out * d.k + k];
      if (d.bias) v += t.bias[k];
      if (d.sample_bias_stride > 0)
        v += t.sample_bias[out / pixels * d.sample_bias_stride + d.sample_bias_offset + k];
      if (d.residual) v += t.residual[out * d.k + k];
      if (!t.shortcut_bias.empty()) v += t.shortcut_bias[k];
      for (int64_t i = 0; i < sc; ++i)
        v += t.shortcut[out * sc + i] * t.shortcut_filter[k * (sc + sc2) + i];
      for (int64_t i = 0; i < sc2; ++i)
        v += t.shortcut2[out * sc2 + i] * t.shortcut_filter[k * (sc + sc2) + sc + i];
    }
  return y;
}

// The gradient by conv_input's result, (N, in_h, in_w, C).
inline Vector conv_dgrad(const ConvDesc& d, const Vector& filter, const Vector& dy) {
  const int64_t c = d.c(), taps = int64_t{d.r} * d.s;
  Vector dx(static_cast<size_t>(d.x.n) * d.in_h() * d.in_w() * c, 0.0);
  conv_taps(d, [&](int64_t out, int64_t tap, int64_t in) {
    for (int64_t k = 0; k < d.k; ++k)
      for (int64_t i = 0; i < c; ++i)
        dx[in * c + i] += dy[out * d.k + k] * filter[(k * taps + tap) * c + i];
  });
  return dx;
}

// The gradient by the filter, (K,R,S,C), from conv_input's result.
inline Vector conv_wgrad(const ConvDesc& d, const Vector& x, const Vector& dy) {
  const int64_t c = d.c(), taps = int64_t{d.r} * d.s;
  Vector dfilter(static_cast<size_t>(d.filter().count()), 0.0);
  conv_taps(d, [&](int64_t out, int64_t tap, int64_t in) {
    for (int64_t k = 0; k < d.k; ++k)
      for (int64_t i = 0; i < c; ++i)
        dfilter[(k * taps + tap) * c + i] += dy[out * d.k + k] * x[in * c + i];
  });
  return dfilter;
}

}  // namespace ddpm::ref
