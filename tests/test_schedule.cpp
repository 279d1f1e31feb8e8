// Golden values: the closed forms evaluated in double by another program, to the digits shown.
#include "model/schedule.h"

#include <catch2/catch.hpp>
#include <cmath>
#include <limits>

namespace {

using namespace ddpm;

// The golden tables below carry 9 digits.
Approx digits9(double v) { return Approx(v).epsilon(1e-8).margin(0); }
Approx digits6(double v) { return Approx(v).epsilon(1e-6).margin(0); }

Schedule make(BetaSchedule kind, int timesteps = 1000) {
  SchedulerConfig c;
  c.beta_schedule = kind;
  c.num_train_timesteps = timesteps;
  return Schedule(c);
}

}  // namespace

TEST_CASE("schedule: linear tables", "[schedule]") {
  const Schedule s = make(BetaSchedule::kLinear);
  REQUIRE(s.timesteps() == 1000);
  struct Row {
    size_t t;
    double beta, ab, sqrt_1mab, sqrt_recipm1, post_var, coef1, coef2;
  };
  const Row rows[] = {
      {0, 1e-4, 0.9999, 0.01, 0.0100005, 0, 1, 0},
      {1, 1.1991992e-4, 0.999780092, 0.0148292929, 0.0148309237, 5.45318766e-05, 0.5452915,
       0.454708499},
      {10, 2.99199199e-4, 0.997806573, 0.046834042, 0.0468854902, 2.5846362e-04, 0.13627786,
       0.863722069},
      {100, 2.09199199e-3, 0.895141591, 0.323818482, 0.342259699, 2.05455353e-03, 0.0188954556,
       0.981076103},
      {500, 0.01005996, 0.0777966584, 0.960314189, 3.44296711, 0.0100513358, 3.05805708e-03,
       0.994104351},
      {999, 0.02, 4.03582977e-05, 0.999979821, 157.407281, 0.0199999835, 1.28351487e-04,
       0.989948678},
  };
  for (const Row& r : rows) {
    INFO("t " << r.t);
    CHECK(s.beta[r.t] == digits9(r.beta));
    CHECK(s.ab[r.t] == digits9(r.ab));
    CHECK(s.sqrt_1mab[r.t] == digits9(r.sqrt_1mab));
    CHECK(s.sqrt_recipm1[r.t] == Approx(r.sqrt_recipm1).epsilon(2e-8));
    CHECK(s.post_var[r.t] == digits9(r.post_var));
    CHECK(s.coef1[r.t] == digits9(r.coef1));
    CHECK(s.coef2[r.t] == digits9(r.coef2));
  }
  CHECK(s.posterior_log_variance_clipped[0] == digits6(-9.816725));
  CHECK(s.posterior_log_variance_clipped[1] == s.posterior_log_variance_clipped[0]);
  CHECK(std::exp(0.5 * s.posterior_log_variance_clipped[0]) == digits6(7.38457e-3));
  CHECK(s.posterior_log_variance_clipped[100] == digits9(std::log(s.post_var[100])));
}

TEST_CASE("schedule: alpha-bar of the other schedules", "[schedule]") {
  const Schedule scaled = make(BetaSchedule::kScaledLinear);
  CHECK(scaled.ab[999] == Approx(7.334e-4).epsilon(1e-4));
  CHECK(scaled.beta[0] == digits9(1e-4));
  CHECK(scaled.beta[999] == digits9(0.02));
  const Schedule cosine = make(BetaSchedule::kSquaredcosCapV2);
  CHECK(cosine.beta[0] == digits6(4.128422e-05));
  CHECK(cosine.beta[1] == digits6(4.614175e-05));
  CHECK(cosine.beta[500] == digits6(3.155691e-03));
  CHECK(cosine.beta[998] < 0.999);
  CHECK(cosine.beta[999] == 0.999);
  CHECK(cosine.ab[499] == digits6(0.493844));
  CHECK(cosine.ab[998] == Approx(2.4288e-06).epsilon(2e-5));
  CHECK(cosine.ab[999] == Approx(2.4288e-09).epsilon(2e-5));
}

