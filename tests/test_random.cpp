// Timesteps and noise of a backend against the scalar streams.
#include <algorithm>
#include <cmath>
#include <vector>

#include <catch2/catch.hpp>

#include "tests/kernel_backend.h"
#include "tests/reference/random.h"
#include "tests/simt/machine.h"
#include "tests/support.h"

using namespace ddpm;

namespace {

// What addresses a draw: training's by seed and step, sampling's by seed and image.
struct Address {
  uint64_t seed = 0, step = 0, first_image = 0;
};
constexpr Address kState{.seed = 0x0123456789ABCDEF, .step = 41, .first_image = 4294967290};

std::vector<float> noise(Backend& backend, const Shape& shape, Purpose purpose, const Address& at) {
  test::Bench b(backend);
  const Out y = b.out(shape.count());
  if (purpose == Purpose::kNoise) {
    b.run(backend.draw_noise(
        shape, b.state({.seed = at.seed, .step = at.step, .first_image = at.first_image}), y));
    return b.get(y);
  }
  std::vector<ChainSlot> slots;
  for (int i = 0; i < shape.n; ++i)
    slots.push_back({.seed = at.seed,
                     .image = at.first_image + static_cast<uint64_t>(i),
                     .start = static_cast<int64_t>(at.step),
                     .rows = 1});
  b.run(backend.draw_start(shape, b.in(slots), b.state({.seed = 1, .step = at.step}), y));
  return b.get(y);
}

std::vector<double> reference_noise(const Shape& shape, Purpose purpose, const Address& s) {
  std::vector<double> all;
  for (int n = 0; n < shape.n; ++n) {
    RandomStream stream{.seed = s.seed, .purpose = purpose};
    const bool training = purpose == Purpose::kNoise;
    stream.sample = s.first_image + static_cast<uint64_t>(n);
    stream.step = training ? static_cast<uint32_t>(s.step) : 0;
    const auto z = ref::normals(stream, shape.pixels() * shape.c);
    all.insert(all.end(), z.begin(), z.end());
  }
  return all;
}

std::vector<Shape> shapes() {
  std::vector<Shape> list = {{2, 3, 5, 7},   {3, 8, 8, 3},    {8, 32, 32, 3},   {1, 64, 64, 3},
                             {5, 31, 17, 1}, {13, 1, 1, 129}, {2, 1, 1, 65537}, {100, 1, 1, 1}};
  for (int c = 1; c <= 40; ++c) list.push_back({2, 1, 1, c});
  return list;
}

// Largest radius 6.77; its logarithm, root and product, and sine and cosine are each within a few
// units in the last place: 4 x 6e-8 x 6.77.
void check_noise(Backend& backend) {
  double worst = 0;
  for (const Shape& shape : shapes())
    for (Purpose purpose : {Purpose::kNoise, Purpose::kSampleStart}) {
      CAPTURE(to_string(shape), static_cast<int>(purpose));
      const auto y = noise(backend, shape, purpose, kState);
      const auto expected = reference_noise(shape, purpose, kState);
      REQUIRE(y.size() == expected.size());
      double error = 0;
      for (size_t i = 0; i < y.size(); ++i) {
        const double difference = std::abs(y[i] - expected[i]);
        error = difference <= error ? error : difference;  // a NaN stays
      }
      CHECK(error < 2e-6);
      worst = std::max(worst, error);
    }
  INFO("worst " << worst);
  CHECK(worst > 0);
}

}  // namespace

TEST_CASE("draw_noise: agrees with the reference", "[random]") {
  check_noise(*make_cpu_backend({}));
}
TEST_CASE("simt.draw_noise: agrees with the reference", "[random]") {
  check_noise(*test::make_kernel_backend(DType::kF32));
}

namespace {

// Image first + 3 of a batch is image 0 of the batch that starts there, and a tail is computed as
// the body is.
void check_slots(Backend& backend, Backend& other) {
  for (Purpose purpose : {Purpose::kNoise, Purpose::kSampleStart})
    CHECK(noise(backend, {9, 37, 41, 13}, purpose, kState) ==
          noise(other, {9, 37, 41, 13}, purpose, kState));
  Address later = kState;
  later.first_image += 3;
  for (Purpose purpose : {Purpose::kNoise, Purpose::kSampleStart}) {
    const auto batch = noise(backend, {5, 7, 3, 3}, purpose, kState);
    const auto single = noise(other, {1, 7, 3, 3}, purpose, later);
    CHECK(std::equal(single.begin(), single.end(), batch.begin() + 3 * 63));
  }

  const auto full = noise(other, {1, 1, 1, 256}, Purpose::kNoise, kState);
  for (int count = 1; count < 256; count += 5) {
    const auto part = noise(backend, {1, 1, 1, count}, Purpose::kNoise, kState);
    CHECK(std::equal(part.begin(), part.end(), full.begin()));
  }
}

}  // namespace

