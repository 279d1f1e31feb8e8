// The variational bound of an image, in bits per dimension (Ho et al. 2020, eq. 5, and section 3.3)
// as the authors' code works it out: in double, of an x_t and what the network says of it.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "kernels/desc.h"
#include "model/config.h"
#include "model/schedule.h"

namespace ddpm {

// KL(N(m1, e^lv1) || N(m2, e^lv2)) in nats, of one element.
double normal_kl(double m1, double lv1, double m2, double lv2);

// log p(x) in nats of a level x = u / 127.5 - 1 under N(mean, e^(2 log_scale)), integrated over the
// level's width, from minus infinity at 0 and to infinity at 255 (eq. 13). At least log 1e-12. The
// distribution function is the authors' approximation by tanh, off by at most 1.8e-4.
double discretized_gaussian(double x, double mean, double log_scale);

// log sigma_t^2 of p(x_{t-1} | x_t), by t, of a fixed kind. At t = 0, where no noise is drawn, both
// kinds have the posterior's variance of t = 1, as the authors chose for a better L_0.
std::vector<double> model_log_variance(const Schedule&, VarianceType);

// What log sigma_t^2 has above posterior_log_variance_clipped: value + slope v, with v the
// network's second half where the variance is learned, which is the authors' at t = 0 too.
struct ExcessVariance {
  double value = 0, slope = 0;
};
std::vector<ExcessVariance> excess_variance(const Schedule&, VarianceType);

// What the training losses of the bound are made of, by t, rounded once. The model's mean is linear
// in the network's output and right where that is its target. Throws Error(kConfig) for a
// prediction of noise where there is no signal: it says nothing of the mean.
std::vector<LossFactors> loss_factors(const Schedule&, const SchedulerConfig&);

// eps ~ N(0, I) of image `image` of a data set at t: (H,W,C).
void evaluation_noise(uint64_t seed, uint64_t image, int t, std::span<float> noise);

// A term L_t of the bound, and what the prediction of x_0 misses it by.
struct BoundTerm {
  double bits = 0;  // per dimension
  double mse = 0;   // mean of (x0 predicted - x0)^2, in [-1, 1]
};

class Bound {
 public:
  // `channels` of an image, which are needed where the variance is learned.
  Bound(const Schedule&, const SchedulerConfig&, int channels = 0);

  int timesteps() const { return schedule_.timesteps(); }
  bool learned_variance() const { return channels_ > 0; }
  // x_t = sqrt_ab x0 + sqrt_1mab noise (eq. 4), rounded once. pixels U8, all (H,W,C).
  void noise_image(std::span<const uint8_t> pixels, std::span<const float> noise, int t,
                   std::span<float> x_t) const;
  // L_t of eq. 5: KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)) for t > 0, -log p(x_0 | x_1) at 0.
  // `out` is the network's output on x_t, (H,W,2C) where the variance is learned. The prediction of
  // x_0 is clipped where the configuration says so; a mean that the network puts out itself is not.
  BoundTerm term(std::span<const uint8_t> pixels, std::span<const float> x_t,
                 std::span<const float> out, int t) const;
  // L_T of eq. 5, KL(q(x_T | x_0) || N(0, I)): no network is asked.
  double prior(std::span<const uint8_t> pixels) const;

 private:
  Schedule schedule_;
  PredictionType type_;
  double clip_;   // infinite: none
  int channels_;  // 0: the variance is fixed
  std::vector<ExcessVariance> excess_;
};

}  // namespace ddpm
