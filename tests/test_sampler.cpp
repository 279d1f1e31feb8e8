// Rows of every sampler, applied in double to a model that needs no weights,
// out(x, t) = x t / (t + 1), against diffusers' schedulers (golden/make_sampler_steps.py).
#include "model/sampler.h"

#include <algorithm>
#include <catch2/catch.hpp>
#include <cmath>
#include <filesystem>
#include <functional>
#include <nlohmann/json.hpp>
#include <numeric>

#include "engine/json.h"

namespace {

using namespace ddpm;
using Values = std::vector<double>;
using Noise = std::function<double(int t, size_t i)>;

double toy(double x, int t) { return x * t / (t + 1.0); }

Values ramp() {
  Values x(768);
  for (size_t i = 0; i < x.size(); ++i) x[i] = static_cast<double>(i) / 768;
  return x;
}

// Backend::sampler_update in double; noise(t, i) is drawn where the row asks for it.
void apply(const SamplerRow& r, Values& x, Values& previous, const Noise& noise) {
  for (size_t i = 0; i < x.size(); ++i) {
    const double out = toy(x[i], r.t), limit = r.clip;
    const double x0 = std::clamp(r.x0_x * x[i] + r.x0_out * out, -limit, limit);
    x[i] = r.x_x * x[i] + r.x_x0 * x0 + r.x_out * out;
    if (r.x_previous != 0) x[i] += r.x_previous * previous[i];
    if (r.x_z != 0) x[i] += r.x_z * noise(r.t, i);
    previous[i] = x0;
  }
}

Values chain(const std::vector<SamplerRow>& rows, Values x, const Noise& noise) {
  Values previous(x.size(), std::nan(""));  // the first row must not read it
  for (const SamplerRow& r : rows) apply(r, x, previous, noise);
  return x;
}

// For rows that draw none.
Values chain(const std::vector<SamplerRow>& rows, Values x) {
  return chain(rows, std::move(x), [](int, size_t) { return std::nan(""); });
}

double sum_abs(const Values& x) {
  return std::accumulate(x.begin(), x.end(), 0.0,
                         [](double s, double v) { return s + std::abs(v); });
}

// x_t of the ramp, with the same ramp backwards as its noise.
Values noised_ramp(const Schedule& s, int t) {
  Values x = ramp();
  const double signal = std::sqrt(s.alpha_bar(t)), noise = std::sqrt(1 - s.alpha_bar(t));
  for (size_t i = 0; i < x.size(); ++i) x[i] = signal * x[i] + noise * (767.0 - i) / 768;
  return x;
}

std::vector<int> timesteps(const std::vector<SamplerRow>& rows) {
  std::vector<int> list;
  for (const SamplerRow& r : rows) list.push_back(r.t);
  return list;
}

// Values printed by diffusers' own tests, which compare to 1e-2 in sums and 1e-3 in means.
Approx published(double v) { return Approx(v).epsilon(0).margin(v > 1 ? 2e-3 : 1e-4); }

nlohmann::json golden() {
  const auto path = std::filesystem::path(__FILE__).parent_path() / "golden" / "sampler_steps.json";
  return *read_json_file(path.string(), Status::kFile);
}

template <typename F>
std::string error_of(F call) {
  try {
    call();
  } catch (const Error& e) {
    CHECK(e.status() == Status::kUsage);
    return e.what();
  }
  return "no error";
}

}  // namespace

