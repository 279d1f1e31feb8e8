#include "model/likelihood.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numbers>

#include "kernels/philox.h"
#include "model/sampler.h"

namespace ddpm {
namespace {

double level(uint8_t pixel) { return pixel / 127.5 - 1; }

// Nats of a sum over `count` elements as bits of one.
double bits_per_dim(double nats, size_t count) {
  return nats / static_cast<double>(count) / std::numbers::ln2;
}

double normal_cdf(double z) {
  return 0.5 * (1 + std::tanh(std::sqrt(2 / std::numbers::pi) * (z + 0.044715 * z * z * z)));
}

}  // namespace

double normal_kl(double m1, double lv1, double m2, double lv2) {
  const double d = m1 - m2;
  return 0.5 * (-1 + lv2 - lv1 + std::exp(lv1 - lv2) + d * d * std::exp(-lv2));
}

double discretized_gaussian(double x, double mean, double log_scale) {
  constexpr double kLeast = 1e-12, kHalfLevel = 1 / 255.0;
  constexpr double kEnd = 0.999;  // the levels beyond are 0 and 255 alone
  const double inverse = std::exp(-log_scale);
  const double above = normal_cdf(inverse * (x - mean + kHalfLevel)),
               below = normal_cdf(inverse * (x - mean - kHalfLevel));
  const double p = x < -kEnd ? above : x > kEnd ? 1 - below : above - below;
  return std::log(std::max(p, kLeast));
}

std::vector<double> model_log_variance(const Schedule& s, VarianceType type) {
  DDPM_CHECK(type == VarianceType::kFixedSmall || type == VarianceType::kFixedLarge,
             "the bound of variance %s", name_of(type).c_str());
  std::vector<double> log_variance = s.posterior_log_variance_clipped;
  if (type == VarianceType::kFixedLarge)
    for (size_t t = 1; t < log_variance.size(); ++t) log_variance[t] = std::log(s.beta[t]);
  return log_variance;
}

void evaluation_noise(uint64_t seed, uint64_t image, int t, std::span<float> noise) {
  const RandomStream stream{.seed = seed,
                            .purpose = Purpose::kEvaluation,
                            .sample = image,
                            .step = static_cast<uint32_t>(t)};
  for (size_t i = 0; i < noise.size(); i += 2) {
    const Philox4 words = stream.block(static_cast<uint32_t>(i / 4));
    const double radius = std::sqrt(-2 * std::log(double{uniform_open(words[i % 4])}));
    const double angle = 2 * std::numbers::pi * double{uniform_open(words[i % 4 + 1])};
    noise[i] = static_cast<float>(radius * std::cos(angle));
    if (i + 1 < noise.size()) noise[i + 1] = static_cast<float>(radius * std::sin(angle));
  }
}

Bound::Bound(const Schedule& schedule, const SchedulerConfig& config)
    : schedule_(schedule),
      type_(config.prediction_type),
      clip_(config.clip_sample ? config.clip_sample_range
                               : std::numeric_limits<double>::infinity()),
      log_variance_(model_log_variance(schedule, config.variance_type)) {}

void Bound::noise_image(std::span<const uint8_t> pixels, std::span<const float> noise, int t,
                        std::span<float> x_t) const {
  const auto at = static_cast<size_t>(t);
  const double signal = schedule_.sqrt_ab[at], sigma = schedule_.sqrt_1mab[at];
  for (size_t i = 0; i < x_t.size(); ++i)
    x_t[i] = static_cast<float>(signal * level(pixels[i]) + sigma * double{noise[i]});
}

BoundTerm Bound::term(std::span<const uint8_t> pixels, std::span<const float> x_t,
                      std::span<const float> out, int t) const {
  const auto at = static_cast<size_t>(t);
  const Mix mix = x0_mix(type_, schedule_.ab[at]);
  const double coef1 = schedule_.coef1[at], coef2 = schedule_.coef2[at];
  const double lv1 = schedule_.posterior_log_variance_clipped[at], lv2 = log_variance_[at];
  double nats = 0, squares = 0;
  for (size_t i = 0; i < pixels.size(); ++i) {
    const double x0 = level(pixels[i]), x = x_t[i];
    const double predicted = std::clamp(mix.x * x + mix.out * double{out[i]}, -clip_, clip_);
    squares += (predicted - x0) * (predicted - x0);
    if (t == 0) nats -= discretized_gaussian(x0, coef1 * predicted + coef2 * x, 0.5 * lv2);
  }
  // The means differ by coef1 (x0 - predicted), and the variances are the same everywhere.
  const auto count = static_cast<double>(pixels.size());
  if (t > 0) nats = count * normal_kl(coef1 * std::sqrt(squares / count), lv1, 0, lv2);
  return {bits_per_dim(nats, pixels.size()), squares / count};
}

double Bound::prior(std::span<const uint8_t> pixels) const {
  const double signal = schedule_.sqrt_ab.back(), log_variance = schedule_.log_1mab.back();
  double nats = 0;
  for (const uint8_t pixel : pixels) nats += normal_kl(signal * level(pixel), log_variance, 0, 0);
  return bits_per_dim(nats, pixels.size());
}

}  // namespace ddpm
