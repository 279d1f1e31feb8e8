// The loss of a backend against the reference, and the reference against finite differences.
#include <cmath>
#include <limits>
#include <vector>

#include <catch2/catch.hpp>

#include "tests/kernel_backend.h"
#include "tests/reference/loss.h"
#include "tests/simt/machine.h"
#include "tests/support.h"

using namespace ddpm;
using test::random_values;
using test::relative_error;
using test::to_double;

namespace {

struct LossRun {
  std::vector<float> sample_loss, d_prediction;
  StepState state;
};

LossRun run_loss(Backend& backend, const Shape& shape, const std::vector<float>& prediction,
                 const std::vector<float>& target, const StepState& state = {.step = 6},
                 int step_images = 0) {
  test::Bench b(backend);
  const In p = b.activation(prediction), t = b.in(target);
  const Out sample_loss = b.out(shape.n), d_prediction = b.activation_out(shape.count());
  const Out state_slot = b.inout(std::vector<StepState>{state});
  b.run(backend.mse_loss(shape, step_images > 0 ? step_images : shape.n, p, t, sample_loss,
                         d_prediction, state_slot));
  return {b.get(sample_loss), b.get_activation(d_prediction), b.get<StepState>(state_slot)[0]};
}

// Every CUDA compute type on the host.
template <typename F>
void for_simt(F check) {
  for (DType type : {DType::kF32, DType::kBF16}) check(*test::make_kernel_backend(type));
}

// Around the chunk of 4096 elements within an image, and around vectors.
std::vector<Shape> shapes() {
  std::vector<Shape> list = {{1, 1, 1, 4095}, {3, 1, 1, 4096}, {2, 1, 1, 4097}, {2, 64, 64, 3},
                             {1, 97, 89, 3},  {2, 3, 5, 7},    {8, 32, 32, 3},  {128, 2, 2, 1},
                             {1000, 1, 1, 1}, {5, 31, 17, 1},  {1, 1, 1, 1},    {7, 11, 13, 4}};
  for (int c = 1; c <= 36; ++c) list.push_back({1 + c % 5, 1, 1, c});
  return list;
}

}  // namespace

TEST_CASE("mse_loss: the reference's gradient is its slope", "[loss]") {
  auto p = to_double(random_values(2 * 13, 1, 2));
  const auto t = to_double(random_values(2 * 13, 2, 2));
  const auto d = ref::mse_loss(2, p, t).d_prediction;
  for (size_t i = 0; i < p.size(); ++i) {
    const double x = p[i], step = 1e-5;
    p[i] = x + step;
    const double above = ref::mse_loss(2, p, t).loss;
    p[i] = x - step;
    const double below = ref::mse_loss(2, p, t).loss;
    p[i] = x;
    CHECK(std::abs((above - below) / (2 * step) - d[i]) < 1e-9);
  }
}

namespace {

// The difference rounds once, its sum is in double, the result rounds once: 2 x 6e-8 on the loss,
// which is quadratic, and one more rounding on the gradient. Large values must not overflow inside.
void check_loss(Backend& backend) {
  for (const Shape& shape : shapes())
    for (float scale : {1e-15f, 1.0f, 1e18f}) {
      CAPTURE(to_string(shape), scale);
      const auto p = test::rounded(backend, random_values(shape.count(), 1, scale));
      const auto t = random_values(shape.count(), 2, scale);
      const LossRun run = run_loss(backend, shape, p, t);
      const ref::Loss expected = ref::mse_loss(shape.n, to_double(p), to_double(t));
      CHECK(std::abs(run.state.loss / expected.loss - 1) < 2.4e-7);
      CHECK(relative_error(run.sample_loss, expected.sample_loss) < 2.4e-7);
      CHECK(relative_error(run.d_prediction, expected.d_prediction) <
            (backend.compute_type() == DType::kBF16 ? 0x1p-8 : 0) + 2e-7);  // 8 bits
      CHECK(run.state.nonfinite == 0);
      CHECK(run.state.bad_step == 0);
      CHECK(run.state.step == 6);
    }
}

void check_zero(Backend& backend) {
  const auto p = test::rounded(backend, random_values(3 * 77, 1, 100));
  const LossRun run = run_loss(backend, {3, 1, 1, 77}, p, p);
  CHECK(run.state.loss == 0);
  CHECK(run.sample_loss == std::vector<float>(3, 0.0f));
  CHECK(run.d_prediction == std::vector<float>(3 * 77, 0.0f));
}

void check_slots(Backend* one, Backend* three) {
  const Shape shape{7, 53, 61, 3};
  const int64_t size = shape.pixels() * shape.c;
  const auto p = random_values(shape.count(), 1), t = random_values(shape.count(), 2);
  const LossRun a = run_loss(*one, shape, p, t), b = run_loss(*three, shape, p, t);
  CHECK(a.state.loss == b.state.loss);
  CHECK(a.sample_loss == b.sample_loss);
  CHECK(a.d_prediction == b.d_prediction);
  const std::vector<float> p5(p.begin() + 5 * size, p.begin() + 6 * size);
  const std::vector<float> t5(t.begin() + 5 * size, t.begin() + 6 * size);
  CHECK(run_loss(*three, {1, 53, 61, 3}, p5, t5).sample_loss[0] == a.sample_loss[5]);
}

void check_not_finite(Backend* backend) {
  const Shape shape{3, 1, 1, 4099};
  for (float bad : {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity(),
                    3e38f})  // 3e38 is finite, its square is no float
    for (size_t at : {0, 15, 4095, 4098, 4099, 12296}) {
      CAPTURE(bad, at);
      auto p = random_values(shape.count(), 1);
      p[at] = bad;
      const LossRun run = run_loss(*backend, shape, p, random_values(shape.count(), 2));
      CHECK(run.state.nonfinite == kLossNonFinite);
      CHECK(run.state.bad_step == 6);
      for (size_t n = 0; n < 3; ++n) CHECK(std::isfinite(run.sample_loss[n]) == (n != at / 4099));
    }
  const StepState earlier{.step = 9, .bad_step = 8, .nonfinite = kSampleNonFinite};
  const std::vector<float> good(4, 1.0f), bad(4, std::numeric_limits<float>::infinity());
  StepState after = run_loss(*backend, {1, 1, 1, 4}, bad, good, earlier).state;
  CHECK(after.nonfinite == (kSampleNonFinite | kLossNonFinite));
  CHECK(after.bad_step == 8);
  after = run_loss(*backend, {1, 1, 1, 4}, good, good, earlier).state;
  CHECK(after.nonfinite == kSampleNonFinite);
  CHECK_THROWS_AS(backend->mse_loss({0, 1, 1, 4}, 1, {0}, {1}, {2}, {3}, {4}), Error);
}

}  // namespace

