// Mean squared error and its gradient, in double.
#pragma once

#include <cstddef>
#include <vector>

namespace ddpm::ref {

struct Loss {
  double loss = 0;
  std::vector<double> sample_loss, d_prediction;
};

inline Loss mse_loss(int n, const std::vector<double>& prediction,
                     const std::vector<double>& target) {
  Loss result;
  const size_t size = prediction.size() / static_cast<size_t>(n);
  result.sample_loss.assign(static_cast<size_t>(n), 0.0);
  for (size_t i = 0; i < prediction.size(); ++i) {
    const double diff = prediction[i] - target[i];
    result.sample_loss[i / size] += diff * diff / static_cast<double>(size);
    result.d_prediction.push_back(2 * diff / static_cast<double>(prediction.size()));
  }
  for (double loss : result.sample_loss) result.loss += loss / n;
  return result;
}

}  // namespace ddpm::ref
