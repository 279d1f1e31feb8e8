// Batches, noising and 8-bit images of a backend against the reference.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <string>
#include <vector>

#include <catch2/catch.hpp>

#include "tests/diffusion_support.h"
#include "tests/reference/diffusion.h"
#include "tests/reference/random.h"
#include "tests/simt/machine.h"

using namespace ddpm;
using test::for_simt;
using test::relative_error;
using test::rounding;
using test::shapes;
using test::to_double;

namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

std::vector<uint8_t> bytes(int64_t count, uint64_t seed) {
  std::vector<uint8_t> v;
  for (float x : test::random_values(count, seed, 128, 128)) v.push_back(static_cast<uint8_t>(x));
  return v;
}

void check_gather(Backend& backend) {
  int runs = 0;
  for (const Shape& shape : shapes()) {
    if (shape.count() > 10000) continue;
    for (int64_t count : {1, 2, 11})
      for (bool flip : {false, true}) {
        CAPTURE(to_string(shape), count, flip);
        const GatherDesc d{shape, count, flip, runs % 2 == 0 ? 0 : shape.n + 10};
        const StepState state{
            .seed = 17, .step = static_cast<uint64_t>(runs * 3), .first_image = 9};
        const auto images = bytes(count * shape.pixels() * shape.c, 4);
        std::vector<int32_t> labels;
        for (int32_t i = 0; i < count; ++i) labels.push_back(100 - i);
        test::Bench b(backend);
        const Out x0 = b.out(shape.count()), batch_labels = b.out<int32_t>(shape.n);
        b.run(
            backend.gather_images(d, b.in(images), b.in(labels), b.state(state), x0, batch_labels));
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

// Labels are dropped each by itself, by an address of their own, and with the given probability.
void check_label_dropout(Backend& backend) {
  constexpr int kBatch = 40, kCount = 11;
  const std::vector<uint8_t> images(kCount, 1);
  std::vector<int32_t> labels;
  for (int32_t i = 0; i < kCount; ++i) labels.push_back(i % 3);
  for (const double p : {0.0, 0.1, 0.5, 1.0}) {
    int dropped = 0;
    for (uint64_t step = 0; step < 25; ++step) {
      const StepState state{.seed = 17, .step = step, .first_image = 9};
      GatherDesc d{{kBatch, 1, 1, 1}, kCount, false, kBatch + 20};
      d.label_dropout = p;
      d.null_label = 3;
      test::Bench b(backend);
      const Out x0 = b.out(kBatch), drawn = b.out<int32_t>(kBatch);
      b.run(backend.gather_images(d, b.in(images), b.in(labels), b.state(state), x0, drawn));
      const std::vector<int32_t> index = ref::gather_images(d, images, state).index;
      for (size_t i = 0; i < kBatch; ++i) {
        const RandomStream stream{.seed = 17,
                                  .purpose = Purpose::kLabel,
                                  .sample = 9 + i,
                                  .step = static_cast<uint32_t>(step)};
        const bool drops = stream.block(0)[0] < p * 0x1p32;
        REQUIRE(b.get<int32_t>(drawn)[i] == (drops ? 3 : index[i] % 3));
        dropped += drops;
      }
    }
    CHECK(std::abs(dropped - 1000 * p) <= 5 * std::sqrt(1000 * p * (1 - p)));
  }
}

// Every byte, and image sizes of whole runs and not.
void check_bytes(Backend& backend) {
  for (int w : {256, 255}) {
    std::vector<uint8_t> images;
    for (int i = 0; i < w; ++i) images.push_back(static_cast<uint8_t>(i));
    test::Bench b(backend);
    const Out x0 = b.out(w);
    b.run(backend.gather_images({{1, 1, w, 1}, 1, false}, b.in(images), {}, b.state({}), x0, {}));
    const auto y = b.get(x0);
    for (size_t i = 0; i < y.size(); ++i)
      REQUIRE(y[i] == static_cast<float>(static_cast<double>(i) / 127.5 - 1));
  }
}

}  // namespace

TEST_CASE("gather_images: agrees with the reference", "[diffusion]") {
  check_gather(*make_cpu_backend({}));
  check_bytes(*make_cpu_backend({}));
  check_label_dropout(*make_cpu_backend({}));
}
TEST_CASE("simt.gather_images: agrees with the reference", "[diffusion]") {
  for_simt(check_gather);
  for_simt(check_bytes);
  for_simt(check_label_dropout);
}

namespace {

void check_epochs(Backend* backend) {
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

}  // namespace

TEST_CASE("gather_images: each image once per epoch, flipped half the time", "[diffusion]") {
  check_epochs(make_cpu_backend({.threads = 2}).get());
}
TEST_CASE("simt.gather_images: each image once per epoch, flipped half the time", "[diffusion]") {
  check_epochs(test::make_kernel_backend(DType::kF32).get());
}

namespace {

void check_gather_refusals(Backend* backend) {
  CHECK_THROWS_AS(backend->gather_images({{1, 2, 2, 3}, 0}, {0}, {}, {1}, {2}, {}), Error);
  CHECK_THROWS_AS(backend->gather_images({{1, 2, 0, 3}, 5}, {0}, {}, {1}, {2}, {}), Error);
  CHECK_THROWS_AS(backend->gather_images({{1, 2, 2, 3}, 5}, {0}, {1}, {1}, {2}, {}), Error);
  CHECK_THROWS_AS(backend->gather_images({{1, 2, 2, 3}, 5}, {0}, {}, {1}, {2}, {3}), Error);
}

}  // namespace

TEST_CASE("gather_images: refuses bad arguments", "[diffusion]") {
  check_gather_refusals(make_cpu_backend({}).get());
  check_gather_refusals(test::make_kernel_backend(DType::kF32).get());
}

namespace {

// (timesteps, 2), as a schedule gives it.
std::vector<float> noise_table(int timesteps) {
  std::vector<float> table;
  for (int t = 0; t < timesteps; ++t) {
    const double angle = 1.6 * t / timesteps;
    table.push_back(static_cast<float>(std::cos(angle)));
    table.push_back(static_cast<float>(std::sin(angle)));
  }
  return table;
}

std::vector<float> q_sample(Backend& backend, const Shape& shape, const std::vector<float>& x0,
                            const std::vector<int32_t>& t, const std::vector<float>& noise,
                            int timesteps = 20) {
  test::Bench b(backend);
  const Out x_t = b.activation_out(shape.count());
  b.run(backend.q_sample({shape, timesteps, backend.compute_type()}, b.in(x0), b.in(t), b.in(noise),
                         b.in(noise_table(timesteps)), x_t));
  return b.get_activation(x_t);
}

// Two products and a sum, each rounded once: 1.5 x 6e-8.
void check_q_sample(Backend& backend) {
  for (const Shape& shape : shapes())
    for (float scale : {1.0f, 1e18f}) {
      CAPTURE(to_string(shape), scale);
      std::vector<int32_t> t;
      for (int n = 0; n < shape.n; ++n) t.push_back(n == 0 ? 19 : 7 * n % 20);
      const auto x0 = test::random_values(shape.count(), 1, scale);
      const auto noise = test::random_values(shape.count(), 2, 3 * scale);
      const auto expected = ref::q_sample(noise_table(20), to_double(x0), t, to_double(noise));
      CHECK(relative_error(q_sample(backend, shape, x0, t, noise), expected) <
            rounding(backend) + 1e-7);
    }
}

}  // namespace

TEST_CASE("q_sample: agrees with the reference", "[diffusion]") {
  check_q_sample(*make_cpu_backend({}));
}
TEST_CASE("simt.q_sample: agrees with the reference", "[diffusion]") { for_simt(check_q_sample); }

TEST_CASE("q_sample: the same bits from any number of threads, and from CUDA's kernel",
          "[diffusion]") {
  auto one = make_cpu_backend({.threads = 1}), three = make_cpu_backend({.threads = 3});
  auto simt = test::make_kernel_backend(DType::kF32);
  for (const Shape& shape : {Shape{3, 31, 29, 3}, Shape{2, 96, 96, 3}, Shape{5, 1, 1, 4099}}) {
    const auto x0 = test::random_values(shape.count(), 1),
               noise = test::random_values(shape.count(), 2, 3);
    std::vector<int32_t> t;
    for (int n = 0; n < shape.n; ++n) t.push_back(3 * n);
    const auto y = q_sample(*one, shape, x0, t, noise);
    CHECK(q_sample(*three, shape, x0, t, noise) == y);
    CHECK(q_sample(*simt, shape, x0, t, noise) == y);
  }
}

TEST_CASE("q_sample: refuses a timestep outside its table", "[diffusion]") {
  auto backend = make_cpu_backend({});
  const auto x = test::random_values(6, 1);
  for (int32_t bad : {-1, 2, std::numeric_limits<int32_t>::min()}) {
    CHECK_THROWS_AS(q_sample(*backend, {2, 1, 1, 3}, x, {1, bad}, x, 2), Error);
    // A device cannot throw: the image is no number, the other is untouched.
    for_simt([&](Backend& simt) {
      const auto y = q_sample(simt, {2, 1, 1, 3}, x, {1, bad}, x, 2);
      for (size_t i = 0; i < 6; ++i) CHECK(std::isnan(y[i]) == (i >= 3));
    });
  }
  for_simt([&](Backend& b) {
    CHECK_THROWS_AS(b.q_sample({{1, 1, 1, 1}, 0}, {0}, {1}, {2}, {3}, {4}), Error);
    CHECK_THROWS_AS(b.q_sample({{1, 1, 0, 1}, 5}, {0}, {1}, {2}, {3}, {4}), Error);
  });
  CHECK_THROWS_AS(backend->q_sample({{1, 1, 1, 1}, 0}, {0}, {1}, {2}, {3}, {4}), Error);
  CHECK_THROWS_AS(backend->q_sample({{1, 1, 0, 1}, 5}, {0}, {1}, {2}, {3}, {4}), Error);
}

namespace {

struct DrawnBatch {
  std::vector<float> x_t;
  std::vector<int32_t> t, labels;
};

// The batch of one step, by one call or by four.
DrawnBatch draw_batch(Backend& backend, const NoisyBatchDesc& d, bool fused,
                      const std::vector<uint8_t>& images, const std::vector<int32_t>& labels,
                      const StepState& state) {
  const Shape s = d.gather.batch;
  test::Bench b(backend);
  const In image_slot = b.in(images), label_slot = b.in(labels), state_slot = b.state(state);
  const In table = b.in(noise_table(d.timesteps));
  const Out x_t = b.activation_out(s.count()), t = b.out<int32_t>(s.n);
  const Out batch_labels = b.out<int32_t>(s.n);
  if (fused) {
    const auto call =
        backend.noisy_batch(d, image_slot, label_slot, state_slot, table, x_t, t, batch_labels);
    REQUIRE(call);
    b.run(*call);
  } else {
    const Out x0 = b.out(s.count()), noise = b.out(s.count());
    b.run(backend.gather_images(d.gather, image_slot, label_slot, state_slot, x0, batch_labels));
    b.run(backend.draw_timesteps(s.n, d.timesteps, state_slot, t));
    b.run(backend.draw_noise(s, state_slot, noise));
    b.run(backend.q_sample({s, d.timesteps, backend.compute_type()}, {x0.slot}, {t.slot},
                           {noise.slot}, table, x_t));
  }
  return {b.get_activation(x_t), b.get<int32_t>(t), b.get<int32_t>(batch_labels)};
}

void check_noisy_batch(Backend& backend) {
  uint64_t step = 0;
  auto list = shapes();
  list.push_back({1, 128, 131, 3});  // more parts than a block's share
  for (const Shape& shape : list)
    for (bool flip : {false, true}) {
      CAPTURE(to_string(shape), flip);
      NoisyBatchDesc d{{shape, 5, flip}, 1000};
      d.gather.label_dropout = 0.4;
      d.gather.null_label = 12;
      const StepState state{.seed = 17, .step = step++};
      const auto images = bytes(5 * shape.pixels() * shape.c, 4);
      const std::vector<int32_t> labels = {7, 8, 9, 10, 11};
      const DrawnBatch a = draw_batch(backend, d, true, images, labels, state);
      const DrawnBatch b = draw_batch(backend, d, false, images, labels, state);
      CHECK(a.x_t == b.x_t);
      CHECK(a.t == b.t);
      CHECK(a.labels == b.labels);
    }
}

}  // namespace

TEST_CASE("simt.noisy_batch: the bits of the calls it stands for", "[diffusion]") {
  for_simt(check_noisy_batch);
}

TEST_CASE("simt.noisy_batch: another order of warps and blocks, and what it refuses",
          "[diffusion]") {
  for_simt([](Backend& backend) {
    const NoisyBatchDesc d{{{2, 64, 64, 3}, 3, true}, 1000};
    const auto images = bytes(3 * 64 * 64 * 3, 4);
    const auto once = draw_batch(backend, d, true, images, {0, 1, 2}, {.seed = 1, .step = 2});
    simt::options().seed = 9;
    const auto again = draw_batch(backend, d, true, images, {0, 1, 2}, {.seed = 1, .step = 2});
    simt::options().seed = 0;
    CHECK(once.x_t == again.x_t);
    const auto make = [&](const NoisyBatchDesc& desc, In labels) {
      backend.noisy_batch(desc, {0}, labels, {1}, {2}, {3}, {4}, {});
    };
    CHECK_NOTHROW(make(d, {}));
    CHECK_THROWS_AS(make(d, {5}), Error);
    CHECK_THROWS_AS(make({{{2, 0, 64, 3}, 3, true}, 1000}, {}), Error);
    CHECK_THROWS_AS(make({{{2, 64, 64, 3}, 0, true}, 1000}, {}), Error);
    CHECK_THROWS_AS(make({{{2, 64, 64, 3}, 3, true}, 0}, {}), Error);
  });
  auto cpu = make_cpu_backend({});
  CHECK_FALSE(cpu->noisy_batch({{{1, 2, 2, 3}, 3, true}, 9}, {0}, {}, {1}, {2}, {3}, {4}, {}));
}

// Some blocks of the large grids, held to the CPU: a rounding of z apart.
TEST_CASE("simt.noisy_batch: the networks' shapes", "[diffusion]") {
  auto cpu = make_cpu_backend({});
  simt::options().max_blocks = 6;
  for_simt([&](Backend& backend) {
    for (const Shape& shape : {Shape{1, 32, 32, 3}, Shape{128, 32, 32, 3}, Shape{1, 256, 256, 3}}) {
      const NoisyBatchDesc d{{shape, 2, true}, 1000};
      const auto images = bytes(2 * shape.pixels() * shape.c, 4);
      const StepState state{.seed = 3, .step = 800000};
      const auto y = draw_batch(backend, d, true, images, {1, 2}, state).x_t;
      const auto expected = draw_batch(*cpu, d, false, images, {1, 2}, state).x_t;
      int64_t written = 0;
      for (size_t i = 0; i < y.size(); ++i) {
        if (std::isnan(y[i])) continue;  // a block that was left out
        ++written;
        REQUIRE(std::abs(y[i] - expected[i]) <= 3e-6 + rounding(backend) * std::abs(expected[i]));
      }
      CHECK(written >= 3000);
    }
  });
  simt::options().max_blocks = 0;
}

namespace {

void check_uint8(Backend* backend) {
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

}  // namespace

TEST_CASE("image_to_uint8: agrees with the reference", "[diffusion]") {
  check_uint8(make_cpu_backend({}).get());
}
TEST_CASE("simt.image_to_uint8: agrees with the reference", "[diffusion]") {
  check_uint8(test::make_kernel_backend(DType::kF32).get());
}
