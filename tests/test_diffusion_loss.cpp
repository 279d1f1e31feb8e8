// Every training loss and its gradient against the paper's definitions in long double, and the
// formulas they are made of at their extremes.
#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include <catch2/catch.hpp>

#include "engine/safetensors.h"
#include "kernels/bound_terms.h"
#include "model/likelihood.h"
#include "tests/diffusion_support.h"
#include "tests/reference/diffusion_loss.h"
#include "tests/simt/machine.h"

using namespace ddpm;
using test::for_simt;
using test::relative_error;

namespace {

constexpr VarianceType kVariances[] = {VarianceType::kFixedSmall, VarianceType::kFixedLarge,
                                       VarianceType::kLearned, VarianceType::kLearnedRange};
constexpr PredictionType kPredictions[] = {PredictionType::kEpsilon, PredictionType::kSample,
                                           PredictionType::kVPrediction,
                                           PredictionType::kPreviousMean};

bool legal(LossKind loss, VarianceType variance) {
  if (loss == LossKind::kSimple) return !is_learned(variance);
  return loss == LossKind::kKl || variance == VarianceType::kLearnedRange;
}

// A batch whose images are at timesteps 0, 1, ..., 999, and what the backend is told of it.
struct Case {
  Shape shape;
  Schedule schedule;
  SchedulerConfig config;
  LossKind loss;
  std::vector<int32_t> t;
  std::vector<float> x0, noise, target, mean, variance, prediction;

