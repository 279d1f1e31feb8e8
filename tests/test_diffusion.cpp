// Batches, noising, sampler rows and 8-bit images of a backend against the reference.
#include <algorithm>
#include <cmath>
#include <limits>
#include <string>
#include <vector>

#include <catch2/catch.hpp>

#include "tests/reference/diffusion.h"
#include "tests/reference/random.h"
#include "tests/support.h"

using namespace ddpm;
using test::relative_error;
using test::to_double;

namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

std::vector<Shape> shapes() {
  std::vector<Shape> list = {{1, 1, 1, 1},   {2, 1, 1, 2},    {3, 1, 2, 3},    {1, 3, 5, 1},
                             {7, 2, 2, 1},   {2, 7, 5, 3},    {5, 3, 3, 4},    {4, 8, 8, 3},
                             {13, 1, 1, 17}, {2, 32, 32, 3},  {3, 31, 29, 3},  {1, 64, 64, 3},
                             {9, 16, 16, 1}, {1, 1, 1, 4099}, {2, 1, 1025, 1}, {2, 96, 97, 3}};
  for (int w = 1; w <= 18; ++w) list.push_back({3, 1, w, 1 + w % 4});
  return list;
}

std::vector<uint8_t> bytes(int64_t count, uint64_t seed) {
  std::vector<uint8_t> v;
  for (float x : test::random_values(count, seed, 128, 128)) v.push_back(static_cast<uint8_t>(x));
  return v;
}

struct SamplerRun {
  std::vector<float> x, previous;
  StepState state;
};

// One row; `previous` starts as all bits set unless given.
SamplerRun run_row(Backend& backend, const Shape& shape, const SamplerRow& row,
                   const StepState& state, const std::vector<float>& out,
                   const std::vector<float>& x, const std::vector<float>& previous = {}) {
  test::Bench b(backend);
  std::vector<SamplerRow> rows(static_cast<size_t>(state.step) + 1, SamplerRow{.x_x = kNaN});
  rows.back() = row;
  const Out x_slot = b.inout(x), state_slot = b.inout(std::vector<StepState>{state});
  const Out previous_slot = previous.empty() ? b.out(shape.count()) : b.inout(previous);
  b.run(backend.sampler_update(shape, b.in(rows), b.in(out), x_slot, previous_slot, state_slot));
  return {b.get(x_slot), b.get(previous_slot), b.get<StepState>(state_slot)[0]};
}

std::vector<double> row_noise(const Shape& shape, const SamplerRow& row, const StepState& s) {
  std::vector<double> all;
  for (int n = 0; n < shape.n; ++n) {
    RandomStream stream{.seed = s.seed, .purpose = Purpose::kSampleNoise};
    stream.sample = s.first_image + static_cast<uint64_t>(n);
    stream.step = static_cast<uint32_t>(row.t);
    const auto z = ref::normals(stream, shape.pixels() * shape.c);
    all.insert(all.end(), z.begin(), z.end());
  }
  return all;
}

// As DDPM, DDIM, DPM-Solver++ and a raw mean use them.
const std::vector<SamplerRow> kRows = {
    {.t = 999, .x0_x = 1.9f, .x0_out = -1.6f, .clip = 1, .x_x = 0.7f, .x_x0 = 0.3f, .x_z = 0.1f},
    {.t = 0, .x0_x = 1.1f, .x0_out = -0.4f, .clip = 1, .x_x0 = 1},
    {.t = 480, .x0_x = 1.3f, .x0_out = -0.8f, .clip = 1, .x_x0 = 0.8f, .x_out = 0.6f},
    {.t = 51, .x0_x = 1.2f, .x0_out = -0.7f, .x_x = 0.4f, .x_x0 = 0.9f, .x_previous = -0.3f},
    {.t = 7, .x0_out = 1, .clip = 0.5f, .x_x0 = 1, .x_previous = 0.2f, .x_z = 0.9f}};

}  // namespace

