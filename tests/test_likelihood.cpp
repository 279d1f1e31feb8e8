// The terms of the bound against closed forms in double, at ordinary values and at extremes.
#include "model/likelihood.h"

#include <catch2/catch.hpp>
#include <cmath>
#include <numbers>

#include "tests/reference/diffusion_loss.h"
#include "tests/reference/random.h"
#include "tests/support.h"

using namespace ddpm;

namespace {

constexpr double kLn2 = std::numbers::ln2;

// An output that makes the network predict `x0` of x_t, for noise prediction.
float noise_for(const Schedule& s, int t, float x_t, double x0) {
  const auto i = static_cast<size_t>(t);
  return static_cast<float>((x_t - s.sqrt_ab[i] * x0) / s.sqrt_1mab[i]);
}

}  // namespace

TEST_CASE("likelihood: the divergence of two normals", "[likelihood]") {
  // Equal ones; unit ones 2 apart; sigma 1 and e; a narrow one in a wide one.
  CHECK(normal_kl(0.3, -9, 0.3, -9) == 0);
  CHECK(normal_kl(1, 0, 3, 0) == Approx(2).epsilon(1e-15));
  CHECK(normal_kl(0, 0, 0, 2) == Approx(0.5 * (1 + std::exp(-2.0))).epsilon(1e-15));
  CHECK(normal_kl(0, 2, 0, 0) == Approx(0.5 * (std::exp(2.0) - 3)).epsilon(1e-15));
  CHECK(normal_kl(0, -46, 1, 0) == Approx(0.5 * (46 - 1 + std::exp(-46.0) + 1)).epsilon(1e-15));
  CHECK(normal_kl(1, -9.8, -1, -9.8) == Approx(2 * std::exp(9.8)).epsilon(1e-15));
  // By its integral, in steps of sigma / 50.
  const double m1 = 0.2, lv1 = -1.3, m2 = -0.4, lv2 = 0.7;
  double sum = 0;
  const double sigma = std::exp(0.5 * lv1), step = sigma / 50;
  for (double z = m1 - 12 * sigma; z < m1 + 12 * sigma; z += step) {
    const auto log_density = [z](double m, double lv) {
      return -0.5 * (std::log(2 * std::numbers::pi) + lv + (z - m) * (z - m) * std::exp(-lv));
    };
    sum += step * std::exp(log_density(m1, lv1)) * (log_density(m1, lv1) - log_density(m2, lv2));
  }
  CHECK(normal_kl(m1, lv1, m2, lv2) == Approx(sum).epsilon(1e-9));
}

TEST_CASE("likelihood: the discretised Gaussian", "[likelihood]") {
  // Golden values: the authors' formula in double, by another program.
  const double scale = std::log(7.384570e-3), middle = 128 / 127.5 - 1;
  const auto golden = [](double v) { return Approx(v).epsilon(0).margin(1e-6); };
  CHECK(discretized_gaussian(-1, -1, scale) == golden(-0.353441));
  CHECK(discretized_gaussian(-1, -0.98, scale) == golden(-4.225702));
  CHECK(discretized_gaussian(1, 1, scale) == golden(-0.353441));
  CHECK(discretized_gaussian(middle, 0, scale) == golden(-1.033554));
  CHECK(discretized_gaussian(middle, 0.01, scale) == golden(-1.213657));
  CHECK(discretized_gaussian(middle, 0.5, scale) == golden(-27.631021));  // the floor, log 1e-12

  // Against the error function: its approximation is off by 1.8e-4 of a probability at most.
  for (const double sigma : {1e-3, 7.38e-3, 0.1, 2.0})
    for (int u = 0; u < 256; u += 5)
      for (const double mean : {-1.2, -0.7, 0.0, 0.31, 1.0}) {
        const double x = u / 127.5 - 1;
        const auto cdf = [&](double y) {
          return 0.5 * std::erfc(-(y - mean) / sigma / std::numbers::sqrt2);
        };
        const double low = u == 0 ? 0 : cdf(x - 1 / 255.0),
                     high = u == 255 ? 1 : cdf(x + 1 / 255.0);
        REQUIRE(std::exp(discretized_gaussian(x, mean, std::log(sigma))) ==
                Approx(high - low).epsilon(0).margin(3.7e-4));
      }
  // The levels are all there is.
  for (const double mean : {-1.0, 0.003, 0.9, 5.0}) {
    double total = 0;
    for (int u = 0; u < 256; ++u)
      total += std::exp(discretized_gaussian(u / 127.5 - 1, mean, std::log(0.02)));
    CHECK(total == Approx(1).epsilon(1e-9));
  }
  // Extremes stay finite.
  for (const double mean : {-1e30, 1e30})
    for (const double x : {-1.0, 0.0, 1.0})
      for (const double log_scale : {-40.0, 0.0, 40.0})
        CHECK(std::isfinite(discretized_gaussian(x, mean, log_scale)));
}

