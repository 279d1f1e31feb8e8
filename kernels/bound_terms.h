// The variational bound's terms for one element, in nats, with their slopes: the same formulas in
// float and in double, on host and device, written so that nothing cancels.
#pragma once

#include <cmath>

namespace ddpm {

// `error` is the model's mean minus the true one, `log_variance` the model's.
template <typename Real>
struct BoundSlopes {
  Real nats = 0;
  Real by_error = 0, by_log_variance = 0;
};

// KL(N(m, e^lv) || N(m + error, e^(lv + excess))) (Ho et al. 2020, eq. 5).
template <typename Real>
constexpr BoundSlopes<Real> kl_term(Real error, Real lv, Real excess) {
  const Real pull = error * std::exp(-(lv + excess)), square = error * pull;
  const Real shrink = std::expm1(-excess);  // e^-excess - 1
  const Real half = Real(0.5);
  return {half * (excess + shrink + square), pull, -half * (shrink + square)};
}

template <typename Real>
constexpr Real logistic(Real x) {
  return 1 / (1 + std::exp(-x));
}
// log(1 + e^x)
template <typename Real>
constexpr Real softplus(Real x) {
  return (x > 0 ? x : 0) + std::log1p(std::exp(-std::abs(x)));
}

// -log p(x) of a level x = u / 127.5 - 1 under N(x + error, e^log_variance), integrated over the
// level's width, from minus infinity at 0 and to infinity at 255 (eq. 13); p is at least 1e-12,
// where the slopes are 0. The distribution function is the authors' approximation, off by at most
// 1.8e-4: 0.5 (1 + tanh(sqrt(2 / pi) (z + 0.044715 z^3))), which is logistic(u(z)) with
// u = scale (z + 0.044715 z^3). With a = u(above) and b = u(below) the difference of two is
// logistic(a) logistic(-b) (1 - e^(b-a)).
template <typename Real>
constexpr BoundSlopes<Real> decoder_term(Real x, Real error, Real log_variance) {
  constexpr Real kHalfLevel = Real(1 / 255.0), kCube = Real(0.044715);
  constexpr Real kEnd = Real(0.999);                // the levels beyond are 0 and 255 alone
  constexpr Real kMost = Real(27.631021115928547);  // -log 1e-12
  constexpr Real kScale = Real(2 * 0.7978845608028654);
  const Real inverse = std::exp(Real(-0.5) * log_variance);
  const Real above = inverse * (kHalfLevel - error), below = inverse * (-kHalfLevel - error);
  const Real width = 2 * kHalfLevel * inverse;  // above - below
  const bool lowest = x<-kEnd, highest = x> kEnd;

  const Real a = kScale * above * (1 + kCube * above * above);
  const Real b = kScale * below * (1 + kCube * below * below);
  // Weights of du/dz at both ends in d nats / d z.
  const Real up = highest ? Real(0) : logistic(-a), down = lowest ? Real(0) : logistic(b);
  const Real slope_a = kScale * (1 + 3 * kCube * above * above);
  const Real slope_b = kScale * (1 + 3 * kCube * below * below);
  Real log_p = 0, by_z = up * slope_a - down * slope_b;
  Real by_scale = above * up * slope_a - below * down * slope_b;
  if (!highest) log_p -= softplus(-a);
  if (!lowest) log_p -= softplus(b);
  if (!lowest && !highest) {
    const Real squares = above * above + above * below + below * below;
    const Real gap = kScale * width * (1 + kCube * squares);  // a - b
    const Real share = 1 / std::expm1(gap);
    log_p += std::log(-std::expm1(-gap));
    by_z += share * 3 * kScale * kCube * width * (above + below);
    by_scale += share * kScale * width * (1 + 3 * kCube * squares);
  }
  // What is infinite becomes NaN here, rather than being hidden.
  if (log_p < -kMost) return {kMost + 0 * (error + log_variance), 0, 0};
  return {-log_p, inverse * by_z, Real(0.5) * by_scale};
}

}  // namespace ddpm