  ref::TrainedImage image(int n) const {
    const auto part = [&](const std::vector<float>& v) {
      const auto begin = v.begin() + n * shape.pixels() * shape.c;
      return std::vector<double>(begin, begin + shape.pixels() * shape.c);
    };
    return {schedule, config, loss, part(x0), part(noise), t[static_cast<size_t>(n)]};
  }
};

// The prediction misses its target by about `miss` of one standard deviation of p(x_{t-1} | x_t).
Case make_case(const Backend& backend, const Shape& shape, const SchedulerConfig& config,
               LossKind loss, float miss) {
  Case c{shape, Schedule(config), config, loss, {}, {}, {}, {}, {}, {}, {}};
  const int32_t steps[] = {0, 1, 17, 500, 999};
  for (int n = 0; n < shape.n; ++n) c.t.push_back(steps[n % 5]);
  for (const float v : test::random_values(shape.count(), 1, 140, 127.5f))  // the ends come often
    c.x0.push_back(std::round(std::clamp(v, 0.0f, 255.0f)) / 127.5f - 1);
  c.noise = test::random_values(shape.count(), 2, 2);
  const auto factors = loss_factors(c.schedule, config);
  const auto missed = test::random_values(shape.count(), 3, miss);
  const auto v = test::random_values(shape.count(), 4, 1.1f);
  const int64_t size = shape.pixels() * shape.c;
  for (int n = 0; n < shape.n; ++n) {
    const auto t = static_cast<size_t>(c.t[static_cast<size_t>(n)]);
    const ref::TrainedImage image = c.image(n);
    const double sigma = std::exp(0.5 * c.schedule.posterior_log_variance_clipped[t]);
    for (int64_t i = 0; i < size; ++i) {
      const auto at = static_cast<size_t>(n * size + i);
      const auto goal = static_cast<double>(ref::goal(image, static_cast<size_t>(i)));
      c.target.push_back(static_cast<float>(goal));
      c.mean.push_back(static_cast<float>(goal + sigma / factors[t].mean * missed[at]));
      const bool raw = config.variance_type == VarianceType::kLearned;
      c.variance.push_back(
          raw ? static_cast<float>(c.schedule.posterior_log_variance_clipped[t]) + v[at] : v[at]);
    }
  }
  c.mean = test::rounded(backend, c.mean);
  c.variance = test::rounded(backend, c.variance);
  if (!is_learned(config.variance_type)) {
    c.prediction = c.mean;
    return c;
  }
  for (size_t i = 0; i < c.mean.size(); i += static_cast<size_t>(shape.c))
    for (const auto* half : {&c.mean, &c.variance})
      c.prediction.insert(c.prediction.end(), half->begin() + static_cast<std::ptrdiff_t>(i),
                          half->begin() + static_cast<std::ptrdiff_t>(i) + shape.c);
  return c;
}

struct LossRun {
  std::vector<float> sample_loss, d_prediction;
  StepState state;
};

LossRun run_loss(Backend& backend, const Case& c, int step_images,
                 const std::vector<float>& weight = {}) {
  test::Bench b(backend);
  std::vector<LossFactors> factors = loss_factors(c.schedule, c.config);
  const DiffusionLossDesc d{.x = c.shape,
                            .loss = c.loss,
                            .variance = is_learned(c.config.variance_type),
                            .timesteps = c.schedule.timesteps(),
                            .step_images = step_images};
  const In p = b.activation(c.prediction), target = b.in(c.target);
  const bool bound = c.loss != LossKind::kSimple;
  const In x0 = bound ? b.in(c.x0) : In{}, t = bound ? b.in(c.t) : In{};
  const In f = bound ? b.in(factors) : In{}, w = weight.empty() ? In{} : b.in(weight);
  const Out sample_loss = b.out(c.shape.n);
  const Out d_prediction = b.activation_out(static_cast<int64_t>(c.prediction.size()));
  const Out state = b.inout(std::vector<StepState>{{.step = 6}});
  b.run(backend.diffusion_loss(d, p, target, x0, t, f, w, sample_loss, d_prediction, state));
  return {b.get(sample_loss), b.get_activation(d_prediction), b.get<StepState>(state)[0]};
}

// Halves of what was read or written in 2 C channels.
std::vector<double> half(const std::vector<float>& v, int c, int which, bool both) {
  std::vector<double> result;
  for (size_t i = 0; i < v.size(); ++i)
    if (!both || static_cast<int>(i / static_cast<size_t>(c)) % 2 == which)
      result.push_back(double{v[i]});
  return result;
}

// The prediction and its target round once each: of their difference, which is a tenth of them at
// the largest t and less elsewhere, that is 1e-6, and twice that of its square.
void check_case(Backend& backend, const Case& c) {
  constexpr double kTolerance = 3e-5;
  const int step_images = c.shape.n + 3;
  std::vector<float> weight;
  for (int n = 0; n < c.shape.n; ++n) weight.push_back(0.25f + 0.5f * static_cast<float>(n));
  const bool both = is_learned(c.config.variance_type);
  const size_t size = c.x0.size() / static_cast<size_t>(c.shape.n);
  for (const bool weighted : {false, true}) {
    const LossRun run = run_loss(backend, c, step_images, weighted ? weight : std::vector<float>{});
    const auto d_mean = half(run.d_prediction, c.shape.c, 0, both);
    const auto d_variance = both ? half(run.d_prediction, c.shape.c, 1, both) : d_mean;
    double loss = 0;
    for (int n = 0; n < c.shape.n; ++n) {
      CAPTURE(n, c.t[static_cast<size_t>(n)], weighted);
      const auto part = [&](const auto& v) {
        const auto begin = v.begin() + static_cast<std::ptrdiff_t>(static_cast<size_t>(n) * size);
        return std::vector<double>(begin, begin + static_cast<std::ptrdiff_t>(size));
      };
      const ref::ImageLoss expected = ref::image_loss(c.image(n), part(c.mean), part(c.variance));
      CHECK(run.sample_loss[static_cast<size_t>(n)] ==
            Approx(expected.loss).epsilon(kTolerance).margin(1e-9));
      const double share = (weighted ? double{weight[static_cast<size_t>(n)]} : 1) / step_images;
      loss += share * expected.loss;
      const auto scaled = [&](std::vector<double> v) {
        for (double& x : v) x *= share;
        return v;
      };
      const double allowed = kTolerance + test::rounding(backend);
      CHECK(relative_error(part(d_mean), scaled(expected.d_mean)) < allowed);
      if (both) CHECK(relative_error(part(d_variance), scaled(expected.d_variance)) < allowed);
    }
    CHECK(run.state.loss == Approx(loss).epsilon(kTolerance));
    CHECK(run.state.nonfinite == 0);
  }
}

void check_all(Backend& backend) {
  for (const LossKind loss : {LossKind::kSimple, LossKind::kKl, LossKind::kHybrid})
    for (const VarianceType variance : kVariances)
      for (const PredictionType prediction : kPredictions) {
        if (!legal(loss, variance)) continue;
        CAPTURE(static_cast<int>(loss), name_of(variance), name_of(prediction));
        const SchedulerConfig config{.prediction_type = prediction, .variance_type = variance};
        check_case(backend, make_case(backend, {5, 3, 3, 3}, config, loss, 1.5f));
      }
  // Around vectors, runs of 8, chunks and blocks.
  const SchedulerConfig range{.variance_type = VarianceType::kLearnedRange};
  for (const Shape& shape :
       {Shape{1, 1, 1, 1}, Shape{5, 1, 1, 2}, Shape{3, 1, 5, 4}, Shape{2, 2, 4, 8},
        Shape{1, 1, 1, 17}, Shape{2, 1, 1399, 3}, Shape{1, 64, 65, 1}})
    check_case(backend, make_case(backend, shape, range, LossKind::kHybrid, 0.7f));
}

void check_refusals(Backend& backend) {
  DiffusionLossDesc d{.x = {2, 1, 1, 3}, .loss = LossKind::kKl, .timesteps = 10, .step_images = 2};
  CHECK_THROWS_AS(backend.diffusion_loss(d, {0}, {1}, {}, {2}, {3}, {}, {4}, {5}, {6}), Error);
  CHECK_THROWS_AS(backend.diffusion_loss(d, {0}, {1}, {2}, {}, {3}, {}, {4}, {5}, {6}), Error);
  CHECK_THROWS_AS(backend.diffusion_loss(d, {0}, {1}, {2}, {3}, {}, {}, {4}, {5}, {6}), Error);
  d.step_images = 1;
  CHECK_THROWS_AS(backend.diffusion_loss(d, {0}, {1}, {2}, {3}, {4}, {}, {5}, {6}, {7}), Error);
  d.step_images = 2;
  d.timesteps = 0;
  CHECK_THROWS_AS(backend.diffusion_loss(d, {0}, {1}, {2}, {3}, {4}, {}, {5}, {6}, {7}), Error);
}

// What is not finite shows in the state, in its image's loss, and nowhere else.
void check_not_finite(Backend& backend) {
  const SchedulerConfig range{.variance_type = VarianceType::kLearnedRange};
  for (const size_t at : {size_t{0}, size_t{3}, size_t{40}})  // of mean and variance
    for (const float bad :
         {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity()}) {
      Case c = make_case(backend, {5, 1, 3, 3}, range, LossKind::kHybrid, 1);
      c.prediction[at] = bad;
      const LossRun run = run_loss(backend, c, 5);
      CAPTURE(at, bad);
      CHECK(run.state.nonfinite == kLossNonFinite);
      CHECK(run.state.bad_step == 6);
      const size_t image = at / 18;
      for (size_t n = 0; n < 5; ++n) CHECK(std::isfinite(run.sample_loss[n]) == (n != image));
    }
}

}  // namespace