TEST_CASE("likelihood: variances of the model", "[likelihood]") {
  const Schedule s{SchedulerConfig()};
  const auto large = model_log_variance(s, VarianceType::kFixedLarge);
  const auto small = model_log_variance(s, VarianceType::kFixedSmall);
  CHECK(large[0] == Approx(-9.816725).epsilon(1e-7));
  CHECK(large[1] == Approx(std::log(1.1991992e-4)).epsilon(1e-8));
  CHECK(large[999] == Approx(std::log(0.02)).epsilon(1e-8));
  CHECK(small[0] == Approx(-9.816725).epsilon(1e-7));
  CHECK(small[1] == small[0]);
  CHECK(small[999] == Approx(std::log(0.0199999835)).epsilon(1e-8));
}

TEST_CASE("likelihood: noise by image and timestep", "[likelihood]") {
  const RandomStream stream{
      .seed = 5, .purpose = Purpose::kEvaluation, .sample = (uint64_t{3} << 32) + 7, .step = 999};
  const std::vector<double> expected = ref::normals(stream, 27);
  std::vector<float> noise(27);
  evaluation_noise(5, stream.sample, 999, noise);
  for (size_t i = 0; i < noise.size(); ++i)
    CHECK(noise[i] == Approx(expected[i]).epsilon(1e-6).margin(1e-7));
}

TEST_CASE("likelihood: terms of a given prediction", "[likelihood]") {
  SchedulerConfig c;
  for (const auto variance : {VarianceType::kFixedSmall, VarianceType::kFixedLarge}) {
    c.variance_type = variance;
    const Schedule s(c);
    const Bound bound(s, c);
    const std::vector<uint8_t> pixels{0, 1, 77, 128, 254, 255};
    const std::vector<float> noise{0.5f, -1, 2, 0, -0.25f, 1};
    const double predicted[] = {-0.9, -1, 0.2, 0.004, 0.5, 1};
    std::vector<float> x_t(6), out(6);
    for (const int t : {0, 1, 2, 500, 999}) {
      const auto i = static_cast<size_t>(t);
      bound.noise_image(pixels, noise, t, x_t);
      double nats = 0, squares = 0;
      for (size_t k = 0; k < 6; ++k) {
        const double x0 = pixels[k] / 127.5 - 1;
        CHECK(x_t[k] ==
              Approx(s.sqrt_ab[i] * x0 + s.sqrt_1mab[i] * noise[k]).epsilon(1e-6).margin(1e-7));
        out[k] = noise_for(s, t, x_t[k], predicted[k]);
        squares += (predicted[k] - x0) * (predicted[k] - x0) / 6;
        const double mean = s.coef1[i] * predicted[k] + s.coef2[i] * x_t[k],
                     wanted = s.coef1[i] * x0 + s.coef2[i] * x_t[k];
        const double lv2 = model_log_variance(s, variance)[i];
        nats += t == 0 ? -discretized_gaussian(x0, mean, 0.5 * lv2) / 6
                       : normal_kl(wanted, s.posterior_log_variance_clipped[i], mean, lv2) / 6;
      }
      INFO("t " << t);
      const BoundTerm term = bound.term(pixels, x_t, out, t);
      // out is a float: at t = 999 the prediction moves by 157 * 2^-24 of it.
      CHECK(term.mse == Approx(squares).epsilon(1e-4));
      CHECK(term.bits == Approx(nats / kLn2).epsilon(1e-4));
    }
    // A prediction outside [-1, 1] counts as its end, unless nothing is clipped.
    bound.noise_image(pixels, noise, 999, x_t);
    for (size_t k = 0; k < 6; ++k) out[k] = noise_for(s, 999, x_t[k], 40);
    double to_one = 0;
    for (const uint8_t u : pixels) to_one += std::pow(u / 127.5 - 2, 2) / 6;
    CHECK(bound.term(pixels, x_t, out, 999).mse == Approx(to_one).epsilon(1e-9));
    SchedulerConfig open = c;
    open.clip_sample = false;
    CHECK(Bound(s, open).term(pixels, x_t, out, 999).mse > 1000);
  }
}

