// Gradient norm, Adam with EMA and the end of a step against the reference.
#include <cmath>
#include <limits>
#include <vector>

#include <catch2/catch.hpp>

#include "tests/kernel_backend.h"
#include "tests/reference/optimizer.h"
#include "tests/simt/machine.h"
#include "tests/support.h"

using namespace ddpm;
using test::random_values;
using test::relative_error;
using test::to_double;

namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

StepState run_norm(Backend& backend, const std::vector<float>& gradients,
                   const StepState& state = {.step = 4}) {
  test::Bench b(backend);
  const Out slot = b.inout(std::vector<StepState>{state});
  b.run(backend.grad_norm(static_cast<int64_t>(gradients.size()), b.in(gradients), slot));
  return b.get<StepState>(slot)[0];
}

struct Weights {
  std::vector<float> w, m, v, ema;
  friend bool operator==(const Weights&, const Weights&) = default;
};

// One update on the backend, in place.
void update(Backend& backend, const AdamDesc& d, const std::vector<float>& gradients, Weights& w,
            StepState& state) {
  test::Bench b(backend);
  const In g = b.in(gradients);
  const Out weights = b.inout(w.w), m = b.inout(w.m), v = b.inout(w.v), ema = b.inout(w.ema);
  const Out slot = b.inout(std::vector<StepState>{state});
  const bool narrow = backend.compute_type() == DType::kBF16;
  const std::vector<bf16> before(w.w.size(), bf16{0x1234});
  const Out shadow = narrow ? b.inout(before) : Out{};
  b.run(backend.grad_norm(d.count, g, slot));
  b.run(backend.adam_ema(d, g, weights, m, v, ema, shadow, slot));
  b.run(backend.advance_state(slot));
  w = {b.get(weights), b.get(m), b.get(v), b.get(ema)};
  state = b.get<StepState>(slot)[0];
  if (!narrow) return;
  const auto rounded = b.get<bf16>(shadow);
  for (size_t i = 0; i < rounded.size(); ++i)
    REQUIRE(rounded[i] == (state.nonfinite == 0 ? to_bf16(w.w[i]) : before[i]));
}

Weights start(int64_t count) {
  const std::vector<float> zero(static_cast<size_t>(count), 0.0f);
  const auto w = random_values(count, 1, 0.1f);
  return {w, zero, zero, w};
}

// Sizes of gradients differ by element and change sign, as real ones do.
std::vector<float> gradients(int64_t count, uint64_t step, float scale) {
  auto g = random_values(count, 100 + step, scale);
  for (size_t i = 0; i < g.size(); ++i) g[i] *= static_cast<float>(1 + i % 7) / 4;
  return g;
}

}  // namespace

namespace {

// Squares and sums are in double, the result rounds once.
void check_norm(Backend* backend) {
  std::vector<int64_t> counts = {127, 1009, 16383, 16384, 16385, 32768, 49999, 200003};
  for (int64_t count = 1; count <= 35; ++count) counts.push_back(count);
  for (int64_t count : counts)
    for (float scale : {1e-30f, 1.0f, 1e30f}) {  // fp32 squares would underflow and overflow
      CAPTURE(count, scale);
      const auto g = random_values(count, 3, scale);
      const StepState s = run_norm(*backend, g);
      CHECK(std::abs(s.grad_norm / ref::norm(to_double(g)) - 1) < 1e-7);
      CHECK(s.nonfinite == 0);
      CHECK(s.step == 4);
    }
  CHECK(run_norm(*backend, {3, 4}).grad_norm == 5);
  CHECK(run_norm(*backend, {0}).grad_norm == 0);
  CHECK_THROWS_AS(backend->grad_norm(0, {0}, {1}), Error);
}

}  // namespace

TEST_CASE("grad_norm: agrees with the reference", "[optimizer]") {
  check_norm(make_cpu_backend({}).get());
}
TEST_CASE("simt.grad_norm: agrees with the reference", "[optimizer]") {
  check_norm(test::make_kernel_backend(DType::kF32).get());
}

TEST_CASE("grad_norm: does not depend on threads", "[optimizer]") {
  auto one = make_cpu_backend({.threads = 1});
  for (int threads : {2, 3, 5}) {
    auto more = make_cpu_backend({.threads = threads});
    for (uint64_t seed = 0; seed < 5; ++seed) {
      const auto g = random_values(131071, seed);
      CHECK(run_norm(*one, g).grad_norm == run_norm(*more, g).grad_norm);
    }
  }
}