TEST_CASE("sampler: published sums of a weightless model", "[sampler]") {
  SchedulerConfig c;
  const Schedule s(c);
  const SamplerOptions ddim{.kind = SamplerKind::kDdim, .steps = 10};
  const double sum = sum_abs(chain(sampler_rows(s, c, ddim), ramp()));
  CHECK(sum == published(172.0067));
  CHECK(sum / 768 == published(0.223967));

  SECTION("v_prediction") {
    c.prediction_type = PredictionType::kVPrediction;
    CHECK(sum_abs(chain(sampler_rows(s, c, ddim), ramp())) == published(52.5302));
  }
  SECTION("another beta_start") {
    c.beta_start = 0.01;
    CHECK(sum_abs(chain(sampler_rows(Schedule(c), c, ddim), ramp())) == published(149.8295));
  }
  SECTION("a chain entered in the middle") {
    auto rows = sampler_rows(s, c, ddim);
    rows.erase(rows.begin(), rows.begin() + 8);
    REQUIRE(rows[0].t == 100);
    CHECK(sum_abs(chain(rows, noised_ramp(s, 100))) == published(354.5418));
  }
  SECTION("dpmpp2m") {
    const auto rows = sampler_rows(s, c, {.kind = SamplerKind::kDpmpp2m, .steps = 10});
    CHECK(sum_abs(chain(rows, ramp())) / 768 == published(0.240900));
  }
}

TEST_CASE("sampler: dpmpp2m to the smallest training noise", "[sampler]") {
  SchedulerConfig c;
  const Schedule s(c);
  const auto rows = [&](size_t first) {
    const auto list = sampler_timesteps(SamplerKind::kDpmpp2m, Spacing::kLinspace, 10, 1000);
    std::vector<SamplerRow> result;
    for (size_t i = first; i < list.size(); ++i)
      result.push_back(dpmpp2m_row(s, c, i > first ? std::optional(list[i - 1]) : std::nullopt,
                                   list[i], i + 1 < list.size() ? list[i + 1] : 0));
    return result;
  };
  CHECK(sum_abs(chain(rows(0), ramp())) / 768 == published(0.3301));
  // Published 318.4111 comes from float32 tables.
  CHECK(sum_abs(chain(rows(5), noised_ramp(s, 500))) == Approx(318.4111).margin(5e-3).epsilon(0));
  c.prediction_type = PredictionType::kVPrediction;
  CHECK(sum_abs(chain(rows(0), ramp())) / 768 == published(0.2251));
}

TEST_CASE("sampler: variances", "[sampler]") {
  SchedulerConfig c;
  const Schedule s(c);
  const auto ddim = [&](int t, int next) {
    const double sigma = ddim_row(s, c, t, next, 1).x_z;
    return sigma * sigma;
  };
  // Published with 5 decimals, cut off.
  const auto printed = [](double v) { return Approx(v).epsilon(0).margin(1e-5); };
  CHECK(ddim(420, 400) == printed(0.14771));
  CHECK(ddim(980, 960) == printed(0.32460));
  CHECK(ddim(487, 486) == printed(0.00979));
  CHECK(ddim(999, 998) == printed(0.02));
  CHECK(ddim(0, -1) == 0);
  CHECK(ddim_row(s, c, 420, 400, 0).x_z == 0);
  CHECK(ddim_row(s, c, 420, 400, 0.5).x_z == Approx(0.5 * std::sqrt(0.14771)).epsilon(1e-4));

  const auto small = sampler_rows(s, c, {.steps = 1000});
  c.variance_type = VarianceType::kFixedLarge;
  const auto large = sampler_rows(s, c, {.steps = 1000});
  REQUIRE(small.size() == 1000);
  CHECK(std::pow(small[512].x_z, 2) == printed(0.00979));  // t = 487
  CHECK(std::pow(small[0].x_z, 2) == printed(0.02));
  for (size_t i = 0; i < 1000; ++i) {
    const size_t t = 999 - i;
    REQUIRE(small[i].t == static_cast<int>(t));
    REQUIRE(small[i].x_x0 == Approx(s.coef1[t]).epsilon(1e-7));
    REQUIRE(small[i].x_x == Approx(s.coef2[t]).epsilon(1e-7));
    REQUIRE(small[i].clip == 1);
    REQUIRE(small[i].x_out == 0);
    REQUIRE(small[i].x_previous == 0);
    REQUIRE(small[i].x_z == Approx(t > 0 ? std::sqrt(s.post_var[t]) : 0).epsilon(1e-6));
    REQUIRE(large[i].x_z == Approx(t > 0 ? std::sqrt(s.beta[t]) : 0).epsilon(1e-6));
  }
}

