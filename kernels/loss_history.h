// Drawing timesteps by their losses (Nichol & Dhariwal 2021, section 3.3): what every backend
// computes of a row of the history, see Backend::draw_timesteps_by_loss.
#pragma once

#include <cmath>

#include "kernels/desc.h"

namespace ddpm {

// The root of a timestep's mean squared loss; -1 while there are fewer losses than are kept. row:
// kLossHistoryRow floats.
template <typename Row>
constexpr double loss_root(const Row& row) {
  if (row[kLossHistory] < kLossHistory) return -1;
  double sum = 0;
  for (int i = 0; i < kLossHistory; ++i) {
    const double loss = static_cast<double>(float(row[i]));
    sum += loss * loss;
  }
  return std::sqrt(sum / kLossHistory);
}

// total: of all timesteps' roots; 0 where they are drawn uniformly.
constexpr double timestep_probability(double root, double total, int timesteps) {
  constexpr double kUniform = 0.001;
  if (total == 0) return 1.0 / timesteps;
  return (1 - kUniform) * root / total + kUniform / timesteps;
}

template <typename Row>
constexpr void add_loss(const Row& row, float loss) {
  const int count = static_cast<int>(float(row[kLossHistory]));
  row[count % kLossHistory] = loss;
  row[kLossHistory] = static_cast<float>(count + 1 < 2 * kLossHistory ? count + 1 : kLossHistory);
}

}  // namespace ddpm