// From decimal arithmetic with 40 digits.
TEST_CASE("schedule: the authors' other schedules, and sigmoid", "[schedule]") {
  struct Row {
    BetaSchedule kind;
    size_t t;
    double beta, ab;
  };
  const Row rows[] = {
      {BetaSchedule::kConst, 0, 0.02, 0.98},
      {BetaSchedule::kConst, 250, 0.02, 6.2768969510e-3},
      {BetaSchedule::kConst, 999, 0.02, 1.6829673572e-9},
      {BetaSchedule::kWarmup10, 0, 1e-4, 0.9999},
      {BetaSchedule::kWarmup10, 1, 3.0101010101e-4, 9.9959902000e-1},
      {BetaSchedule::kWarmup10, 99, 0.02, std::nan("")},
      {BetaSchedule::kWarmup10, 250, 0.02, 1.7207485184e-2},
      {BetaSchedule::kWarmup10, 999, 0.02, 4.6136866817e-9},
      {BetaSchedule::kWarmup50, 1, 1.3987975952e-4, 9.9976013423e-1},
      {BetaSchedule::kWarmup50, 250, 1.0069939880e-2, 2.7785881351e-1},
      {BetaSchedule::kWarmup50, 500, 0.02, 6.2256565811e-3},
      {BetaSchedule::kWarmup50, 999, 0.02, 2.6061351337e-7},
      {BetaSchedule::kSigmoid, 0, 1.4920520082e-4, 9.9985079480e-1},
      {BetaSchedule::kSigmoid, 250, 1.0464782947e-3, 9.0279891622e-1},
      {BetaSchedule::kSigmoid, 500, 1.0079879790e-2, 2.9888762785e-1},
      {BetaSchedule::kSigmoid, 999, 1.9950794799e-2, 3.9681819905e-5},
  };
  for (const Row& r : rows) {
    const Schedule s = make(r.kind);
    INFO(name_of(r.kind) << " t " << r.t);
    CHECK(s.beta[r.t] == digits9(r.beta));
    if (!std::isnan(r.ab)) CHECK(s.ab[r.t] == digits9(r.ab));
  }
}

TEST_CASE("schedule: jsd halves nothing and ends in noise", "[schedule]") {
  for (const int timesteps : {2, 3, 1000, 4000}) {
    const Schedule s = make(BetaSchedule::kJsd, timesteps);
    const size_t last = static_cast<size_t>(timesteps) - 1;
    for (size_t t = 0; t < last; ++t) {
      REQUIRE(s.beta[t] == digits9(1.0 / (timesteps - static_cast<double>(t))));
      REQUIRE(s.ab[t] == digits9((static_cast<double>(last) - static_cast<double>(t)) / timesteps));
    }
    CHECK(s.beta[last] == 1);
    CHECK(s.ab[last] == 0);
    CHECK(s.snr[last] == 0);
    CHECK(std::isinf(s.sqrt_recip[last]));
    CHECK(std::isinf(s.sqrt_recipm1[last]));
    // The posterior there: x_{t-1} owes nothing to x_t.
    CHECK(s.coef2[last] == 0);
    CHECK(s.coef1[last] == digits9(std::sqrt(1.0 / timesteps)));
    CHECK(s.post_var[last] == digits9(1 - 1.0 / timesteps));
    const std::vector<float> table = s.noise_table();
    CHECK(table[2 * last] == 0);
    CHECK(table[2 * last + 1] == 1);
  }
}

TEST_CASE("schedule: a warm-up of few timesteps", "[schedule]") {
  // int(T share): none of 9 timesteps rises, one of 10 is the start alone, then two.
  CHECK(make(BetaSchedule::kWarmup10, 9).beta == std::vector<double>(9, 0.02));
  const Schedule ten = make(BetaSchedule::kWarmup10, 10);
  CHECK(ten.beta[0] == 1e-4);
  CHECK(ten.beta[1] == 0.02);
  const Schedule five = make(BetaSchedule::kWarmup50, 5);
  CHECK(five.beta == std::vector<double>{1e-4, 0.02, 0.02, 0.02, 0.02});
  CHECK(make(BetaSchedule::kWarmup50, 7).beta[1] == digits9((1e-4 + 0.02) / 2));
}

