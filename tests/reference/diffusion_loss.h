// Training losses of one image in long double, by the paper's definitions: through the prediction
// of x_0, both distributions' means and variances. Slopes are finite differences.
#pragma once

#include <cmath>
#include <cstddef>
#include <numbers>
#include <vector>

#include "kernels/desc.h"
#include "model/schedule.h"

namespace ddpm::ref {

using Real = long double;

inline Real normal_kl(Real m1, Real lv1, Real m2, Real lv2) {
  return 0.5L * (-1 + lv2 - lv1 + std::exp(lv1 - lv2) + (m1 - m2) * (m1 - m2) * std::exp(-lv2));
}

inline Real decoder_nats(Real x, Real mean, Real log_variance) {
  const auto cdf = [&](Real z) {
    return 0.5L *
           (1 + std::tanh(std::sqrt(2 / std::numbers::pi_v<Real>) * (z + 0.044715L * z * z * z)));
  };
  const Real inverse = std::exp(-0.5L * log_variance);
  const Real above = inverse * (x - mean + 1 / 255.0L), below = inverse * (x - mean - 1 / 255.0L);
  const Real p = x < -0.999L ? cdf(above) : x > 0.999L ? cdf(-below) : cdf(above) - cdf(below);
  return -std::log(std::max(p, 1e-12L));
}

// An image that is trained on: x0 and noise (H,W,C), at timestep t of a process.
struct TrainedImage {
  const Schedule& schedule;
  const SchedulerConfig& config;
  LossKind loss;
  std::vector<double> x0, noise;
  int t;
};

// What the network is to put out for element i.
inline Real goal(const TrainedImage& image, size_t i) {
  const Schedule& s = image.schedule;
  const auto t = static_cast<size_t>(image.t);
  const Real x0 = image.x0[i], noise = image.noise[i];
  const Real x_t = s.sqrt_ab[t] * x0 + s.sqrt_1mab[t] * noise;
  switch (image.config.prediction_type) {
    case PredictionType::kEpsilon:
      return noise;
    case PredictionType::kSample:
      return x0;
    case PredictionType::kVPrediction:
      return s.sqrt_ab[t] * noise - s.sqrt_1mab[t] * x0;
    case PredictionType::kPreviousMean:
      return s.coef1[t] * x0 + s.coef2[t] * x_t;
  }
  return 0;
}

// Element i's term of the bound in bits, where the network puts out `mean` and `variance`.
inline Real bound_bits(const TrainedImage& image, size_t i, Real mean, Real variance) {
  const Schedule& s = image.schedule;
  const auto t = static_cast<size_t>(image.t);
  const Real a = s.sqrt_ab[t], b = s.sqrt_1mab[t], x0 = image.x0[i];
  const Real x_t = a * x0 + b * image.noise[i];
  Real predicted = 0;
  switch (image.config.prediction_type) {
    case PredictionType::kEpsilon:
      predicted = (x_t - b * mean) / a;
      break;
    case PredictionType::kSample:
      predicted = mean;
      break;
    case PredictionType::kVPrediction:
      predicted = a * x_t - b * mean;
      break;
    case PredictionType::kPreviousMean:
      predicted = (mean - s.coef2[t] * x_t) / s.coef1[t];
      break;
  }
  const Real true_mean = s.coef1[t] * x0 + s.coef2[t] * x_t;
  const Real model_mean = s.coef1[t] * predicted + s.coef2[t] * x_t;
  const Real small = std::log(Real(s.post_var[t == 0 ? 1 : t])), large = std::log(Real(s.beta[t]));
  Real lv = small;
  if (image.config.variance_type == VarianceType::kFixedLarge && t > 0) lv = large;
  if (image.config.variance_type == VarianceType::kLearned) lv = variance;
  if (image.config.variance_type == VarianceType::kLearnedRange)
    lv = (variance + 1) / 2 * large + (1 - variance) / 2 * small;
  const Real nats =
      t == 0 ? decoder_nats(x0, model_mean, lv) : normal_kl(true_mean, small, model_mean, lv);
  return nats / std::numbers::ln2_v<Real>;
}

// Element i's loss; of the bound in a hybrid the mean is `detached`, not `mean`.
inline Real element_loss(const TrainedImage& image, size_t i, Real mean, Real variance,
                         Real detached) {
  const Real square = (mean - goal(image, i)) * (mean - goal(image, i));
  if (image.loss == LossKind::kSimple) return square;
  if (image.loss == LossKind::kKl) return bound_bits(image, i, mean, variance);
  return square + image.schedule.timesteps() / 1000.0L * bound_bits(image, i, detached, variance);
}

struct ImageLoss {
  double loss = 0;
  std::vector<double> d_mean, d_variance;  // (H,W,C)
};

inline ImageLoss image_loss(const TrainedImage& image, const std::vector<double>& mean,
                            const std::vector<double>& variance) {
  ImageLoss result;
  const Real size = static_cast<Real>(mean.size()), step = 1e-5L;
  for (size_t i = 0; i < mean.size(); ++i) {
    const Real m = mean[i], v = variance[i];
    result.loss += static_cast<double>(element_loss(image, i, m, v, m) / size);
    const auto slope = [&](const auto& f) {  // of fourth order
      return static_cast<double>((8 * (f(step) - f(-step)) - (f(2 * step) - f(-2 * step))) /
                                 (12 * step) / size);
    };
    result.d_mean.push_back(slope([&](Real d) { return element_loss(image, i, m + d, v, m); }));
    // Of the bound alone: beside a large square its differences would be lost.
    const Real weight = image.loss == LossKind::kSimple ? 0
                        : image.loss == LossKind::kKl   ? 1
                                                        : image.schedule.timesteps() / 1000.0L;
    result.d_variance.push_back(
        slope([&](Real d) { return weight * bound_bits(image, i, m, v + d); }));
  }
  return result;
}

}  // namespace ddpm::ref