TEST_CASE("gather_images: agrees with the reference", "[diffusion]") {
  auto backend = make_cpu_backend({});
  int runs = 0;
  for (const Shape& shape : shapes()) {
    if (shape.count() > 10000) continue;
    for (int64_t count : {1, 2, 11})
      for (bool flip : {false, true}) {
        CAPTURE(to_string(shape), count, flip);
        const GatherDesc d{shape, count, flip};
        const StepState state{
            .seed = 17, .step = static_cast<uint64_t>(runs * 3), .first_image = 9};
        const auto images = bytes(count * shape.pixels() * shape.c, 4);
        std::vector<int32_t> labels;
        for (int32_t i = 0; i < count; ++i) labels.push_back(100 - i);
        test::Bench b(*backend);
        const Out x0 = b.out(shape.count()), batch_labels = b.out<int32_t>(shape.n);
        b.run(backend->gather_images(d, b.in(images), b.in(labels), b.state(state), x0,
                                     batch_labels));
        const auto expected = ref::gather_images(d, images, state);
        const auto y = b.get(x0);
        const auto drawn = b.get<int32_t>(batch_labels);
        for (size_t i = 0; i < y.size(); ++i)
          REQUIRE(y[i] == static_cast<float>(expected.x0[i]));  // correctly rounded
        for (size_t i = 0; i < drawn.size(); ++i) REQUIRE(drawn[i] == 100 - expected.index[i]);
        ++runs;
      }
  }
  CHECK(runs > 30);
}

TEST_CASE("gather_images: each image once per epoch, flipped half the time", "[diffusion]") {
  auto backend = make_cpu_backend({.threads = 2});
  // Image i holds the byte i on its left half and i + 100 on its right; 12 images, batches of 5.
  constexpr int kCount = 12, kBatch = 5, kSteps = 48;
  std::vector<uint8_t> images;
  for (uint8_t i = 0; i < kCount; ++i)
    for (int w = 0; w < 4; ++w) images.push_back(w < 2 ? i : static_cast<uint8_t>(i + 100));
  std::vector<int> order;
  int flips = 0;
  for (uint64_t step = 0; step < kSteps; ++step) {
    test::Bench b(*backend);
    const Out x0 = b.out(kBatch * 4);
    b.run(backend->gather_images({{kBatch, 1, 4, 1}, kCount, true}, b.in(images), {},
                                 b.state({.seed = 3, .step = step}), x0, {}));
    const auto y = b.get(x0);
    for (size_t i = 0; i < kBatch; ++i) {
      const auto left = std::lround((y[4 * i] + 1) * 127.5f);
      flips += left >= 100;
      order.push_back(static_cast<int>(left % 100));
    }
  }
  std::vector<std::vector<int>> epochs;
  for (size_t at = 0; at + kCount <= order.size(); at += kCount) {
    epochs.emplace_back(order.begin() + static_cast<int64_t>(at),
                        order.begin() + static_cast<int64_t>(at) + kCount);
    auto sorted = epochs.back();
    std::sort(sorted.begin(), sorted.end());
    for (int i = 0; i < kCount; ++i) REQUIRE(sorted[static_cast<size_t>(i)] == i);
  }
  CHECK(epochs[0] != epochs[1]);
  CHECK(std::abs(flips - 120) < 5 * std::sqrt(60.0));  // 240 draws
}

TEST_CASE("gather_images: refuses bad arguments", "[diffusion]") {
  auto backend = make_cpu_backend({});
  CHECK_THROWS_AS(backend->gather_images({{1, 2, 2, 3}, 0}, {0}, {}, {1}, {2}, {}), Error);
  CHECK_THROWS_AS(backend->gather_images({{1, 2, 0, 3}, 5}, {0}, {}, {1}, {2}, {}), Error);
  CHECK_THROWS_AS(backend->gather_images({{1, 2, 2, 3}, 5}, {0}, {1}, {1}, {2}, {}), Error);
  CHECK_THROWS_AS(backend->gather_images({{1, 2, 2, 3}, 5}, {0}, {}, {1}, {2}, {3}), Error);
}

// Two products and a sum, each rounded once: 1.5 x 6e-8.
TEST_CASE("q_sample: agrees with the reference", "[diffusion]") {
  auto backend = make_cpu_backend({});
  auto three = make_cpu_backend({.threads = 3});
  for (const Shape& shape : shapes())
    for (float scale : {1.0f, 1e18f}) {
      CAPTURE(to_string(shape), scale);
      NoiseDesc d{.x = shape, .sqrt_ab = {}, .sqrt_1mab = {}};
      for (int t = 0; t < 20; ++t) {
        d.sqrt_ab.push_back(std::cos(0.08f * static_cast<float>(t)));
        d.sqrt_1mab.push_back(std::sin(0.08f * static_cast<float>(t)));
      }
      std::vector<int32_t> t;
      for (int n = 0; n < shape.n; ++n) t.push_back(n == 0 ? 19 : 7 * n % 20);
      const auto x0 = test::random_values(shape.count(), 1, scale);
      const auto noise = test::random_values(shape.count(), 2, 3 * scale);
      test::Bench b(*backend);
      const In x0_slot = b.in(x0), t_slot = b.in(t), noise_slot = b.in(noise);
      const Out x_t = b.out(shape.count()), again = b.out(shape.count());
      b.run(backend->q_sample(d, x0_slot, t_slot, noise_slot, x_t));
      b.run(three->q_sample(d, x0_slot, t_slot, noise_slot, again));
      CHECK(relative_error(b.get(x_t), ref::q_sample(d, to_double(x0), t, to_double(noise))) <
            1e-7);
      CHECK(b.get(x_t) == b.get(again));
    }
}