namespace {

void check_norm_not_finite(Backend* backend) {
  for (float bad : {kNaN, kInfinity, -kInfinity})
    for (size_t at : {0, 31, 16383, 16384, 20000}) {
      auto g = random_values(20001, 3);
      g[at] = bad;
      const StepState s = run_norm(*backend, g);
      CHECK(s.nonfinite == kGradientNonFinite);
      CHECK(s.bad_step == 4);
      CHECK_FALSE(std::isfinite(s.grad_norm));
    }
  CHECK(run_norm(*backend, std::vector<float>(100, 3e38f)).nonfinite == kGradientNonFinite);
  const StepState after =
      run_norm(*backend, {kNaN}, {.step = 9, .bad_step = 7, .nonfinite = kLossNonFinite});
  CHECK(after.nonfinite == (kLossNonFinite | kGradientNonFinite));
  CHECK(after.bad_step == 7);
}

}  // namespace

TEST_CASE("grad_norm: reports what is not finite", "[optimizer]") {
  check_norm_not_finite(make_cpu_backend({}).get());
}
TEST_CASE("simt.grad_norm: reports what is not finite", "[optimizer]") {
  check_norm_not_finite(test::make_kernel_backend(DType::kF32).get());
}

// A constant gradient g moves every weight by rate * g / (|g| + epsilon), whatever the betas; the
// average follows in a geometric series.
TEST_CASE("adam_ema: the reference on a constant gradient", "[optimizer]") {
  const AdamDesc d{
      .count = 3, .learning_rate = 0.25f, .epsilon = 0.5, .grad_clip = 0, .ema_decay = 0.75};
  ref::Adam adam{{1, 2, 3}, {0, 0, 0}, {0, 0, 0}, {1, 2, 3}};
  for (int n = 0; n < 9; ++n) adam.update(d, {2, -4, 0}, n);
  CHECK(std::abs(adam.weights[0] - (1 - 9 * 0.25 * 2 / 2.5)) < 1e-12);
  CHECK(std::abs(adam.weights[1] - (2 + 9 * 0.25 * 4 / 4.5)) < 1e-12);
  CHECK(adam.weights[2] == 3);
  double lag = 0;  // of the average behind the weight: lag' = decay * (lag + move)
  for (int n = 0; n < 9; ++n) lag = 0.75 * (lag + 0.25 * 2 / 2.5);
  CHECK(std::abs(adam.ema[0] - (adam.weights[0] + lag)) < 1e-12);
  // The clip scales the whole gradient: with 1 as the norm of (3, 4), m is a tenth of (0.6, 0.8).
  ref::Adam clipped{{0, 0}, {0, 0}, {0, 0}, {0, 0}};
  clipped.update({.count = 2}, {3, 4}, 0);
  CHECK(std::abs(clipped.m[0] - 0.06) < 1e-7);
  CHECK(std::abs(clipped.m[1] - 0.08) < 1e-7);
  CHECK(ref::learning_rate({.learning_rate = 1, .warmup_steps = 4}, 1) == 0.25);
  CHECK(ref::learning_rate({.learning_rate = 1, .warmup_steps = 4}, 4) == 1);
}

// All rates here are exact in fp32.
TEST_CASE("adam_ema: the rate of every step", "[optimizer]") {
  auto backend = make_cpu_backend({});
  const auto rates = [&](const AdamDesc& d, int64_t first, int64_t last) {
    std::vector<double> out;
    Weights w = start(d.count);
    for (int64_t n = first; n < last; ++n) {
      StepState state{.step = static_cast<uint64_t>(n)};
      const Weights before = w;
      update(*backend, d, gradients(d.count, 1, 1), w, state);
      CHECK((w.w == before.w) == (state.learning_rate == 0));
      CHECK(state.learning_rate == ref::learning_rate(d, n));
      out.push_back(double{state.learning_rate});
    }
    return out;
  };
  using Rates = std::vector<double>;
  AdamDesc d{.count = 3, .learning_rate = 1, .steps = 8, .cooldown_steps = 4};
  CHECK(rates(d, 0, 10) == Rates{1, 1, 1, 1, 1, 0.75, 0.5, 0.25, 0, 0});
  d.warmup_steps = 2;
  CHECK(rates(d, 0, 10) == Rates{0, 0.5, 1, 1, 1, 0.75, 0.5, 0.25, 0, 0});
  d.warmup_steps = 8;  // both at once: the product
  CHECK(rates(d, 2, 6) == Rates{0.25, 0.375, 0.5, 0.625 * 0.75});
  d.warmup_steps = 0;
  d.steps = 2;  // cooling down from the start
  CHECK(rates(d, 0, 3) == Rates{0.5, 0.25, 0});
  d.cooldown_steps = 0;  // none: `steps` says nothing
  CHECK(rates(d, 0, 4) == Rates{1, 1, 1, 1});
}