TEST_CASE("likelihood: what each prediction type says of x0", "[likelihood]") {
  SchedulerConfig c;
  const std::vector<uint8_t> pixels{10, 200};
  const std::vector<float> noise{0.3f, -0.7f};
  std::vector<float> x_t(2);
  for (const auto type : {PredictionType::kEpsilon, PredictionType::kSample,
                          PredictionType::kVPrediction, PredictionType::kPreviousMean}) {
    c.prediction_type = type;
    const Schedule s(c);
    const Bound bound(s, c);
    bound.noise_image(pixels, noise, 400, x_t);
    std::vector<float> out;
    for (size_t k = 0; k < 2; ++k) {
      const double x0 = pixels[k] / 127.5 - 1;
      out.push_back(static_cast<float>(type == PredictionType::kEpsilon  ? double{noise[k]}
                                       : type == PredictionType::kSample ? x0
                                       : type == PredictionType::kPreviousMean
                                           ? s.coef1[400] * x0 + s.coef2[400] * x_t[k]
                                           : s.sqrt_ab[400] * noise[k] - s.sqrt_1mab[400] * x0));
    }
    // The mean's factor of x0 is 1 / 0.003 at t = 400.
    const bool mean = type == PredictionType::kPreviousMean;
    CHECK(bound.term(pixels, x_t, out, 400).mse < (mean ? 1e-8 : 1e-12));
    CHECK(bound.term(pixels, x_t, out, 400).bits < 1e-9);
  }
  // Pure noise at the end of jsd: the middle of the range, and a prior of 0.
  c = {.num_train_timesteps = 10, .beta_schedule = BetaSchedule::kJsd};
  const Schedule s(c);
  const Bound bound(s, c);
  bound.noise_image(pixels, noise, 9, x_t);
  CHECK(x_t == noise);
  const double squares = (std::pow(10 / 127.5 - 1, 2) + std::pow(200 / 127.5 - 1, 2)) / 2;
  CHECK(bound.term(pixels, x_t, noise, 9).mse == Approx(squares));
  CHECK(bound.prior(pixels) == 0);
}

TEST_CASE("likelihood: terms of what the network learns of mean and variance", "[likelihood]") {
  const std::vector<uint8_t> pixels{0, 1, 77, 128, 254, 255};  // (1,2,3)
  std::vector<double> x0;
  for (const uint8_t u : pixels) x0.push_back(u / 127.5 - 1);
  const std::vector<float> noise{0.5f, -1, 2, 0, -0.25f, 1};
  for (const auto variance : {VarianceType::kLearned, VarianceType::kLearnedRange})
    for (const auto prediction : {PredictionType::kSample, PredictionType::kPreviousMean}) {
      const SchedulerConfig c{.prediction_type = prediction, .variance_type = variance};
      const Schedule s(c);
      const Bound bound(s, c, 3);
      CHECK(bound.learned_variance());
      for (const int t : {0, 1, 500, 999}) {
        const auto at = static_cast<size_t>(t);
        const ref::TrainedImage image{s, c, LossKind::kKl, x0, {noise.begin(), noise.end()}, t};
        std::vector<float> x_t(6), mean, log_variance, out;
        bound.noise_image(pixels, noise, t, x_t);
        double bits = 0;
        for (size_t k = 0; k < 6; ++k) {
          const double off = 0.004 * static_cast<double>(k) - 0.01;
          mean.push_back(static_cast<float>(static_cast<double>(ref::goal(image, k)) * 0.99 + off));
          log_variance.push_back(static_cast<float>(
              variance == VarianceType::kLearned ? s.posterior_log_variance_clipped[at] + 50 * off
                                                 : 60 * off));
          bits += static_cast<double>(ref::bound_bits(image, k, mean[k], log_variance[k])) / 6;
        }
        for (const size_t pixel : {size_t{0}, size_t{3}})
          for (const auto* half : {&mean, &log_variance})
            out.insert(out.end(), half->begin() + static_cast<std::ptrdiff_t>(pixel),
                       half->begin() + static_cast<std::ptrdiff_t>(pixel) + 3);
        INFO(name_of(variance) << " " << name_of(prediction) << " t " << t);
        CHECK(bound.term(pixels, x_t, out, t).bits == Approx(bits).epsilon(1e-3));
      }
    }
  const SchedulerConfig learned{.variance_type = VarianceType::kLearned};
  CHECK_THROWS_AS(Bound(Schedule(learned), learned), Error);
}

TEST_CASE("likelihood: the prior", "[likelihood]") {
  const SchedulerConfig c;
  const Bound bound(Schedule(c), c);
  // x0^2 = 0.2556 of every pixel: 0.5 (ab x0^2 - ab - log(1 - ab)) nats.
  const std::vector<uint8_t> pixels(12, 192);
  const double x0 = 192 / 127.5 - 1, ab = 4.03582977e-05;
  CHECK(bound.prior(pixels) ==
        Approx(0.5 * (ab * x0 * x0 - ab - std::log1p(-ab)) / kLn2).epsilon(1e-5));
  CHECK(bound.prior(pixels) == Approx(7.4e-6).epsilon(0.02));
}