TEST_CASE("q_sample: refuses a timestep outside its tables", "[diffusion]") {
  auto backend = make_cpu_backend({});
  const NoiseDesc d{.x = {2, 1, 1, 3}, .sqrt_ab = {1, 0.5f}, .sqrt_1mab = {0, 0.5f}};
  for (int32_t bad : {-1, 2, std::numeric_limits<int32_t>::min()}) {
    test::Bench b(*backend);
    const In x = b.in(test::random_values(6, 1)), t = b.in(std::vector<int32_t>{1, bad});
    const Call call = backend->q_sample(d, x, t, x, b.out(6));
    CHECK_THROWS_AS(b.run(call), Error);
  }
  CHECK_THROWS_AS(backend->q_sample({{1, 1, 1, 1}, {1}, {}}, {0}, {1}, {2}, {3}), Error);
  CHECK_THROWS_AS(backend->q_sample({{1, 1, 1, 1}, {}, {}}, {0}, {1}, {2}, {3}), Error);
}

TEST_CASE("sampler_timestep: tells every image the row's t", "[diffusion]") {
  auto backend = make_cpu_backend({});
  const std::vector<SamplerRow> rows = {{.t = 999}, {.t = 500}, {.t = 0}};
  for (int n : {1, 2, 64, 67})
    for (uint64_t step : {0, 1, 2}) {
      test::Bench b(*backend);
      const Out t = b.out<int32_t>(n);
      b.run(backend->sampler_timestep(n, b.in(rows), b.state({.step = step}), t));
      CHECK(b.get<int32_t>(t) == std::vector<int32_t>(static_cast<size_t>(n), rows[step].t));
    }
  CHECK_THROWS_AS(backend->sampler_timestep(0, {0}, {1}, {2}), Error);
}

// Some ten roundings of values near 3, against a result near 1.
TEST_CASE("sampler_update: agrees with the reference", "[diffusion]") {
  auto backend = make_cpu_backend({});
  uint64_t step = 0;
  for (const Shape& shape : shapes())
    for (const SamplerRow& row : kRows) {
      CAPTURE(to_string(shape), row.t);
      const StepState state{.seed = 8, .step = step++ % 3, .first_image = 1000000007};
      const auto out = test::random_values(shape.count(), 1, 1.7f);
      const auto x = test::random_values(shape.count(), 2, 2);
      const auto previous =
          row.x_previous != 0 ? test::random_values(shape.count(), 3) : std::vector<float>{};
      const SamplerRun run = run_row(*backend, shape, row, state, out, x, previous);
      auto expected_x = to_double(x), expected_previous = to_double(previous);
      expected_previous.resize(x.size());
      ref::sampler_row(row, to_double(out), row_noise(shape, row, state), expected_x,
                       expected_previous);
      CHECK(relative_error(run.x, expected_x) < 1e-6);
      CHECK(relative_error(run.previous, expected_previous) < 1e-6);
      CHECK(run.state.nonfinite == 0);
      CHECK(run.state.step == state.step);
    }
}

TEST_CASE("sampler_update: does not depend on threads, slot or neighbours", "[diffusion]") {
  auto one = make_cpu_backend({.threads = 1});
  auto three = make_cpu_backend({.threads = 3});
  for (const Shape& shape : {Shape{5, 7, 7, 3}, Shape{3, 96, 96, 3}, Shape{5, 1, 1, 4097}})
    for (const SamplerRow& row : kRows) {
      const StepState state{.seed = 8, .step = 1, .first_image = 40};
      const auto out = test::random_values(shape.count(), 1),
                 x = test::random_values(shape.count(), 2);
      const auto previous = test::random_values(shape.count(), 3);
      const SamplerRun batch = run_row(*one, shape, row, state, out, x, previous);
      const SamplerRun same = run_row(*three, shape, row, state, out, x, previous);
      CHECK(batch.x == same.x);
      CHECK(batch.previous == same.previous);

      const int64_t size = shape.pixels() * shape.c;
      const auto image = [&](const std::vector<float>& v) {
        return std::vector<float>(v.begin() + 2 * size, v.begin() + 3 * size);
      };
      StepState later = state;
      later.first_image += 2;
      const SamplerRun single = run_row(*three, {1, shape.h, shape.w, shape.c}, row, later,
                                        image(out), image(x), image(previous));
      CHECK(single.x == image(batch.x));
      CHECK(single.previous == image(batch.previous));
    }
}

