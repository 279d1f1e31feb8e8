// The gradient's norm and torch.optim.Adam with clip_grad_norm_, warm-up, cool-down and EMA, in
// double.
// Written as the textbook has it: corrected moments, then the step.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "kernels/desc.h"

namespace ddpm::ref {

inline double norm(const std::vector<double>& gradients) {
  double sum = 0;
  for (double g : gradients) sum += g * g;
  return std::sqrt(sum);
}

inline double learning_rate(const AdamDesc& d, int64_t n) {
  double rate = d.learning_rate;
  if (n < d.warmup_steps) rate *= static_cast<double>(n) / static_cast<double>(d.warmup_steps);
  const int64_t left = std::max<int64_t>(d.steps - n, 0);
  if (left < d.cooldown_steps)
    rate *= static_cast<double>(left) / static_cast<double>(d.cooldown_steps);
  return rate;
}

struct Adam {
  std::vector<double> weights, m, v, ema;

  // Update number n, 0 for the first.
  void update(const AdamDesc& d, const std::vector<double>& gradients, int64_t n) {
    const double total = norm(gradients), power = static_cast<double>(n + 1);
    const double clip = d.grad_clip > 0 ? std::min(1.0, d.grad_clip / (total + 1e-6)) : 1.0;
    for (size_t i = 0; i < weights.size(); ++i) {
      const double g = gradients[i] * clip;
      m[i] = d.beta1 * m[i] + (1 - d.beta1) * g;
      v[i] = d.beta2 * v[i] + (1 - d.beta2) * g * g;
      const double m_hat = m[i] / (1 - std::pow(d.beta1, power));
      const double v_hat = v[i] / (1 - std::pow(d.beta2, power));
      weights[i] -= learning_rate(d, n) * m_hat / (std::sqrt(v_hat) + d.epsilon);
      ema[i] = d.ema_decay * ema[i] + (1 - d.ema_decay) * weights[i];
    }
  }
};

}  // namespace ddpm::ref