TEST_CASE("sampler: timestep lists", "[sampler]") {
  const auto list = [](SamplerKind kind, Spacing spacing, int steps) {
    return sampler_timesteps(kind, spacing, steps, 1000);
  };
  const auto ddim50 = list(SamplerKind::kDdim, Spacing::kLeading, 50);
  CHECK(ddim50[0] == 980);
  CHECK(ddim50[1] == 960);
  CHECK(ddim50[49] == 0);
  const auto trailing = list(SamplerKind::kDdim, Spacing::kTrailing, 50);
  CHECK(trailing[0] == 999);
  CHECK(trailing[1] == 979);
  CHECK(trailing[48] == 39);
  CHECK(trailing[49] == 19);
  const auto linspace = list(SamplerKind::kDdim, Spacing::kLinspace, 50);
  CHECK(std::vector<int>(linspace.begin(), linspace.begin() + 4) ==
        std::vector<int>{999, 979, 958, 938});
  CHECK(std::vector<int>(linspace.end() - 3, linspace.end()) == std::vector<int>{41, 20, 0});
  CHECK(list(SamplerKind::kDdpm, Spacing::kLinspace, 7) ==
        std::vector<int>{999, 832, 666, 500, 333, 166, 0});  // 499.5, 166.5: ties to even
  CHECK(list(SamplerKind::kDpmpp2m, Spacing::kLinspace, 10) ==
        std::vector<int>{999, 899, 799, 699, 599, 500, 400, 300, 200, 100});
  const auto dpm20 = list(SamplerKind::kDpmpp2m, Spacing::kLeading, 20);
  CHECK(dpm20[0] == 940);
  CHECK(dpm20[1] == 893);
  CHECK(dpm20[18] == 94);
  CHECK(dpm20[19] == 47);
}

TEST_CASE("sampler: timestep lists of every length", "[sampler]") {
  const nlohmann::json expected = golden()["timestep_hashes"];
  for (const SamplerKind kind : {SamplerKind::kDdpm, SamplerKind::kDdim, SamplerKind::kDpmpp2m})
    for (const Spacing spacing : {Spacing::kLeading, Spacing::kTrailing, Spacing::kLinspace}) {
      uint64_t hash = 0xcbf29ce484222325;
      for (int steps = 1; steps <= 1000; ++steps) {
        const bool repeats =
            steps == 1000 && kind == SamplerKind::kDpmpp2m && spacing != Spacing::kTrailing;
        if (repeats) {
          CHECK(error_of([&] {
                  sampler_timesteps(kind, spacing, steps, 1000);
                }).find("at most 999") != std::string::npos);
          continue;
        }
        for (const int t : sampler_timesteps(kind, spacing, steps, 1000))
          hash = (hash ^ static_cast<uint64_t>(t)) * 0x100000001b3;
      }
      INFO(name_of(kind) << " " << name_of(spacing));
      CHECK(format("%016llx", static_cast<unsigned long long>(hash)) ==
            expected[name_of(kind)][name_of(spacing)]);
    }
}