TEST_CASE("diffusion_loss: every loss and gradient against its definition", "[diffusion_loss]") {
  check_all(*make_cpu_backend({.threads = 1}));
  check_refusals(*make_cpu_backend({}));
}
TEST_CASE("simt.diffusion_loss: every loss and gradient against its definition",
          "[diffusion_loss]") {
  for_simt([](Backend& backend) {
    check_all(backend);
    check_refusals(backend);
  });
}

namespace {

std::vector<float> golden(const SafetensorsReader& file, const std::string& name) {
  const TensorInfo* t = file.find(name);
  REQUIRE(t != nullptr);
  std::vector<float> values(static_cast<size_t>(t->bytes) / sizeof(float));
  file.read_f32(*t, values.data());
  return values;
}

// Tolerance as above: the file's targets are rounded to float once.
void check_golden(Backend& backend) {
  const SafetensorsReader file(DDPM_SOURCE_DIR "/tests/golden/losses.safetensors");
  constexpr const char* words[] = {"simple", "kl", "hybrid"};
  int cases = 0;
  for (const LossKind loss : {LossKind::kSimple, LossKind::kKl, LossKind::kHybrid})
    for (const VarianceType variance : kVariances)
      for (const PredictionType prediction : kPredictions) {
        if (!legal(loss, variance)) continue;
        ++cases;
        const std::string name = std::string(words[static_cast<size_t>(loss)]) + "." +
                                 name_of(variance) + "." + name_of(prediction);
        CAPTURE(name);
        const SchedulerConfig config{.prediction_type = prediction, .variance_type = variance};
        Case c{{5, 2, 2, 3},
               Schedule(config),
               config,
               loss,
               {0, 1, 17, 500, 999},
               {},
               {},
               {},
               {},
               {},
               {}};
        c.x0 = golden(file, "x0");
        c.target = golden(file, name_of(prediction) + ".target");
        c.prediction = golden(file, name + ".prediction");
        const LossRun run = run_loss(backend, c, 5);
        const std::vector<float> each = golden(file, name + ".loss");
        const std::vector<float> gradient = golden(file, name + ".gradient");
        const size_t size = gradient.size() / 5;
        for (size_t n = 0; n < 5; ++n) {
          CAPTURE(c.t[n]);
          CHECK(run.sample_loss[n] == Approx(each[n]).epsilon(1e-4).margin(1e-9));
          const auto image = [&](const std::vector<float>& v) {
            return std::vector<float>(&v[n * size], &v[n * size] + size);
          };
          CHECK(relative_error(image(run.d_prediction), image(gradient)) < 1e-4);
        }
      }
  CHECK(cases == 28);
}

}  // namespace