TEST_CASE("draw_noise: does not depend on threads, slot or shape", "[random]") {
  auto three = make_cpu_backend({.threads = 3});
  check_slots(*three, *make_cpu_backend({.threads = 1}));
}
TEST_CASE("simt.draw_noise: does not depend on the compute type, slot or shape", "[random]") {
  auto backend = test::make_kernel_backend(DType::kF32);
  check_slots(*backend, *test::make_kernel_backend(DType::kBF16));
  const auto once = noise(*backend, {3, 31, 17, 5}, Purpose::kNoise, kState);
  simt::options().seed = 5;
  CHECK(noise(*backend, {3, 31, 17, 5}, Purpose::kNoise, kState) == once);
  simt::options().seed = 0;
}

TEST_CASE("simt.draw_noise: the networks' shapes", "[random]") {
  auto backend = test::make_kernel_backend(DType::kBF16);
  simt::options().max_blocks = 12;
  for (const Shape& shape :
       {Shape{1, 32, 32, 3}, Shape{128, 32, 32, 3}, Shape{1, 256, 256, 3}, Shape{4, 256, 256, 3}}) {
    const auto y = noise(*backend, shape, Purpose::kNoise, kState);
    int64_t written = 0;
    for (size_t i = 0; i < y.size(); i += 4) {
      if (std::isnan(y[i])) continue;  // a block that was left out
      RandomStream stream{.seed = kState.seed, .purpose = Purpose::kNoise};
      stream.step = static_cast<uint32_t>(kState.step);
      const auto size = static_cast<size_t>(shape.pixels() * shape.c);
      stream.sample = kState.first_image + i / size;
      const auto z = ref::normals(stream, 4, static_cast<uint32_t>(i % size / 4));
      for (size_t j = 0; j < 4; ++j, ++written) REQUIRE(std::abs(y[i + j] - z[j]) < 2e-6);
    }
    CHECK(written >= 3000);
  }
  simt::options().max_blocks = 0;
}

namespace {

// Bounds are five standard deviations of each statistic.
void check_normal(Backend& backend) {
  const auto z = noise(backend, {10, 1, 1, 100000}, Purpose::kNoise, kState);
  const double count = static_cast<double>(z.size());
  double m1 = 0, m2 = 0, m3 = 0, m4 = 0, pair = 0, neighbour = 0, largest = 0;
  int beyond2 = 0, beyond3 = 0;
  for (size_t i = 0; i < z.size(); ++i) {
    const double v = z[i];
    m1 += v / count;
    m2 += v * v / count;
    m3 += v * v * v / count;
    m4 += v * v * v * v / count;
    pair += v * z[i ^ 1] / count;
    neighbour += v * z[(i + 4) % z.size()] / count;
    largest = std::max(largest, std::abs(v));
    beyond2 += std::abs(v) > 2;
    beyond3 += std::abs(v) > 3;
  }
  const double unit = 5 / std::sqrt(count);
  CHECK(std::abs(m1) < unit);
  CHECK(std::abs(m2 - 1) < unit * std::sqrt(2.0));
  CHECK(std::abs(m3) < unit * std::sqrt(15.0));
  CHECK(std::abs(m4 - 3) < unit * std::sqrt(96.0));
  CHECK(std::abs(pair) < unit * std::sqrt(2.0));
  CHECK(std::abs(neighbour) < unit);
  CHECK(std::abs(beyond2 / count - 0.0455003) < unit * std::sqrt(0.0455));
  CHECK(std::abs(beyond3 / count - 0.0026998) < unit * std::sqrt(0.0027));
  CHECK(largest > 4.5);
  CHECK(largest <= 6.7);
}

}  // namespace

TEST_CASE("draw_noise: is normal", "[random]") { check_normal(*make_cpu_backend({})); }
TEST_CASE("simt.draw_noise: is normal", "[random]") {
  check_normal(*test::make_kernel_backend(DType::kF32));
}

namespace {

void check_addresses(Backend* backend) {
  const Shape shape{1, 1, 1, 64};
  std::vector<std::vector<float>> draws;
  Address s = kState;
  draws.push_back(noise(*backend, shape, Purpose::kNoise, s));
  draws.push_back(noise(*backend, shape, Purpose::kSampleStart, s));
  s.step += 1;
  draws.push_back(noise(*backend, shape, Purpose::kNoise, s));
  CHECK(noise(*backend, shape, Purpose::kSampleStart, s) == draws[1]);
  s.first_image += 1;
  draws.push_back(noise(*backend, shape, Purpose::kNoise, s));
  draws.push_back(noise(*backend, shape, Purpose::kSampleStart, s));
  s.seed ^= uint64_t{1} << 63;
  draws.push_back(noise(*backend, shape, Purpose::kNoise, s));
  for (size_t i = 0; i < draws.size(); ++i)
    for (size_t j = 0; j < i; ++j)
      for (size_t k = 0; k < 64; ++k) CHECK(draws[i][k] != draws[j][k]);
}

}  // namespace

