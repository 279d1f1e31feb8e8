#include "model/schedule.h"

#include <algorithm>
#include <cmath>
#include <numbers>

namespace ddpm {
namespace {

// Point i of n evenly spaced ones from start to end, both included; of a single one, the start.
double spaced(double start, double end, int i, int n) {
  return n == 1 ? start : start + (end - start) * i / (n - 1);
}

// The first share of all timesteps rises linearly, the rest stays at the end (Ho et al., code).
double warmup_beta(const SchedulerConfig& c, double share, int i) {
  const int rising = static_cast<int>(c.num_train_timesteps * share);
  return i < rising ? spaced(c.beta_start, c.beta_end, i, rising) : c.beta_end;
}

// Cosine schedule of Nichol & Dhariwal 2021: alpha-bar follows cos^2, each beta is at most 0.999.
double cosine_beta(int i, int n) {
  const auto f = [n](int k) {
    const double c = std::cos((static_cast<double>(k) / n + 0.008) / 1.008 * std::numbers::pi / 2);
    return c * c;
  };
  return std::min(1 - f(i + 1) / f(i), 0.999);
}

double beta_at(const SchedulerConfig& c, int i) {
  switch (c.beta_schedule) {
    case BetaSchedule::kLinear:
      return spaced(c.beta_start, c.beta_end, i, c.num_train_timesteps);
    case BetaSchedule::kScaledLinear: {
      const double root =
          spaced(std::sqrt(c.beta_start), std::sqrt(c.beta_end), i, c.num_train_timesteps);
      return root * root;
    }
    case BetaSchedule::kSquaredcosCapV2:
      return cosine_beta(i, c.num_train_timesteps);
    case BetaSchedule::kSigmoid: {
      const double u = spaced(-6, 6, i, c.num_train_timesteps);
      return c.beta_start + (c.beta_end - c.beta_start) / (1 + std::exp(-u));
    }
    case BetaSchedule::kConst:
      return c.beta_end;
    case BetaSchedule::kWarmup10:
      return warmup_beta(c, 0.1, i);
    case BetaSchedule::kWarmup50:
      return warmup_beta(c, 0.5, i);
    case BetaSchedule::kJsd:
      return 1.0 / (c.num_train_timesteps - i);
  }
  fail(Status::kBug, "unknown beta schedule %d", static_cast<int>(c.beta_schedule));
}

}  // namespace

Schedule::Schedule(const SchedulerConfig& config) {
  // Below this 1/sqrt(ab) is no longer a number that fp32 arithmetic can use.
  constexpr double kLeastSignal = 1e-24;
  const int count = config.num_train_timesteps;
  DDPM_CHECK(count >= 2, "a schedule of %d timesteps", count);
  double product = 1;
  for (int t = 0; t < count; ++t) {
    const double b = beta_at(config, t);
    abp.push_back(product);
    product *= 1 - b;
    // jsd ends with beta 1, pure noise; sampler rows and the bound know of it.
    const bool ends_in_noise = b == 1 && t == count - 1;
    if (!(product < abp.back()) || !(product >= kLeastSignal || ends_in_noise))
      fail(Status::kConfig,
           "scheduler: beta %g at timestep %d of %d makes alpha-bar %g; it must fall at every "
           "timestep and stay above %g: use other betas or another num_train_timesteps",
           b, t, count, product, kLeastSignal);
    beta.push_back(b);
    ab.push_back(product);
  }
  for (size_t t = 0; t < beta.size(); ++t) {
    const double noise = 1 - ab[t];
    sqrt_ab.push_back(std::sqrt(ab[t]));
    sqrt_1mab.push_back(std::sqrt(noise));
    log_1mab.push_back(std::log(noise));
    sqrt_recip.push_back(std::sqrt(1 / ab[t]));
    sqrt_recipm1.push_back(std::sqrt(1 / ab[t] - 1));
    snr.push_back(ab[t] / noise);
    post_var.push_back(beta[t] * (1 - abp[t]) / noise);
    coef1.push_back(beta[t] * std::sqrt(abp[t]) / noise);
    coef2.push_back((1 - abp[t]) * std::sqrt(1 - beta[t]) / noise);
  }
  for (size_t t = 0; t < beta.size(); ++t)
    posterior_log_variance_clipped.push_back(std::log(post_var[std::max<size_t>(t, 1)]));
}

std::vector<float> Schedule::noise_table() const {
  std::vector<float> table;
  for (size_t t = 0; t < ab.size(); ++t)
    table.insert(table.end(), {static_cast<float>(sqrt_ab[t]), static_cast<float>(sqrt_1mab[t])});
  return table;
}

std::vector<float> Schedule::velocity_table() const {
  std::vector<float> table;
  for (size_t t = 0; t < ab.size(); ++t)
    table.insert(table.end(), {static_cast<float>(-sqrt_1mab[t]), static_cast<float>(sqrt_ab[t])});
  return table;
}

std::vector<float> Schedule::previous_mean_table() const {
  std::vector<float> table;
  for (size_t t = 0; t < ab.size(); ++t)
    table.insert(table.end(), {static_cast<float>(coef1[t] + coef2[t] * sqrt_ab[t]),
                               static_cast<float>(coef2[t] * sqrt_1mab[t])});
  return table;
}

}  // namespace ddpm