namespace {

// 20 updates, each with a few roundings of 6e-8; errors of m and v do not add up, those of the
// weights are about rate / weight times them.
void check_updates(Backend* backend, std::vector<int64_t> counts) {
  const AdamDesc plain{.learning_rate = 1e-2f, .ema_decay = 0.9};
  AdamDesc warm = plain, unclipped = plain;
  warm.warmup_steps = 12;
  warm.steps = 23;
  warm.cooldown_steps = 7;
  unclipped.grad_clip = 0;
  const AdamDesc other{.learning_rate = 3e-3f,
                       .warmup_steps = 5,
                       .beta1 = 0.5,
                       .beta2 = 0.99,
                       .epsilon = 1e-3,
                       .grad_clip = 0.3f,
                       .ema_decay = 0.9999};
  for (int64_t count = 1; count <= 34; ++count) counts.push_back(count);
  const std::vector<AdamDesc> descs = {plain, warm, unclipped, other};
  for (int64_t count : counts)
    for (size_t i = 0; i < descs.size(); ++i)
      for (float scale : {1e-3f, 5.0f}) {  // below and above the clip for most counts
        if (count > 8 && (static_cast<size_t>(count) + i) % 4 != 0) continue;
        AdamDesc d = descs[i];
        d.count = count;
        CAPTURE(count, d.warmup_steps, d.grad_clip, scale);
        Weights w = start(count);
        ref::Adam expected{to_double(w.w), to_double(w.m), to_double(w.v), to_double(w.ema)};
        StepState state;
        for (int64_t n = 0; n < 20; ++n) {
          const auto g = gradients(count, static_cast<uint64_t>(n), scale);
          update(*backend, d, g, w, state);
          expected.update(d, to_double(g), n);
          REQUIRE(std::abs(state.learning_rate - ref::learning_rate(d, n)) <=
                  1e-7 * ref::learning_rate(d, n));
        }
        CHECK(relative_error(w.w, expected.weights) < 1e-6);
        CHECK(relative_error(w.m, expected.m) < 1e-6);
        CHECK(relative_error(w.v, expected.v) < 1e-6);
        CHECK(relative_error(w.ema, expected.ema) < 1e-6);
        CHECK(state.step == 20);
        CHECK(state.nonfinite == 0);
      }
}

void check_first_update(Backend* backend) {
  // With warm-up its rate is 0: moments move, weights and average stay to the bit.
  Weights w = start(33);
  const Weights before = w;
  StepState state;
  update(*backend, {.count = 33, .warmup_steps = 10}, gradients(33, 0, 1), w, state);
  CHECK(w.w == before.w);
  CHECK(w.ema == before.ema);
  CHECK(w.m != before.m);
  CHECK(w.v != before.v);
  CHECK(state.learning_rate == 0);
  // Without, each weight moves by the rate against the gradient's sign, and not where it is zero.
  w = start(33);
  state = {};
  w.ema.assign(33, 0.0f);
  auto g = gradients(33, 0, 1);
  g[5] = 0;
  const AdamDesc d{.count = 33, .learning_rate = 0.01f};
  ref::Adam expected{to_double(w.w), to_double(w.m), to_double(w.v), to_double(w.ema)};
  update(*backend, d, g, w, state);
  expected.update(d, to_double(g), 0);
  for (size_t i = 0; i < 33; ++i) {
    const float sign = g[i] > 0 ? 1.0f : g[i] < 0 ? -1.0f : 0.0f;
    CHECK(std::abs(w.w[i] - (before.w[i] - 0.01f * sign)) < 1e-7f);
  }
  CHECK(w.w[5] == before.w[5]);
  // From zero, moments and average show their factors to the last place.
  CHECK(relative_error(w.m, expected.m) < 2e-7);
  CHECK(relative_error(w.v, expected.v) < 4e-7);
  CHECK(relative_error(w.ema, expected.ema) < 2e-7);
}

// At step 10^6 both bias corrections are 1 and the average's decay leaves 1e-4 of a distance.
void check_late_update(Backend* backend) {
  const AdamDesc d{.count = 19, .learning_rate = 2e-4f, .warmup_steps = 5000};
  Weights w = start(19);
  w.m = random_values(19, 5, 0.1f);
  w.v = std::vector<float>(19, 0.04f);
  w.ema = random_values(19, 6);
  ref::Adam expected{to_double(w.w), to_double(w.m), to_double(w.v), to_double(w.ema)};
  StepState state{.step = 1000000};
  const auto g = gradients(19, 1, 0.1f);
  const Weights before = w;
  update(*backend, d, g, w, state);
  expected.update(d, to_double(g), 1000000);
  CHECK(relative_error(w.w, expected.weights) < 1e-7);
  CHECK(relative_error(w.ema, expected.ema) < 1e-7);
  std::vector<double> moved, expected_moved;
  for (size_t i = 0; i < 19; ++i) {
    moved.push_back(double{w.w[i]} - double{before.w[i]});
    expected_moved.push_back(expected.weights[i] - double{before.w[i]});
  }
  CHECK(relative_error(moved, expected_moved) < 1e-4);  // a weight's last place is 4e-5 of the move
}

}  // namespace

