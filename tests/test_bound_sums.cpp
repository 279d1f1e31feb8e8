// The bound of data whose best network is known in closed form; and that nothing but the data, the
// seed and the network decides its bits.
#include "model/bound_sums.h"

#include <catch2/catch.hpp>
#include <cmath>
#include <numbers>
#include <numeric>

#include "tests/reference/random.h"
#include "tests/support.h"

using namespace ddpm;

namespace {

constexpr double kLn2 = std::numbers::ln2;

// Pixels of N(0, sigma^2), as levels.
Dataset gaussian_images(int64_t count, const Shape& image, double sigma) {
  Dataset d = make_dataset(count, image);
  for (int64_t n = 0; n < count; ++n) {
    const RandomStream stream{
        .seed = 99, .purpose = Purpose::kShapes, .sample = static_cast<uint64_t>(n), .step = 3};
    const std::vector<double> z = ref::normals(stream, static_cast<int64_t>(d.image_bytes()));
    for (size_t i = 0; i < z.size(); ++i)
      d.image(n)[i] = static_cast<uint8_t>(
          std::clamp(std::floor((sigma * z[i] + 1) * 127.5 + 0.5), 0.0, 255.0));
  }
  return d;
}

// The probability of each level.
std::vector<double> level_probabilities(double sigma) {
  const auto cdf = [&](double x) { return 0.5 * std::erfc(-x / sigma / std::numbers::sqrt2); };
  std::vector<double> p;
  for (int u = 0; u < 256; ++u) {
    const double x = u / 127.5 - 1;
    p.push_back((u == 255 ? 1 : cdf(x + 1 / 255.0)) - (u == 0 ? 0 : cdf(x - 1 / 255.0)));
  }
  return p;
}

double moment(const std::vector<double>& p, int power) {
  double sum = 0;
  for (int u = 0; u < 256; ++u) sum += p[static_cast<size_t>(u)] * std::pow(u / 127.5 - 1, power);
  return sum;
}

// The best linear prediction of x0 from x_t: x0's mean is 0.3 percent of sigma at most, so taken 0.
double predict_x0(const Schedule& s, double variance, double x_t, size_t t) {
  return s.sqrt_ab[t] * variance * x_t / (s.ab[t] * variance + 1 - s.ab[t]);
}

Denoiser best_network(const Schedule& s, double variance, double mean) {
  return [&s, variance, mean](const std::vector<float>& x_t, const std::vector<int32_t>& t,
                              const std::vector<int32_t>&, std::vector<float>& out) {
    const size_t size = x_t.size() / t.size();
    for (size_t i = 0; i < x_t.size(); ++i) {
      const auto at = static_cast<size_t>(t[i / size]);
      const double centred = x_t[i] - s.sqrt_ab[at] * mean;
      const double x0 = mean + predict_x0(s, variance, centred, at);
      out[i] = static_cast<float>((x_t[i] - s.sqrt_ab[at] * x0) / s.sqrt_1mab[at]);
    }
  };
}

// What the terms t > 0 and their excess over the data's own reverse process come to, by closed
// forms; and L_0 by sums over levels and noise.
struct Expected {
  double entropy = 0, kl = 0, mismatch = 0, decoder = 0;
};

Expected expected(const Schedule& s, const SchedulerConfig& c, double sigma) {
  Expected e;
  const std::vector<double> p = level_probabilities(sigma);
  for (const double q : p)
    if (q > 0) e.entropy -= q * std::log2(q);
  const double variance = moment(p, 2) - moment(p, 1) * moment(p, 1);
  const bool large = c.variance_type == VarianceType::kFixedLarge;
  for (size_t t = 1; t < s.ab.size(); ++t) {
    // Var(x0 | x_t), and through it the variance of x_{t-1} given x_t.
    const double left = variance * (1 - s.ab[t]) / (s.ab[t] * variance + 1 - s.ab[t]);
    const double post = s.post_var[t], model = large ? s.beta[t] : post;
    const double own = post + s.coef1[t] * s.coef1[t] * left;
    e.kl += 0.5 * (-1 + std::log(model / post) + own / model) / kLn2;
    e.mismatch += 0.5 * (-1 + std::log(model / own) + own / model) / kLn2;
  }
  const double scale = std::sqrt(s.post_var[1]), mean = moment(p, 1);
  for (int u = 0; u < 256; ++u)
    for (double z = -5; z <= 5; z += 0.1) {
      const double x0 = u / 127.5 - 1, q = p[static_cast<size_t>(u)];
      if (q < 1e-9) continue;
      const double x1 = s.sqrt_ab[0] * (x0 - mean) + s.sqrt_1mab[0] * z;
      const double m = mean + predict_x0(s, variance, x1, 0);
      const auto cdf = [&](double x) {
        return 0.5 * std::erfc(-(x - m) / scale / std::numbers::sqrt2);
      };
      const double level =
          (u == 255 ? 1 : cdf(x0 + 1 / 255.0)) - (u == 0 ? 0 : cdf(x0 - 1 / 255.0));
      const double density = 0.1 * std::exp(-0.5 * z * z) / std::sqrt(2 * std::numbers::pi);
      e.decoder -= q * density * std::log2(std::max(level, 1e-12));
    }
  return e;
}

BoundSums bounds(const SchedulerConfig& c, const Dataset& data, const BoundOptions& o,
                 const Denoiser& network) {
  const Bound bound(Schedule(c), c);
  BoundSums sums(bound.timesteps());
  add_bounds(bound, data, o, network, sums);
  return sums;
}

double sum_behind_0(const std::vector<double>& terms) {
  return std::accumulate(terms.begin() + 1, terms.end(), 0.0);
}

}  // namespace