TEST_CASE("sampler: whole chains against diffusers", "[sampler]") {
  const nlohmann::json file = golden();
  REQUIRE(file["cases"].size() > 300);
  Values start;
  for (int i = 0; i < 16; ++i) start.push_back((i - 7.5) / 4);
  const auto noise = [](int t, size_t i) {
    return ((31 * t + 17 * static_cast<int>(i)) % 64 - 31.5) / 32;
  };
  for (const auto& row : file["cases"]) {
    const SchedulerConfig c = scheduler_from_json(row["config"], "case");
    SamplerOptions o{.kind = parse_sampler(row["sampler"].get<std::string>()),
                     .steps = row["steps"],
                     .eta = row["eta"]};
    if (row["config"].contains("timestep_spacing"))
      o.spacing = parse_spacing(row["config"]["timestep_spacing"].get<std::string>());
    const auto rows = sampler_rows(Schedule(c), c, o);
    REQUIRE(rows.size() == row["steps"].get<size_t>());
    const Values x = chain(rows, start, noise);
    // The rows' coefficients are floats; at t = 999 two of 157 cancel, so 157 * 2^-24 may remain.
    double worst = 0;
    for (size_t i = 0; i < x.size(); ++i)
      worst = std::max(worst, std::abs(x[i] - row["x"][i].get<double>()));
    INFO(row["sampler"] << " " << row["steps"] << " eta " << row["eta"] << " " << row["config"]);
    CHECK(worst < 1e-5);
  }
}

TEST_CASE("sampler: chains from pure noise, where alpha-bar is 0", "[sampler]") {
  SchedulerConfig c;
  c.beta_schedule = BetaSchedule::kJsd;
  c.num_train_timesteps = 8;
  const Schedule s(c);
  for (const auto type :
       {PredictionType::kEpsilon, PredictionType::kSample, PredictionType::kVPrediction}) {
    c.prediction_type = type;
    // x_0 at t = 7: unknown, the output, minus the output.
    const float by_out[] = {0, 1, -1};
    const SamplerRow ddpm = ddpm_row(s, c, 7, 6);
    CHECK(ddpm.x0_x == 0);
    CHECK(ddpm.x0_out == by_out[static_cast<size_t>(type)]);
    CHECK(ddpm.x_x == 0);
    CHECK(ddpm.x_x0 == Approx(std::sqrt(1.0 / 8)));
    CHECK(ddpm.x_z == Approx(std::sqrt(7.0 / 8)));
    for (const auto kind : {SamplerKind::kDdpm, SamplerKind::kDdim, SamplerKind::kDpmpp2m}) {
      const auto rows = sampler_rows(s, c, {.kind = kind, .spacing = Spacing::kLinspace});
      REQUIRE(rows[0].t == 7);
      for (const SamplerRow& r : rows)
        for (const float v : {r.x0_x, r.x0_out, r.x_x, r.x_x0, r.x_out, r.x_previous, r.x_z})
          CHECK(std::isfinite(v));
      // The network that knows x_0 = 0.5 of every pixel leads any start there.
      Values x{3, -1, 0.25}, previous(3);
      for (const SamplerRow& r : rows) {
        const double ab = s.alpha_bar(r.t), signal = std::sqrt(ab), noise = std::sqrt(1 - ab);
        for (size_t i = 0; i < x.size(); ++i) {
          const double eps = (x[i] - signal * 0.5) / noise;
          const double out = type == PredictionType::kEpsilon  ? eps
                             : type == PredictionType::kSample ? 0.5
                                                               : signal * eps - noise * 0.5;
          const double x0 = r.x0_x * x[i] + r.x0_out * out;
          x[i] = r.x_x * x[i] + r.x_x0 * x0 + r.x_out * out + r.x_previous * previous[i];
          previous[i] = x0;
        }
      }
      for (const double v : x) CHECK(v == Approx(0.5).margin(1e-5));
    }
  }
}

namespace {

bool same(const SamplerRow& a, const SamplerRow& b) {
  return a.t == b.t && a.x0_x == b.x0_x && a.x0_out == b.x0_out && a.clip == b.clip &&
         a.x_x == b.x_x && a.x_x0 == b.x_x0 && a.x_out == b.x_out && a.x_previous == b.x_previous &&
         a.x_z == b.x_z;
}

bool same(const std::vector<SamplerRow>& a, const std::vector<SamplerRow>& b) {
  return std::equal(a.begin(), a.end(), b.begin(), b.end(),
                    [](const SamplerRow& x, const SamplerRow& y) { return same(x, y); });
}

}  // namespace