TEST_CASE("adam_ema: twenty updates agree with the reference", "[optimizer]") {
  check_updates(make_cpu_backend({.threads = 3}).get(), {16384, 40009});
}
TEST_CASE("adam_ema: the first update", "[optimizer]") {
  check_first_update(make_cpu_backend({}).get());
}
TEST_CASE("adam_ema: late in a run", "[optimizer]") {
  check_late_update(make_cpu_backend({}).get());
}
TEST_CASE("simt.adam_ema: twenty updates agree with the reference", "[optimizer]") {
  check_updates(test::make_kernel_backend(DType::kF32).get(), {2051});
  check_updates(test::make_kernel_backend(DType::kBF16).get(), {4096});
}
TEST_CASE("simt.adam_ema: the first and a late update", "[optimizer]") {
  for (DType type : {DType::kF32, DType::kBF16}) {
    check_first_update(test::make_kernel_backend(type).get());
    check_late_update(test::make_kernel_backend(type).get());
  }
}
TEST_CASE("simt.adam_ema: does not depend on the order of blocks", "[optimizer]") {
  for (DType type : {DType::kF32, DType::kBF16}) {
    const auto backend = test::make_kernel_backend(type);
    Weights a = start(50021), b = a;
    StepState sa, sb;
    update(*backend, {.count = 50021}, gradients(50021, 0, 1), a, sa);
    simt::options().seed = 3;
    update(*backend, {.count = 50021}, gradients(50021, 0, 1), b, sb);
    simt::options().seed = 0;
    CHECK(a == b);
    CHECK(sa.grad_norm == sb.grad_norm);
  }
}

// A slice of CIFAR's 35.7 million weights: first, last and some blocks of the grid.
TEST_CASE("simt.adam_ema: the networks' sizes", "[optimizer]") {
  simt::options().max_blocks = 20;
  constexpr int64_t kCount = 1000000;
  const auto backend = test::make_kernel_backend(DType::kBF16);
  const AdamDesc d{.count = kCount, .learning_rate = 1e-2f, .grad_clip = 0};
  const std::vector<float> g(kCount, 0.5f), nothing(kCount, kNaN), zero(kCount, 0.0f);
  test::Bench b(*backend);
  const Out w = b.inout(zero), m = b.inout(zero), v = b.inout(zero), ema = b.inout(zero);
  const Out shadow = b.out<bf16>(kCount), state = b.inout(std::vector<StepState>(1));
  b.run(backend->adam_ema(d, b.in(g), w, m, v, ema, shadow, state));
  simt::options().max_blocks = 0;
  const auto moved = b.get(w);
  const auto rounded = b.get<bf16>(shadow);
  int64_t written = 0;
  for (size_t i = 0; i < moved.size(); ++i) {
    if (rounded[i] == bf16{0xFFFF}) continue;
    ++written;
    REQUIRE(std::abs(moved[i] + 0.01f) < 1e-7f);
    REQUIRE(rounded[i] == to_bf16(moved[i]));
  }
  CHECK(written >= 19 * 2048);
}

TEST_CASE("adam_ema: does not depend on threads", "[optimizer]") {
  auto one = make_cpu_backend({.threads = 1});
  auto three = make_cpu_backend({.threads = 3});
  constexpr int64_t kCount = 100003;
  Weights a = start(kCount), b = a;
  StepState sa, sb;
  for (uint64_t n = 0; n < 3; ++n) {
    update(*one, {.count = kCount}, gradients(kCount, n, 1), a, sa);
    update(*three, {.count = kCount}, gradients(kCount, n, 1), b, sb);
  }
  CHECK(a == b);
}