TEST_CASE("sampler_update: reports what is not finite", "[diffusion]") {
  auto backend = make_cpu_backend({});
  const Shape shape{2, 1, 1, 37};
  for (const SamplerRow& row : kRows)
    for (float bad : {kNaN, kInfinity, -kInfinity})
      for (size_t at : {0, 16, 31, 32, 36, 37, 73})
        for (bool in_out : {true, false}) {
          CAPTURE(row.t, bad, at, in_out);
          const StepState state{.seed = 8, .step = 2};
          auto out = test::random_values(shape.count(), 1),
               x = test::random_values(shape.count(), 2);
          const auto previous = test::random_values(shape.count(), 3);
          (in_out ? out : x)[at] = bad;
          const SamplerRun run = run_row(*backend, shape, row, state, out, x, previous);
          CHECK(run.state.nonfinite == kSampleNonFinite);
          CHECK(run.state.bad_step == 2);
          CHECK_FALSE(std::isfinite(run.x[at]));
          if (std::isnan(bad)) CHECK(std::isnan(run.previous[at]));
          for (size_t i = 0; i < x.size(); ++i)
            if (i != at) CHECK(std::isfinite(run.x[i]));
        }
}

TEST_CASE("sampler_update: keeps an earlier flag and its step", "[diffusion]") {
  auto backend = make_cpu_backend({});
  const Shape shape{1, 1, 1, 5};
  StepState state{.seed = 1, .step = 2, .bad_step = 1, .nonfinite = kLossNonFinite};
  const auto good = test::random_values(5, 1);
  const std::vector<float> bad(5, kNaN);
  CHECK(run_row(*backend, shape, kRows[1], state, good, good).state.nonfinite == kLossNonFinite);
  const StepState after = run_row(*backend, shape, kRows[1], state, bad, good).state;
  CHECK(after.nonfinite == (kLossNonFinite | kSampleNonFinite));
  CHECK(after.bad_step == 1);
  CHECK_THROWS_AS(backend->sampler_update({1, 1, 1, 0}, {0}, {1}, {2}, {3}, {4}), Error);
}

TEST_CASE("image_to_uint8: agrees with the reference", "[diffusion]") {
  auto backend = make_cpu_backend({});
  const auto convert = [&](const std::vector<float>& x) {
    test::Bench b(*backend);
    const Out y = b.out<uint8_t>(static_cast<int64_t>(x.size()));
    b.run(backend->image_to_uint8(static_cast<int64_t>(x.size()), b.in(x), y));
    return b.get<uint8_t>(y);
  };
  for (int64_t count = 1; count <= 70; ++count)
    for (float scale : {0.1f, 1.2f, 1e30f}) {
      CAPTURE(count, scale);
      const auto x = test::random_values(count == 70 ? 50021 : count, 5, scale);
      const auto y = convert(x);
      for (size_t i = 0; i < x.size(); ++i) {
        // Two fp32 roundings near 255 may decide otherwise within 3e-5 of a tie.
        const double exact = ref::to_uint8(double{x[i]});
        REQUIRE(static_cast<double>(y[i]) >= std::floor(exact - 3e-5));
        REQUIRE(static_cast<double>(y[i]) <= std::floor(exact + 3e-5));
      }
    }
  std::vector<float> all;
  for (int i = 0; i < 256; ++i) all.push_back(static_cast<float>(i / 127.5 - 1));
  const auto back = convert(all);
  for (size_t i = 0; i < 256; ++i) CHECK(back[i] == i);
  CHECK(convert({-kInfinity, kInfinity, -1, 1, 0}) == std::vector<uint8_t>{0, 255, 0, 255, 128});
  CHECK(convert(std::vector<float>(33, kNaN)).size() == 33);  // any value, but no fault
  CHECK_THROWS_AS(backend->image_to_uint8(0, {0}, {1}), Error);
}