TEST_CASE("diffusion_loss: values and gradients by PyTorch", "[diffusion_loss]") {
  check_golden(*make_cpu_backend({.threads = 1}));
}
TEST_CASE("simt.diffusion_loss: values and gradients by PyTorch", "[diffusion_loss]") {
  check_golden(*test::make_kernel_backend(DType::kF32));
}

TEST_CASE("diffusion_loss: reports what is not finite", "[diffusion_loss]") {
  check_not_finite(*make_cpu_backend({}));
}
TEST_CASE("simt.diffusion_loss: reports what is not finite", "[diffusion_loss]") {
  for_simt(check_not_finite);
}

TEST_CASE("diffusion_loss: threads and order change no bit", "[diffusion_loss]") {
  const auto one = make_cpu_backend({.threads = 1}), three = make_cpu_backend({.threads = 3});
  const SchedulerConfig range{.variance_type = VarianceType::kLearnedRange};
  const Case c = make_case(*one, {5, 61, 59, 3}, range, LossKind::kHybrid, 1);
  const LossRun a = run_loss(*one, c, 5), b = run_loss(*three, c, 5);
  CHECK(a.sample_loss == b.sample_loss);
  CHECK(a.d_prediction == b.d_prediction);
  CHECK(a.state.loss == b.state.loss);
}

