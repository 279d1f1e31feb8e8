// The noise schedule (Ho et al. 2020, section 2) as tables over the timestep t = 0..T-1, in double.
// t = 0 is the paper's t = 1. Alpha-bar of no timestep at all (t = -1) is 1. Schedule jsd ends in
// pure noise: at its last timestep ab and snr are 0, sqrt_recip and sqrt_recipm1 infinite.
#pragma once

#include <vector>

#include "model/config.h"

namespace ddpm {

class Schedule {
 public:
  // Throws Error(kConfig) if the betas leave no signal or no noise at some timestep.
  explicit Schedule(const SchedulerConfig&);

  int timesteps() const { return static_cast<int>(beta.size()); }
  // Alpha-bar where t = -1 stands for the clean image.
  double alpha_bar(int t) const { return t < 0 ? 1.0 : ab[static_cast<size_t>(t)]; }
  // (T, 2): sqrt_ab and sqrt_1mab of q(x_t | x_0) for the kernels, rounded once.
  std::vector<float> noise_table() const;
  // (T, 2): factors of x0 and of the noise in v = sqrt_ab noise - sqrt_1mab x0, and in the mean of
  // q(x_{t-1} | x_t, x_0).
  std::vector<float> velocity_table() const;
  std::vector<float> previous_mean_table() const;

  std::vector<double> beta;
  std::vector<double> ab, abp;  // alpha-bar of t and of t - 1
  std::vector<double> sqrt_ab, sqrt_1mab, log_1mab;
  // x0 = sqrt_recip x_t - sqrt_recipm1 eps
  std::vector<double> sqrt_recip, sqrt_recipm1;
  std::vector<double> snr;  // ab / (1 - ab)
  // q(x_{t-1} | x_t, x_0) = N(coef1 x_0 + coef2 x_t, post_var)
  std::vector<double> post_var, coef1, coef2;
  // log(post_var) with entry 0, which would be log 0, replaced by entry 1.
  std::vector<double> posterior_log_variance_clipped;
};

}  // namespace ddpm