TEST_CASE("bound sums: images that are known cost the mismatch of the variances alone",
          "[bound_sums]") {
  SchedulerConfig c;
  Dataset data = make_dataset(1, {1, 4, 4, 3});
  std::fill(data.images.begin(), data.images.end(), uint8_t{90});
  const double x0 = 90 / 127.5 - 1;
  for (const auto variance : {VarianceType::kFixedLarge, VarianceType::kFixedSmall}) {
    c.variance_type = variance;
    const Schedule s(c);
    const BoundSums sums = bounds(c, data, {.num = 1, .batch_size = 64}, best_network(s, 0, x0));
    const std::vector<double> terms = sums.mean_terms();
    // 0.48642 of the paper's CIFAR-10 model; 0.12139 nats of it at t = 1.
    const bool large = variance == VarianceType::kFixedLarge;
    CHECK(sum_behind_0(terms) == Approx(large ? 0.48642 : 0).epsilon(0).margin(1e-5));
    CHECK(terms[1] * kLn2 == Approx(large ? 0.12139 : 0).epsilon(0).margin(1e-5));
    CHECK(terms[0] == Approx(1.3).epsilon(0.02));
    CHECK(sums.distortion()[999] < 1e-2);
  }
}

TEST_CASE("bound sums: of Gaussian images and the best network, entropy and mismatch",
          "[bound_sums]") {
  SchedulerConfig c;
  const Shape image{1, 16, 16, 3};
  constexpr int kNum = 3;
  for (const double sigma : {0.02, 0.25}) {
    const Dataset data = gaussian_images(kNum, image, sigma);
    const std::vector<double> p = level_probabilities(sigma);
    const double mean = moment(p, 1), variance = moment(p, 2) - mean * mean;
    for (const auto type : {VarianceType::kFixedLarge, VarianceType::kFixedSmall}) {
      c.variance_type = type;
      const Schedule s(c);
      const Expected e = expected(s, c, sigma);
      const BoundSums sums =
          bounds(c, data, {.num = kNum, .batch_size = 50}, best_network(s, variance, mean));
      const std::vector<double> terms = sums.mean_terms();
      INFO("sigma " << sigma << " entropy " << e.entropy << " mismatch " << e.mismatch);
      // Four standard errors of 2,304 pixels' squares: 4 sqrt(2 / 2304) of the part that they are.
      const double error = 0.12;
      CHECK(sum_behind_0(terms) == Approx(e.kl).epsilon(0).margin(error));
      CHECK(terms[0] == Approx(e.decoder).epsilon(0).margin(error));
      // The bound is above the entropy by the mismatch, and by what the decoder, whose width is
      // that of a level, loses: 0.04 and 0.12 bits.
      const double total = sums.mean_prior() + std::accumulate(terms.begin(), terms.end(), 0.0);
      CHECK(
          total ==
          Approx(e.entropy + e.mismatch + (sigma < 0.1 ? 0.035 : 0.115)).epsilon(0).margin(error));
      CHECK(sums.ci95() < 0.2);
      // Distortion: the root of Var(x0 | x_t).
      const auto left = [&](size_t t) {
        return 127.5 * std::sqrt(variance * (1 - s.ab[t]) / (s.ab[t] * variance + 1 - s.ab[t]));
      };
      for (const size_t t : {0, 100, 500, 999})
        CHECK(sums.distortion()[t] == Approx(left(t)).epsilon(0.07));
      const std::vector<double> rate = sums.rate();
      CHECK(rate[0] == Approx(sum_behind_0(terms)).epsilon(1e-12));
      CHECK(rate[998] == terms[999]);
      CHECK(rate[999] == 0);
    }
  }
}