TEST_CASE("sampler: a list of timesteps of one's own", "[sampler]") {
  SchedulerConfig c;
  const Schedule s(c);
  for (const auto kind : {SamplerKind::kDdpm, SamplerKind::kDdim, SamplerKind::kDpmpp2m})
    CHECK(same(sampler_rows(s, c, {.kind = kind, .steps = 4, .spacing = Spacing::kTrailing}),
               sampler_rows(s, c, {.kind = kind, .timesteps = {249, 999, 499, 749}})));

  // ddpm is the ancestral chain of a process that has these timesteps alone: its betas give the
  // tables of any other's.
  const std::vector<int> kept{0, 9, 39, 88, 400, 999};
  for (const auto variance : {VarianceType::kFixedSmall, VarianceType::kFixedLarge}) {
    c.variance_type = variance;
    const auto rows = sampler_rows(s, c, {.timesteps = kept});
    REQUIRE(rows.size() == kept.size());
    double ab = 1;
    for (size_t i = 0; i < kept.size(); ++i) {
      const double beta = 1 - s.alpha_bar(kept[i]) / (i == 0 ? 1 : s.alpha_bar(kept[i - 1]));
      const double abp = ab;
      ab *= 1 - beta;
      const SamplerRow& row = rows[kept.size() - 1 - i];
      CHECK(row.t == kept[i]);  // what the network is told is the old number
      CHECK(row.x_x0 == Approx(beta * std::sqrt(abp) / (1 - ab)).epsilon(1e-6));
      CHECK(row.x_x == Approx((1 - abp) * std::sqrt(1 - beta) / (1 - ab)).epsilon(1e-6));
      const double sigma2 =
          variance == VarianceType::kFixedLarge ? beta : beta * (1 - abp) / (1 - ab);
      CHECK(row.x_z == Approx(i == 0 ? 0 : std::sqrt(sigma2)).epsilon(1e-6));
    }
  }
  const auto error = [&](const SamplerOptions& o) {
    return error_of([&] { sampler_rows(s, c, o); });
  };
  using Catch::Contains;
  CHECK_THAT(error({.timesteps = {1000}}), Contains("1000") && Contains("0 to 999"));
  CHECK_THAT(error({.timesteps = {5, -1}}), Contains("-1"));
  CHECK_THAT(error({.timesteps = {7, 5, 7}}), Contains("7") && Contains("twice"));
  CHECK_THAT(error({.steps = 2, .timesteps = {7, 5}}), Contains("steps"));
}

TEST_CASE("sampler: the end of a chain, for a start that is an image", "[sampler]") {
  SchedulerConfig c;
  const Schedule s(c);
  const auto rows = [&](SamplerKind kind, double strength) {
    return sampler_rows(s, c, {.kind = kind, .steps = 50, .strength = strength});
  };
  // diffusers' get_timesteps: of 50 steps 0.58 leaves 29, though 50 * 0.58 is a little less.
  const std::pair<double, size_t> lengths[] = {{1, 50},   {0.99, 49}, {0.58, 29},
                                               {0.5, 25}, {0.039, 1}, {0.02, 1}};
  for (const auto kind : {SamplerKind::kDdpm, SamplerKind::kDdim}) {
    const auto whole = rows(kind, 1);
    for (const auto& [strength, length] : lengths) {
      INFO(strength);
      const auto part = rows(kind, strength);
      CHECK(part.size() == length);
      CHECK(same(part, {whole.end() - static_cast<std::ptrdiff_t>(part.size()), whole.end()}));
    }
  }
  const auto dpm = rows(SamplerKind::kDpmpp2m, 0.5);
  CHECK(dpm[0].x_previous == 0);  // there is none
  CHECK(dpm[1].x_previous != 0);
  // Or by the timestep.
  const auto from = [&](int start) {
    return sampler_rows(s, c, {.kind = SamplerKind::kDpmpp2m, .steps = 50, .start = start});
  };
  CHECK(from(999).size() == 50);
  CHECK(from(500)[0].t <= 500);
  CHECK(same(from(dpm[0].t), dpm));
  CHECK_THAT(error_of([&] { from(1); }), Catch::Contains("timestep 1"));
  const auto error = [&](double strength) {
    return error_of([&] { rows(SamplerKind::kDdim, strength); });
  };
  using Catch::Contains;
  CHECK_THAT(error(0), Contains("strength"));
  CHECK_THAT(error(1.1), Contains("strength"));
  CHECK_THAT(error(0.019), Contains("0.02"));
}