TEST_CASE("schedule: identities between the tables", "[schedule]") {
  for (const auto kind :
       {BetaSchedule::kLinear, BetaSchedule::kScaledLinear, BetaSchedule::kSquaredcosCapV2,
        BetaSchedule::kSigmoid, BetaSchedule::kConst, BetaSchedule::kWarmup10,
        BetaSchedule::kWarmup50, BetaSchedule::kJsd})
    for (const int timesteps : {2, 3, 10, 1000, 2500}) {
      const Schedule s = make(kind, timesteps);
      INFO(name_of(kind));
      REQUIRE(s.timesteps() == timesteps);
      CHECK(s.alpha_bar(-1) == 1);
      for (int t = 0; t < timesteps; ++t) {
        const auto i = static_cast<size_t>(t);
        INFO("timesteps " << timesteps << " t " << t);
        REQUIRE(s.alpha_bar(t) == s.ab[i]);
        REQUIRE(s.abp[i] == s.alpha_bar(t - 1));
        REQUIRE(s.ab[i] == Approx(s.abp[i] * (1 - s.beta[i])).epsilon(1e-15));
        REQUIRE(s.sqrt_ab[i] * s.sqrt_ab[i] + s.sqrt_1mab[i] * s.sqrt_1mab[i] ==
                Approx(1).epsilon(1e-14));
        // 1 - ab cancels, so what involves it agrees to eps / (1 - ab).
        if (s.ab[i] > 0) {
          REQUIRE(s.sqrt_ab[i] * s.sqrt_recip[i] == Approx(1).epsilon(1e-14));
          REQUIRE(s.sqrt_recipm1[i] * s.sqrt_recipm1[i] * s.snr[i] == Approx(1).epsilon(1e-10));
        }
        REQUIRE(s.log_1mab[i] == Approx(2 * std::log(s.sqrt_1mab[i])).epsilon(1e-13).margin(1e-15));
        // The posterior mean of x_t = sqrt_ab x_0 without noise is sqrt_abp x_0.
        REQUIRE(s.coef1[i] + s.coef2[i] * s.sqrt_ab[i] ==
                Approx(std::sqrt(s.abp[i])).epsilon(1e-10));
        // Variance of x_{t-1}: through the posterior, or directly.
        REQUIRE(s.post_var[i] + s.coef2[i] * s.coef2[i] * (1 - s.ab[i]) ==
                Approx(1 - s.abp[i]).epsilon(1e-10).margin(1e-18));
      }
    }
}

TEST_CASE("schedule: the float table of q_sample", "[schedule]") {
  const Schedule s = make(BetaSchedule::kLinear);
  const std::vector<float> table = s.noise_table();
  REQUIRE(table.size() == 2000);
  for (const size_t t : {0, 1, 500, 999}) {
    CHECK(table[2 * t] == static_cast<float>(std::sqrt(s.ab[t])));
    CHECK(table[2 * t + 1] == static_cast<float>(std::sqrt(1 - s.ab[t])));
  }
}

TEST_CASE("schedule: betas that cannot be used", "[schedule]") {
  const auto status = [](const SchedulerConfig& c) {
    try {
      Schedule s(c);
      return Status::kOk;
    } catch (const Error& e) {
      return e.status();
    }
  };
  SchedulerConfig c;
  CHECK(status(c) == Status::kOk);
  c.beta_end = 0.9;  // the product underflows what fp32 can divide by
  CHECK(status(c) == Status::kConfig);
  c.num_train_timesteps = 10;
  CHECK(status(c) == Status::kOk);
  c = {.num_train_timesteps = 4000, .beta_schedule = BetaSchedule::kConst};
  CHECK(status(c) == Status::kConfig);  // 0.98^4000
  for (const double bad : {0.0, -1e-4, 1.0, 1e-17, std::numeric_limits<double>::quiet_NaN(),
                           std::numeric_limits<double>::infinity()}) {
    c = {};
    c.beta_start = bad;
    CHECK(status(c) == Status::kConfig);
    c = {};
    c.beta_end = bad;
    CHECK(status(c) == Status::kConfig);
  }
  for (const int bad : {-1, 0, 1}) {
    c = {};
    c.num_train_timesteps = bad;
    CHECK(status(c) == Status::kBug);  // the reader of configurations lets none through
  }
}