TEST_CASE("draw_noise: seed, step, image and purpose matter", "[random]") {
  check_addresses(make_cpu_backend({}).get());
}
TEST_CASE("simt.draw_noise: seed, step, image and purpose matter", "[random]") {
  check_addresses(test::make_kernel_backend(DType::kF32).get());
}

namespace {

// Of five images two begin now, one of them of another seed; what the others have stays.
void check_starts(Backend* backend) {
  const Shape shape{5, 3, 3, 3};
  const std::vector<ChainSlot> slots = {{.seed = 4, .image = 9, .start = 7, .rows = 3},
                                        {.seed = 4, .image = 9, .start = 6, .rows = 3},
                                        {.seed = 4, .image = 9, .start = 7, .rows = 0},
                                        {.seed = 5, .image = 2, .start = 7, .rows = 1},
                                        {.seed = 4, .image = 9, .start = 8, .rows = 3}};
  const std::vector<float> before(static_cast<size_t>(shape.count()), 42.0f);
  test::Bench b(*backend);
  const Out x = b.inout(before);
  b.run(backend->draw_start(shape, b.in(slots), b.state({.seed = 1, .step = 7}), x));
  const auto after = b.get(x);
  for (size_t i = 0; i < 5; ++i) {
    const bool begins = i == 0 || i == 3;
    RandomStream stream{.seed = slots[i].seed, .purpose = Purpose::kSampleStart};
    stream.sample = slots[i].image;
    const auto z = ref::normals(stream, 27);
    for (size_t j = 0; j < 27; ++j)
      CHECK(std::abs(after[27 * i + j] - (begins ? z[j] : 42.0)) < 2e-6);
  }
}

}  // namespace

TEST_CASE("draw_start: of the images that begin in this step", "[random]") {
  check_starts(make_cpu_backend({}).get());
}
TEST_CASE("simt.draw_start: of the images that begin in this step", "[random]") {
  check_starts(test::make_kernel_backend(DType::kF32).get());
}

TEST_CASE("draw_noise: refuses what it cannot draw", "[random]") {
  for (auto make : {+[] { return make_cpu_backend({}); },
                    +[] { return test::make_kernel_backend(DType::kF32); }}) {
    auto backend = make();
    CHECK_THROWS_AS(backend->draw_noise({1, 0, 2, 3}, {0}, {1}), Error);
    CHECK_THROWS_AS(backend->draw_start({1, 0, 2, 3}, {0}, {1}, {2}), Error);
    CHECK_THROWS_AS(backend->draw_timesteps(0, 10, {0}, {1}), Error);
    CHECK_THROWS_AS(backend->draw_timesteps(1, 0, {0}, {1}), Error);
  }
}

namespace {

void check_timesteps(Backend* backend) {
  std::vector<int> seen(10);
  for (int n : {1, 2, 3, 7, 8, 17, 128, 1000})
    for (int timesteps : {1, 2, 10, 1000, 4000})
      for (uint64_t step : {uint64_t{0}, uint64_t{800000}}) {
        CAPTURE(n, timesteps, step);
        test::Bench b(*backend);
        const StepState state{.seed = 99, .step = step};
        const Out t = b.out<int32_t>(n);
        b.run(backend->draw_timesteps(n, timesteps, b.state(state), t));
        const auto drawn = b.get<int32_t>(t);
        for (int i = 0; i < n; ++i) {
          RandomStream stream{.seed = 99, .purpose = Purpose::kTimestep};
          stream.sample = state.first_image + static_cast<uint64_t>(i);
          stream.step = static_cast<uint32_t>(step);
          const double u = stream.block(0)[0] / 4294967296.0;
          CHECK(drawn[static_cast<size_t>(i)] == static_cast<int>(std::floor(u * timesteps)));
          if (timesteps == 10) ++seen[static_cast<size_t>(drawn[static_cast<size_t>(i)])];
        }
      }
  for (int count : seen) CHECK(count > 150);  // of 2332 / 10
}

}  // namespace

TEST_CASE("draw_timesteps: agrees with the streams", "[random]") {
  check_timesteps(make_cpu_backend({}).get());
}
TEST_CASE("simt.draw_timesteps: agrees with the streams", "[random]") {
  check_timesteps(test::make_kernel_backend(DType::kF32).get());
}