namespace {

using Network = std::function<double(double x, int t)>;

// The largest |there and back - x| over images of -1 .. 1, of a chain of ddim with eta 0.
double round_trip_error(const SchedulerConfig& c, const SamplerOptions& o, const Network& network) {
  const Schedule s(c);
  double worst = 0;
  for (double start = -1; start <= 1; start += 0.25) {
    double x = start;
    for (const auto& rows : {ddim_inverse_rows(s, c, o), sampler_rows(s, c, o)})
      for (const SamplerRow& r : rows) {
        const double out = network(x, r.t);
        x = r.x_x * x + r.x_x0 * (r.x0_x * x + r.x0_out * out) + r.x_out * out;
      }
    worst = std::max(worst, std::abs(x - start));
  }
  return worst;
}

// What the best network says of images N(0.1, 0.5^2).
Network gaussian(const SchedulerConfig& c) {
  return [s = Schedule(c), type = c.prediction_type](double x, int t) {
    const double ab = s.alpha_bar(t), signal = std::sqrt(ab), noise = std::sqrt(1 - ab);
    const double x0 = 0.1 + signal * 0.25 * (x - signal * 0.1) / (ab * 0.25 + 1 - ab);
    const double eps = (x - signal * x0) / noise;
    if (type == PredictionType::kSample) return x0;
    return type == PredictionType::kEpsilon ? eps : signal * eps - noise * x0;
  };
}

}  // namespace

TEST_CASE("sampler: a previous mean is the next mean, in every sampler the same x_0", "[sampler]") {
  SchedulerConfig c{.prediction_type = PredictionType::kPreviousMean};
  const Schedule s(c);
  // Without a gap the mean is the output, at t = 0 the image; only the reported x_0 is clipped.
  for (const int t : {0, 1, 400, 999}) {
    const SamplerRow row = ddpm_row(s, c, t, t - 1);
    CHECK(row.x_out == 1);
    CHECK(row.x_x == 0);
    CHECK(row.x_x0 == 0);
    CHECK(row.clip == 1);
    CHECK((row.x_z > 0) == (t > 0));
  }
  // Elsewhere as another prediction of the same x_0: the rows of `sample`, of x_0.
  SchedulerConfig direct = c;
  direct.prediction_type = PredictionType::kSample;
  const double x0 = 0.3, x = -0.7;
  for (const auto kind : {SamplerKind::kDdpm, SamplerKind::kDdim, SamplerKind::kDpmpp2m}) {
    const SamplerOptions o{.kind = kind, .steps = 20};
    const auto a = sampler_rows(s, c, o), b = sampler_rows(s, direct, o);
    for (size_t i = 0; i < a.size(); ++i) {
      const auto at = static_cast<size_t>(a[i].t);
      const auto next = [&](const SamplerRow& r, double out) {
        return r.x_x * x + r.x_x0 * (r.x0_x * x + r.x0_out * out) + r.x_out * out +
               r.x_previous * 0.1;
      };
      // The factor of x_0 is 1 / 1.3e-4 at t = 999, and a float.
      CHECK(next(a[i], s.coef1[at] * x0 + s.coef2[at] * x) ==
            Approx(next(b[i], x0)).epsilon(0).margin(2e-3));
      CHECK(a[i].x_z == b[i].x_z);
    }
  }
}