namespace {

template <typename Real>
void check_terms(double tolerance) {
  // Slopes in long double: of fourth order.
  const auto slope = [](const auto& f, double x) {
    const long double h = 1e-4L * (1 + std::abs(x));
    const auto at = [&](int k) { return f(static_cast<long double>(x) + k * h); };
    return static_cast<double>((8 * (at(1) - at(-1)) - (at(2) - at(-2))) / (12 * h));
  };
  const auto near = [&](double value, double expected, double scale) {
    CHECK(std::abs(value - expected) <= tolerance * (std::abs(expected) + scale));
  };
  for (const Real lv : {-14, -10, -4, 0, 3})
    for (const Real excess : {-8, -1, 0, 1, 8})
      for (const Real sigmas : {0.0, 1e-3, 1.0, 30.0}) {
        const Real error = sigmas * std::exp(lv / 2);
        CAPTURE(lv, excess, sigmas);
        const BoundSlopes<Real> term = kl_term(error, lv, excess);
        const long double e = error, l = lv;
        const auto exact = [&](long double m, long double d) {
          return ref::normal_kl(0, l, m, l + d);
        };
        near(term.nats, static_cast<double>(exact(e, excess)), 0);
        near(term.by_error, static_cast<double>(e * std::exp(-l - excess)), 0);
        near(term.by_log_variance, slope([&](long double d) { return exact(e, d); }, excess), 1e-7);
      }
  // Where both distributions are nearly one, nothing cancels: excess^2 / 4.
  CHECK(kl_term(Real(0), Real(-9), Real(0)).nats == 0);
  near(kl_term(Real(0), Real(-9), Real(1e-3)).nats, 2.4991670e-7, 1e-3);

  for (const int u : {0, 1, 77, 128, 254, 255})
    for (const Real lv : {-14.0, -12.0, -9.8, -6.0, 0.0, 6.0, 14.0})
      for (const Real levels : {0.0, 0.3, -1.0, 2.0, -7.0, 60.0}) {
        const Real x = u / 127.5 - 1, error = levels / 127.5;
        CAPTURE(u, lv, levels);
        const BoundSlopes<Real> term = decoder_term(x, error, lv);
        const long double e = error, v = lv, y = x;
        const auto exact = [&](long double m, long double l) {
          return ref::decoder_nats(y, y + m, l);
        };
        near(term.nats, static_cast<double>(exact(e, v)), 1e-2);
        if (exact(e, v) > 27.63) {
          CHECK(term.by_error == 0);
          CHECK(term.by_log_variance == 0);
          continue;
        }
        if (exact(e, v) > 25) continue;  // the reference's own p has lost its digits
        near(term.by_error, slope([&](long double m) { return exact(m, v); }, error),
             std::exp(-lv / 2));
        near(term.by_log_variance, slope([&](long double l) { return exact(e, l); }, lv), 1);
      }
}

}  // namespace

TEST_CASE("bound terms: closed forms and slopes at extremes, in double", "[diffusion_loss]") {
  check_terms<double>(1e-6);
}
TEST_CASE("bound terms: closed forms and slopes at extremes, in float", "[diffusion_loss]") {
  check_terms<float>(3e-5);
}

TEST_CASE("bound terms: values of the decoder", "[diffusion_loss]") {
  const double lv = 2 * std::log(7.384570e-3), middle = 128 / 127.5 - 1;
  const auto nats = [&](double x, double mean) {
    return decoder_term<double>(x, mean - x, lv).nats;
  };
  CHECK(nats(-1, -1) == Approx(0.353441).margin(1e-6));
  CHECK(nats(-1, -0.98) == Approx(4.225702).margin(1e-6));
  CHECK(nats(1, 1) == Approx(0.353441).margin(1e-6));
  CHECK(nats(middle, 0) == Approx(1.033554).margin(1e-6));
  CHECK(nats(middle, 0.01) == Approx(1.213657).margin(1e-6));
  CHECK(nats(middle, 0.5) == Approx(27.631021).margin(1e-6));
}

// The weight that L_simple drops (eq. 12), against published values.
TEST_CASE("loss factors: the bound weighs the noise's error as eq. 12", "[diffusion_loss]") {
  SchedulerConfig c{.variance_type = VarianceType::kFixedLarge};
  const Schedule s(c);
  const auto weight = [&](int t) {
    const LossFactors f = loss_factors(s, c)[static_cast<size_t>(t)];
    return 0.5 * double{f.mean} * f.mean / std::exp(double{f.log_variance} + f.excess);
  };
  const std::pair<int, double> large[] = {{1, 0.27269},     {2, 0.19440},     {10, 0.068224},
                                          {100, 0.0099962}, {500, 0.0055097}, {999, 0.0102045}};
  for (const auto& [t, expected] : large) CHECK(weight(t) == Approx(expected).epsilon(1e-4));
  c.variance_type = VarianceType::kFixedSmall;
  const std::pair<int, double> small[] = {{1, 0.59967}, {2, 0.31800}, {10, 0.078977}};
  for (const auto& [t, expected] : small) CHECK(weight(t) == Approx(expected).epsilon(1e-4));
  c.beta_schedule = BetaSchedule::kJsd;
  CHECK_THROWS_AS(loss_factors(Schedule(c), c), Error);
}