TEST_CASE("mse_loss: agrees with the reference", "[loss]") { check_loss(*make_cpu_backend({})); }
TEST_CASE("simt.mse_loss: agrees with the reference", "[loss]") { for_simt(check_loss); }

TEST_CASE("mse_loss: is zero on equal inputs", "[loss]") { check_zero(*make_cpu_backend({})); }
TEST_CASE("simt.mse_loss: is zero on equal inputs", "[loss]") { for_simt(check_zero); }

TEST_CASE("mse_loss: does not depend on threads or slot", "[loss]") {
  auto three = make_cpu_backend({.threads = 3});
  check_slots(make_cpu_backend({.threads = 1}).get(), three.get());
}
TEST_CASE("simt.mse_loss: does not depend on order or slot", "[loss]") {
  for_simt([](Backend& backend) {
    check_slots(&backend, &backend);
    const Shape shape{3, 53, 61, 3};
    const auto p = random_values(shape.count(), 1), t = random_values(shape.count(), 2);
    const LossRun once = run_loss(backend, shape, p, t);
    simt::options().seed = 7;
    const LossRun again = run_loss(backend, shape, p, t);
    simt::options().seed = 0;
    CHECK(once.sample_loss == again.sample_loss);
    CHECK(once.state.loss == again.state.loss);
  });
}

TEST_CASE("mse_loss: reports what is not finite", "[loss]") {
  check_not_finite(make_cpu_backend({}).get());
}
TEST_CASE("simt.mse_loss: reports what is not finite", "[loss]") {
  for_simt([](Backend& backend) { check_not_finite(&backend); });
}

// The networks' shapes among them, whole: the largest takes 48 blocks an image.
TEST_CASE("simt.noise_loss: the bits of the noise and the loss it stands for", "[loss]") {
  auto list = shapes();
  list.push_back({1, 32, 32, 3});
  list.push_back({1, 256, 256, 3});
  for_simt([&](Backend& backend) {
    for (const Shape& shape : list) {
      CAPTURE(to_string(shape));
      const StepState state{.seed = 12345678901, .step = 6};
      const auto p = random_values(shape.count(), 1);
      test::Bench b(backend);
      const In prediction = b.activation(p);
      const Out noise = b.out(shape.count());
      b.run(backend.draw_noise(shape, b.state(state), noise));
      const LossRun expected = run_loss(backend, shape, p, b.get(noise), state);

      const Out sample_loss = b.out(shape.n), d_prediction = b.activation_out(shape.count());
      const Out state_slot = b.inout(std::vector<StepState>{state});
      const auto call =
          backend.noise_loss(shape, shape.n, prediction, sample_loss, d_prediction, state_slot);
      REQUIRE(call);
      b.run(*call);
      CHECK(b.get(sample_loss) == expected.sample_loss);
      CHECK(b.get_activation(d_prediction) == expected.d_prediction);
      CHECK(b.get<StepState>(state_slot)[0].loss == expected.state.loss);
    }
    CHECK_THROWS_AS(backend.noise_loss({2, 0, 3, 3}, 2, {0}, {1}, {2}, {3}), Error);
  });
  CHECK_FALSE(make_cpu_backend({})->noise_loss({2, 2, 2, 3}, 2, {0}, {1}, {2}, {3}));
}

