// One update of Adam as numbers: the same for every element, and on every device.
#pragma once

#include <algorithm>
#include <cstdint>

#include "kernels/desc.h"
#include "kernels/step_state.h"

namespace ddpm {

// Of update n, 0 for the first.
constexpr double learning_rate(const AdamDesc& d, double n) {
  double rate = d.learning_rate;
  if (d.warmup_steps > 0) rate *= std::min(n / static_cast<double>(d.warmup_steps), 1.0);
  if (d.cooldown_steps > 0)
    rate *= std::clamp((static_cast<double>(d.steps) - n) / static_cast<double>(d.cooldown_steps),
                       0.0, 1.0);
  return rate;
}

struct AdamFactors {
  float clip, rest1, beta2, rest2;  // of the gradient; 1 - beta1; beta2; 1 - beta2
  float step_size;                  // learning rate / (1 - beta1^(n+1))
  float denominator;                // 1 / sqrt(1 - beta2^(n+1))
  float epsilon, ema_rest;          // ema_rest = 1 - decay
};

// power1 = beta1^(n+1), root2 = sqrt(1 - beta2^(n+1)), n the state's step: host and device have
// functions of their own for these two.
constexpr AdamFactors adam_factors(const AdamDesc& d, const StepState& s, double power1,
                                   double root2) {
  const double clip = d.grad_clip > 0
                          ? std::min(1.0, d.grad_clip / (static_cast<double>(s.grad_norm) + 1e-6))
                          : 1.0;
  const double rate = learning_rate(d, static_cast<double>(s.step));
  return {.clip = static_cast<float>(clip),
          .rest1 = static_cast<float>(1 - d.beta1),
          .beta2 = static_cast<float>(d.beta2),
          .rest2 = static_cast<float>(1 - d.beta2),
          .step_size = static_cast<float>(rate / (1 - power1)),
          .denominator = static_cast<float>(1 / root2),
          .epsilon = static_cast<float>(d.epsilon),
          .ema_rest = static_cast<float>(1 - d.ema_decay)};
}

}  // namespace ddpm
