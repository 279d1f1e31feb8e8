// What one element adds to a training loss: the same in float and in double, on host and device.
#pragma once

#include <numbers>

#include "kernels/bound_terms.h"
#include "kernels/desc.h"

namespace ddpm {

template <typename Real>
struct ElementLoss {
  Real value = 0;
  Real by_mean = 0, by_variance = 0;  // slopes by the two halves of the network's output
};

// mean, variance: the network's output; variance 0 where there is none.
template <typename Real>
constexpr ElementLoss<Real> element_loss(const DiffusionLossDesc& d, const LossFactors& f,
                                         bool decoder, Real mean, Real variance, Real target,
                                         Real x0) {
  const Real difference = mean - target;
  const ElementLoss<Real> square{difference * difference, 2 * difference, 0};
  if (d.loss == LossKind::kSimple) return square;
  const Real error = Real(f.mean) * difference, slope = Real(f.excess_slope);
  const Real excess = Real(f.excess) + slope * variance, lv = Real(f.log_variance);
  const BoundSlopes<Real> term =
      decoder ? decoder_term(x0, error, lv + excess) : kl_term(error, lv, excess);
  constexpr Real kBits = Real(1 / std::numbers::ln2);
  if (d.loss == LossKind::kKl)
    return {kBits * term.nats, kBits * Real(f.mean) * term.by_error,
            kBits * slope * term.by_log_variance};
  const Real weight = kBits * static_cast<Real>(d.timesteps) / 1000;
  return {square.value + weight * term.nats, square.by_mean, weight * slope * term.by_log_variance};
}

}  // namespace ddpm