// A network that knows nothing says 0, which stands for an x_0 of thousands: chains stay bounded.
TEST_CASE("sampler: a previous mean's ddim goes by the clipped x_0", "[sampler]") {
  SchedulerConfig c{.prediction_type = PredictionType::kPreviousMean};
  double x = 1;
  for (const SamplerRow& row : sampler_rows(Schedule(c), c, {.kind = SamplerKind::kDdim})) {
    const double x0 = std::clamp(row.x0_x * x, -1.0, 1.0);
    CHECK(row.clip == 1);
    x = row.x_x * x + row.x_x0 * x0;
    REQUIRE(std::abs(x) < 1.5);
  }
  CHECK(x == 0);  // at t = 0 the output is the image
}

TEST_CASE("sampler: learned variances", "[sampler]") {
  SchedulerConfig c;
  const Schedule s(c);
  const auto log_variance = [&](int t, int next, double v) {
    const SamplerRow row = ddpm_row(s, c, t, next);
    return 2 * (std::log(row.x_z) + row.z_log + row.z_out * v);
  };
  c.variance_type = VarianceType::kLearned;
  for (const double v : {-9.0, 0.0, 1.5}) CHECK(log_variance(500, 499, v) == Approx(v));
  c.variance_type = VarianceType::kLearnedRange;
  for (const int next : {499, 480}) {  // without and with a gap
    const double ab = s.alpha_bar(500), abp = s.alpha_bar(next), beta = 1 - ab / abp;
    const double large = std::log(beta), small = std::log(beta * (1 - abp) / (1 - ab));
    CHECK(log_variance(500, next, 1) == Approx(large).epsilon(1e-6));
    CHECK(log_variance(500, next, -1) == Approx(small).epsilon(1e-6));
    CHECK(log_variance(500, next, 0.5) == Approx(0.75 * large + 0.25 * small).epsilon(1e-6));
  }
  CHECK(ddpm_row(s, c, 0, -1).x_z == 0);
  // ddim has a noise of its own.
  const SamplerRow ddim = ddim_row(s, c, 500, 480, 1);
  CHECK(ddim.z_out == 0);
  CHECK(ddim.z_log == 0);
}

TEST_CASE("sampler: ddim led back, and there again", "[sampler]") {
  SchedulerConfig c;
  c.clip_sample = false;
  const auto options = [](int steps) {
    return SamplerOptions{.kind = SamplerKind::kDdim, .steps = steps};
  };
  for (const auto type :
       {PredictionType::kEpsilon, PredictionType::kSample, PredictionType::kVPrediction}) {
    c.prediction_type = type;
    INFO(name_of(type));
    // A network that does not look at x is led back exactly: floats of rows, at most 157 in size.
    if (type != PredictionType::kSample)
      CHECK(round_trip_error(c, options(20), [](double, int t) { return 0.3 - 4e-4 * t; }) < 1e-4);
    const double at_50 = round_trip_error(c, options(50), gaussian(c)),
                 at_200 = round_trip_error(c, options(200), gaussian(c)),
                 at_1000 = round_trip_error(c, options(1000), gaussian(c));
    INFO(at_50 << " " << at_200 << " " << at_1000);
    CHECK(at_50 < 0.3);
    CHECK(at_200 < at_50 / 3);  // of first order
    CHECK(at_1000 < at_200 / 3);
    CHECK(at_1000 < 0.004);
  }
  using Catch::Contains;
  const Schedule s(c);
  CHECK_THAT(error_of([&] { ddim_inverse_rows(s, c, {}); }), Contains("ddim"));
  CHECK_THAT(error_of([&] { ddim_inverse_rows(s, c, {.kind = SamplerKind::kDdim, .eta = 0.1}); }),
             Contains("eta"));
}