TEST_CASE("bound sums: no bit hangs on batch, threads or a stop in between", "[bound_sums]") {
  SchedulerConfig c;
  c.num_train_timesteps = 23;
  c.beta_end = 0.3;
  const Schedule s(c);
  const Dataset data = gaussian_images(7, {1, 5, 3, 3}, 0.3);
  const Denoiser network = best_network(s, 0.08, 0.02);
  const auto run = [&](int batch, int threads) {
    return bounds(c, data, {.seed = 4, .num = 6, .batch_size = batch, .threads = threads}, network);
  };
  const auto same = [](const BoundSums& a, const BoundSums& b) {
    return a.images == b.images && a.bits == b.bits && a.squared_bits == b.squared_bits &&
           a.prior == b.prior && a.terms == b.terms && a.mse == b.mse &&
           a.image_terms == b.image_terms && a.image_mse == b.image_mse;
  };
  const BoundSums one = run(1, 1);
  CHECK(one.images == 6);
  for (const auto& [batch, threads] : {std::pair{7, 1}, {7, 3}, {64, 2}, {500, 1}})
    CHECK(same(one, run(batch, threads)));

  // Stopped after 5 batches and gone on with in others.
  const Bound bound(s, c);
  BoundSums parts(bound.timesteps());
  int batches = 0;
  BoundOptions o{.seed = 4, .num = 6, .batch_size = 10};
  CHECK_THROWS_AS(add_bounds(bound, data, o, network, parts,
                             [&](const BoundSums&) {
                               if (++batches == 5) throw 5;
                             }),
                  int);
  CHECK(parts.images == 2);
  CHECK(parts.image_terms.size() == 4);
  o.batch_size = 3;
  add_bounds(bound, data, o, network, parts);
  CHECK(same(one, parts));

  // Another seed: other noise, other images.
  CHECK(bounds(c, data, {.seed = 5, .num = 6}, network).bits != one.bits);
  // The interval is that of the images' own bits.
  std::vector<double> bits;
  for (int n = 1; n <= 6; ++n) {
    const double so_far = bounds(c, data, {.seed = 4, .num = n}, network).bits;
    bits.push_back(so_far - std::accumulate(bits.begin(), bits.end(), 0.0));
  }
  const double mean = std::accumulate(bits.begin(), bits.end(), 0.0) / 6;
  double squares = 0;
  for (const double b : bits) squares += (b - mean) * (b - mean);
  CHECK(one.ci95() == Approx(1.96 * std::sqrt(squares / 5 / 6)).epsilon(1e-6));
  CHECK(std::isnan(bounds(c, data, {.num = 1}, network).ci95()));
}

TEST_CASE("bound sums: an output that is not finite is an error", "[bound_sums]") {
  const SchedulerConfig c;
  const Dataset data = gaussian_images(1, {1, 2, 2, 1}, 0.3);
  const Denoiser broken = [](const auto&, const auto&, const auto&, std::vector<float>& out) {
    std::fill(out.begin(), out.end(), std::nanf(""));
  };
  CHECK_THROWS_WITH(bounds(c, data, {.num = 1}, broken), Catch::Contains("not finite"));
}