namespace {

// A batch in parts: each part's gradient is its share of the whole's, and the losses add up to it.
void check_parts(Backend& backend) {
  const Shape whole{6, 5, 7, 3}, part{2, 5, 7, 3};
  const auto p = test::rounded(backend, random_values(whole.count(), 1));
  const auto t = random_values(whole.count(), 2);
  const LossRun all = run_loss(backend, whole, p, t);
  std::vector<float> d_prediction, sample_loss;
  test::Bench b(backend);
  const Out losses = b.out(3), state = b.inout(std::vector<StepState>{{.step = 6}});
  for (int i = 0; i < 3; ++i) {
    const auto begin = i * part.count(), end = begin + part.count();
    const LossRun run = run_loss(backend, part, {p.begin() + begin, p.begin() + end},
                                 {t.begin() + begin, t.begin() + end}, {.step = 6}, whole.n);
    d_prediction.insert(d_prediction.end(), run.d_prediction.begin(), run.d_prediction.end());
    sample_loss.insert(sample_loss.end(), run.sample_loss.begin(), run.sample_loss.end());
    const Out own = b.inout(std::vector<StepState>{run.state});
    b.run(backend.end_part(i, 2 * i + 2, losses, own));
    CHECK(b.get<StepState>(own)[0].first_image == static_cast<uint64_t>(2 * i + 2));
    CHECK(b.get(losses)[static_cast<size_t>(i)] == run.state.loss);
  }
  CHECK(d_prediction == all.d_prediction);
  CHECK(sample_loss == all.sample_loss);
  b.run(backend.sum_losses(3, {losses.slot}, state));
  CHECK(std::abs(b.get<StepState>(state)[0].loss / all.state.loss - 1) < 2.4e-7f);
  CHECK(b.get<StepState>(state)[0].nonfinite == 0);

  const In bad = b.in(std::vector<float>{1, std::numeric_limits<float>::infinity(), 2});
  b.run(backend.sum_losses(3, bad, state));
  CHECK(b.get<StepState>(state)[0].nonfinite == kLossNonFinite);
  CHECK(b.get<StepState>(state)[0].bad_step == 6);
  CHECK_THROWS_AS(backend.mse_loss({4, 1, 1, 4}, 3, {0}, {1}, {2}, {3}, {4}), Error);
  CHECK_THROWS_AS(backend.end_part(-1, 0, {0}, {1}), Error);
  CHECK_THROWS_AS(backend.sum_losses(0, {0}, {1}), Error);
}

}  // namespace

TEST_CASE("mse_loss: a batch in parts is the whole batch", "[loss]") {
  check_parts(*make_cpu_backend({}));
}
TEST_CASE("simt.mse_loss: a batch in parts is the whole batch", "[loss]") { for_simt(check_parts); }

namespace {

// Up to n additions, each rounded once.
void check_histogram(Backend* backend) {
  for (int n : {1, 2, 5, 31, 32, 33, 64, 128, 257})
    for (int buckets : {1, 3, 10, 32})
      for (int timesteps : {1, 7, 1000}) {
        CAPTURE(n, buckets, timesteps);
        std::vector<int32_t> t;
        for (int i = 0; i < n; ++i) t.push_back((i * 617 + timesteps - 1) % timesteps);
        const auto loss = random_values(n, 1, 1, 1);
        auto histogram = random_values(2 * buckets, 2, 2, 4);
        test::Bench b(*backend);
        const Out slot = b.inout(histogram);
        const In ts = b.in(t), losses = b.in(loss);
        b.run(backend->loss_histogram(n, timesteps, buckets, ts, losses, b.state({}), slot));
        StepState flagged;
        set_nonfinite(flagged, kGradientNonFinite);
        b.run(backend->loss_histogram(n, timesteps, buckets, ts, losses, b.state(flagged), slot));
        std::vector<double> expected = to_double(histogram);
        for (size_t i = 0; i < t.size(); ++i) {
          const auto at = static_cast<size_t>(int64_t{t[i]} * buckets / timesteps);
          expected[2 * at] += loss[i];
          expected[2 * at + 1] += 1;
        }
        CHECK(relative_error(b.get(slot), expected) < 1e-6);
      }
  CHECK_THROWS_AS(backend->loss_histogram(0, 10, 3, {0}, {1}, {2}, {3}), Error);
  CHECK_THROWS_AS(backend->loss_histogram(1, 0, 3, {0}, {1}, {2}, {3}), Error);
  CHECK_THROWS_AS(backend->loss_histogram(1, 10, 33, {0}, {1}, {2}, {3}), Error);
}

}  // namespace

TEST_CASE("loss_histogram: sums and counts, and nothing while a flag is set", "[loss]") {
  check_histogram(make_cpu_backend({}).get());
}
TEST_CASE("simt.loss_histogram: sums and counts, and nothing while a flag is set", "[loss]") {
  check_histogram(test::make_kernel_backend(DType::kF32).get());
}