namespace {

void check_flag(Backend* backend) {
  for (int64_t count : {1, 17, 40000})
    for (bool planted : {false, true})
      for (uint32_t flag : {kLossNonFinite, kGradientNonFinite, kSampleNonFinite}) {
        CAPTURE(count, planted, flag);
        const AdamDesc d{.count = count};
        Weights w = start(count);
        StepState state;
        update(*backend, d, gradients(count, 0, 1), w, state);
        const Weights before = w;
        auto g = gradients(count, 1, 1);
        if (planted)
          g[g.size() / 2] = flag == kLossNonFinite ? kNaN : kInfinity;
        else
          state.nonfinite = flag;
        state.learning_rate = 123;
        update(*backend, d, g, w, state);
        CHECK(w == before);
        CHECK(state.step == 1);
        CHECK(state.learning_rate == 123);
        CHECK(state.nonfinite == (planted ? uint32_t{kGradientNonFinite} : flag));
        update(*backend, d, gradients(count, 1, 1), w, state);  // the flag stays
        CHECK(w == before);
        CHECK(state.step == 1);
      }
}

void check_refusals(Backend* backend) {
  const auto make = [&](const AdamDesc& d) {
    backend->adam_ema(d, {0}, {1}, {2}, {3}, {4}, {}, {5});
  };
  CHECK_NOTHROW(make({.count = 1}));
  CHECK_THROWS_AS(make({.count = 0}), Error);
  CHECK_THROWS_AS(make({.count = 1, .warmup_steps = -1}), Error);
  CHECK_THROWS_AS(make({.count = 1, .steps = -1}), Error);
  CHECK_THROWS_AS(make({.count = 1, .cooldown_steps = -1}), Error);
  CHECK_THROWS_AS(make({.count = 1, .beta1 = 1}), Error);
  CHECK_THROWS_AS(make({.count = 1, .beta2 = 1}), Error);
  CHECK_THROWS_AS(make({.count = 1, .epsilon = -1}), Error);
  CHECK_THROWS_AS(make({.count = 1, .grad_clip = -1}), Error);
  CHECK_THROWS_AS(make({.count = 1, .grad_clip = kNaN}), Error);
  CHECK_THROWS_AS(make({.count = 1, .ema_decay = 1.5}), Error);
  CHECK_THROWS_AS(backend->adam_ema({.count = 1}, {0}, {1}, {2}, {3}, {4}, {6}, {5}), Error);
}

void check_advance(Backend* backend) {
  const StepState s{.seed = 1,
                    .step = uint64_t{1} << 40,
                    .loss_sum = 10,
                    .loss = 3,
                    .grad_norm = 4,
                    .learning_rate = 5};
  test::Bench b(*backend);
  const Out slot = b.inout(std::vector<StepState>{s});
  b.run(backend->advance_state(slot));
  const StepState after = b.get<StepState>(slot)[0];
  CHECK(after.step == s.step + 1);
  CHECK(after.seed == 1);
  CHECK(after.loss == 3);
  CHECK(after.loss_sum == 13);
  CHECK(after.grad_norm == 4);
  CHECK(after.learning_rate == 5);

  StepState flagged = s;
  set_nonfinite(flagged, kLossNonFinite);
  const Out flagged_slot = b.inout(std::vector<StepState>{flagged});
  b.run(backend->advance_state(flagged_slot));
  CHECK(b.get<StepState>(flagged_slot)[0].step == s.step);
  CHECK(b.get<StepState>(flagged_slot)[0].loss_sum == 10);
}

}  // namespace

TEST_CASE("adam_ema: a flag skips the update and the step", "[optimizer]") {
  check_flag(make_cpu_backend({}).get());
}
TEST_CASE("simt.adam_ema: a flag skips the update and the step", "[optimizer]") {
  for (DType type : {DType::kF32, DType::kBF16}) check_flag(test::make_kernel_backend(type).get());
}
TEST_CASE("adam_ema: refuses bad arguments", "[optimizer]") {
  check_refusals(make_cpu_backend({}).get());
  check_refusals(test::make_kernel_backend(DType::kF32).get());
  const auto narrow = test::make_kernel_backend(DType::kBF16);  // which needs a shadow
  CHECK_THROWS_AS(narrow->adam_ema({.count = 1}, {0}, {1}, {2}, {3}, {4}, {}, {5}), Error);
}
TEST_CASE("advance_state: counts a good step and leaves the rest", "[optimizer]") {
  check_advance(make_cpu_backend({}).get());
}
TEST_CASE("simt.advance_state: counts a good step and leaves the rest", "[optimizer]") {
  check_advance(test::make_kernel_backend(DType::kF32).get());
}