TEST_CASE("sampler: defaults", "[sampler]") {
  SchedulerConfig c;
  const Schedule s(c);
  const auto lists = [&](const SamplerOptions& o) { return timesteps(sampler_rows(s, c, o)); };
  CHECK(lists({}) == sampler_timesteps(SamplerKind::kDdpm, Spacing::kLeading, 1000, 1000));
  CHECK(lists({.kind = SamplerKind::kDdim}) ==
        sampler_timesteps(SamplerKind::kDdim, Spacing::kLeading, 50, 1000));
  CHECK(lists({.kind = SamplerKind::kDpmpp2m}) ==
        sampler_timesteps(SamplerKind::kDpmpp2m, Spacing::kLinspace, 20, 1000));
  c.num_train_timesteps = 12;  // fewer timesteps than the defaults
  c.beta_end = 0.5;
  const Schedule few(c);
  CHECK(sampler_rows(few, c, {}).size() == 12);
  CHECK(sampler_rows(few, c, {.kind = SamplerKind::kDdim}).size() == 12);
  CHECK(sampler_rows(few, c, {.kind = SamplerKind::kDpmpp2m}).size() == 11);
}

TEST_CASE("sampler: clipping follows the configuration", "[sampler]") {
  SchedulerConfig c;
  const Schedule s(c);
  const auto clip = [&](SamplerKind kind) {
    return sampler_rows(s, c, {.kind = kind, .steps = 5})[2].clip;
  };
  c.clip_sample_range = 0.5;
  CHECK(clip(SamplerKind::kDdpm) == 0.5f);
  CHECK(clip(SamplerKind::kDdim) == 0.5f);
  CHECK(std::isinf(clip(SamplerKind::kDpmpp2m)));
  CHECK(std::isinf(sampler_rows(s, c, {.steps = 5, .clip = false})[2].clip));
  c.clip_sample = false;
  CHECK(std::isinf(clip(SamplerKind::kDdpm)));
  CHECK(std::isinf(clip(SamplerKind::kDdim)));
  CHECK(sampler_rows(s, c, {.steps = 5, .clip = true})[2].clip == 0.5f);
}

TEST_CASE("sampler: what cannot be asked for", "[sampler]") {
  const SchedulerConfig c;
  const Schedule s(c);
  const auto error = [&](const SamplerOptions& o) {
    return error_of([&] { sampler_rows(s, c, o); });
  };
  using Catch::Contains;
  CHECK_THAT(error({.steps = 0}), Contains("steps 0") && Contains("1 to 1000"));
  CHECK_THAT(error({.steps = -5}), Contains("steps -5"));
  CHECK_THAT(error({.steps = 1001}), Contains("steps 1001"));
  CHECK_THAT(error({.eta = 0.5}), Contains("eta 0.5") && Contains("ddim only"));
  CHECK_THAT(error({.kind = SamplerKind::kDpmpp2m, .eta = 1}), Contains("ddim only"));
  CHECK_THAT(error({.kind = SamplerKind::kDdim, .eta = 1.5}), Contains("0 to 1"));
  CHECK_THAT(error({.kind = SamplerKind::kDdim, .eta = -0.1}), Contains("0 to 1"));
  CHECK_THAT(error({.kind = SamplerKind::kDdim, .eta = std::nan("")}), Contains("0 to 1"));
  CHECK_THAT(error_of([] { parse_sampler("ddmp"); }), Contains("ddmp") && Contains("\"ddpm\""));
  CHECK_THAT(error_of([] { parse_spacing("linespace"); }), Contains("\"linspace\""));
  for (const auto kind : {SamplerKind::kDdpm, SamplerKind::kDdim, SamplerKind::kDpmpp2m})
    CHECK(parse_sampler(name_of(kind)) == kind);
  for (const auto spacing : {Spacing::kLeading, Spacing::kTrailing, Spacing::kLinspace})
    CHECK(parse_spacing(name_of(spacing)) == spacing);
}
