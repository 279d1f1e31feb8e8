#include "model/likelihood.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numbers>

#include "kernels/bound_terms.h"
#include "kernels/philox.h"
#include "model/sampler.h"

namespace ddpm {
namespace {

double level(uint8_t pixel) { return pixel / 127.5 - 1; }

// Nats of a sum over `count` elements as bits of one.
double bits_per_dim(double nats, size_t count) {
  return nats / static_cast<double>(count) / std::numbers::ln2;
}

}  // namespace

double normal_kl(double m1, double lv1, double m2, double lv2) {
  return kl_term(m2 - m1, lv1, lv2 - lv1).nats;
}

double discretized_gaussian(double x, double mean, double log_scale) {
  return -decoder_term(x, mean - x, 2 * log_scale).nats;
}

std::vector<double> model_log_variance(const Schedule& s, VarianceType type) {
  DDPM_CHECK(type == VarianceType::kFixedSmall || type == VarianceType::kFixedLarge,
             "the bound of variance %s", name_of(type).c_str());
  std::vector<double> log_variance = s.posterior_log_variance_clipped;
  if (type == VarianceType::kFixedLarge)
    for (size_t t = 1; t < log_variance.size(); ++t) log_variance[t] = std::log(s.beta[t]);
  return log_variance;
}

std::vector<ExcessVariance> excess_variance(const Schedule& s, VarianceType type) {
  const std::vector<double>& posterior = s.posterior_log_variance_clipped;
  std::vector<ExcessVariance> excess(posterior.size());
  if (!is_learned(type)) {
    const std::vector<double> fixed = model_log_variance(s, type);
    for (size_t t = 0; t < excess.size(); ++t) excess[t].value = fixed[t] - posterior[t];
    return excess;
  }
  for (size_t t = 0; t < excess.size(); ++t) {
    const double range = std::log(s.beta[t]) - posterior[t];
    excess[t] = type == VarianceType::kLearned ? ExcessVariance{-posterior[t], 1}
                                               : ExcessVariance{0.5 * range, 0.5 * range};
  }
  return excess;
}

std::vector<LossFactors> loss_factors(const Schedule& s, const SchedulerConfig& c) {
  if (c.prediction_type == PredictionType::kEpsilon && s.ab.back() == 0)
    fail(Status::kConfig,
         "scheduler.beta_schedule \"%s\" ends in pure noise, where prediction_type \"epsilon\" has "
         "no "
         "bound; use another prediction_type, or train.loss simple",
         name_of(c.beta_schedule).c_str());
  const std::vector<ExcessVariance> excess = excess_variance(s, c.variance_type);
  std::vector<LossFactors> factors;
  for (size_t t = 0; t < excess.size(); ++t) {
    const double mean = c.prediction_type == PredictionType::kPreviousMean
                            ? 1
                            : s.coef1[t] * x0_mix(c.prediction_type, s, static_cast<int>(t)).out;
    factors.push_back({static_cast<float>(mean),
                       static_cast<float>(s.posterior_log_variance_clipped[t]),
                       static_cast<float>(excess[t].value), static_cast<float>(excess[t].slope)});
  }
  return factors;
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

Bound::Bound(const Schedule& schedule, const SchedulerConfig& config, int channels)
    : schedule_(schedule),
      type_(config.prediction_type),
      clip_(config.clip_sample ? config.clip_sample_range
                               : std::numeric_limits<double>::infinity()),
      channels_(is_learned(config.variance_type) ? channels : 0),
      excess_(excess_variance(schedule, config.variance_type)) {
  DDPM_CHECK(!is_learned(config.variance_type) || channels > 0, "a bound for %d channels",
             channels);
}

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
  const Mix mix = x0_mix(type_, schedule_, t);
  const double coef1 = schedule_.coef1[at], coef2 = schedule_.coef2[at];
  const double lv = schedule_.posterior_log_variance_clipped[at];
  const ExcessVariance excess = excess_[at];
  const auto c = static_cast<size_t>(channels_);
  double nats = 0, squares = 0, errors = 0;
  for (size_t i = 0; i < pixels.size(); ++i) {
    const size_t mean = c > 0 ? i + i / c * c : i;
    const double x0 = level(pixels[i]), x = x_t[i], o = out[mean];
    const double missed = std::clamp(mix.x * x + mix.out * o, -clip_, clip_) - x0;
    const double error =
        type_ == PredictionType::kPreviousMean ? o - (coef1 * x0 + coef2 * x) : coef1 * missed;
    squares += missed * missed;
    errors += error * error;
    if (c == 0 && t > 0) continue;
    const double more = c > 0 ? excess.value + excess.slope * double{out[mean + c]} : excess.value;
    nats += (t == 0 ? decoder_term(x0, error, lv + more) : kl_term(error, lv, more)).nats;
  }
  const auto count = static_cast<double>(pixels.size());
  // Where the variances are the same everywhere, all elements' terms are one's.
  if (c == 0 && t > 0) nats = count * kl_term(std::sqrt(errors / count), lv, excess.value).nats;
  return {bits_per_dim(nats, pixels.size()), squares / count};
}

double Bound::prior(std::span<const uint8_t> pixels) const {
  const double signal = schedule_.sqrt_ab.back(), log_variance = schedule_.log_1mab.back();
  double nats = 0;
  for (const uint8_t pixel : pixels) nats += normal_kl(signal * level(pixel), log_variance, 0, 0);
  return bits_per_dim(nats, pixels.size());
}

}  // namespace ddpm
