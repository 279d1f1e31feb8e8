// Batches, noising, sampler rows and 8-bit images of a backend against the reference.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <string>
#include <vector>

#include <catch2/catch.hpp>

#include "tests/kernel_backend.h"
#include "tests/reference/diffusion.h"
#include "tests/reference/random.h"
#include "tests/simt/machine.h"
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

// `previous` starts as all bits set unless given.
SamplerRun run_rows(Backend& backend, const SamplerDesc& d, const std::vector<SamplerRow>& rows,
                    const std::vector<ChainSlot>& slots, const StepState& state,
                    const std::vector<float>& out, const std::vector<float>& x,
                    const std::vector<float>& previous = {}) {
  test::Bench b(backend);
  const Out x_slot = b.inout(x), state_slot = b.inout(std::vector<StepState>{state});
  const Out previous_slot = previous.empty() ? b.out(d.x.count()) : b.inout(previous);
  b.run(backend.sampler_update(d, b.in(rows), b.in(slots), b.activation(out), x_slot, previous_slot,
                               state_slot));
  return {b.get(x_slot), b.get(previous_slot), b.get<StepState>(state_slot)[0]};
}

// A batch's chain: images first_image, first_image + 1, ... in row `step`.
struct Chain {
  uint64_t seed = 8, step = 0, first_image = 0;
};

// One row for all.
SamplerRun run_row(Backend& backend, const Shape& shape, const SamplerRow& row, const Chain& chain,
                   const std::vector<float>& out, const std::vector<float>& x,
                   const std::vector<float>& previous = {}, StepState state = {}) {
  std::vector<SamplerRow> rows(static_cast<size_t>(chain.step) + 1, SamplerRow{.x_x = kNaN});
  rows.back() = row;
  std::vector<ChainSlot> slots;
  for (int i = 0; i < shape.n; ++i)
    slots.push_back({.seed = chain.seed,
                     .image = chain.first_image + static_cast<uint64_t>(i),
                     .rows = static_cast<int32_t>(rows.size())});
  state.step = chain.step;
  return run_rows(backend, {shape}, rows, slots, state, out, x, previous);
}

std::vector<double> row_noise(const Shape& shape, const SamplerRow& row, const Chain& s) {
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

// Every CUDA compute type on the host.
template <typename F>
void for_simt(F check) {
  for (DType type : {DType::kF32, DType::kBF16}) check(*test::make_kernel_backend(type));
}

// Of one activation, relative: half of a last place, of which bf16 has eight.
double rounding(const Backend& backend) {
  return backend.compute_type() == DType::kBF16 ? 0x1p-8 : 0;
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
}
TEST_CASE("simt.gather_images: agrees with the reference", "[diffusion]") {
  for_simt(check_gather);
  for_simt(check_bytes);
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
      const NoisyBatchDesc d{{shape, 5, flip}, 1000};
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

void check_row_timestep(Backend* backend) {
  const std::vector<SamplerRow> rows = {{.t = 999}, {.t = 500}, {.t = 0}};
  for (int n : {1, 2, 64, 67, 300})
    for (uint64_t step : {0, 1, 2, 3, 4, 5}) {
      std::vector<ChainSlot> slots;
      std::vector<int32_t> expected;
      for (int i = 0; i < n; ++i) {  // chains of two rows, begun in step 0 to 3; every seventh idle
        slots.push_back({.start = i % 4, .first_row = i % 2, .rows = i % 7 == 6 ? 0 : 2});
        const int done = static_cast<int>(step) - i % 4;
        const bool idle = done < 0 || done > 1 || i % 7 == 6;
        expected.push_back(idle ? 0 : rows[static_cast<size_t>(i % 2 + done)].t);
      }
      test::Bench b(*backend);
      const Out t = b.out<int32_t>(n);
      b.run(backend->sampler_timestep(n, b.in(rows), b.in(slots), b.state({.step = step}), t));
      CHECK(b.get<int32_t>(t) == expected);
    }
  CHECK_THROWS_AS(backend->sampler_timestep(0, {0}, {1}, {2}, {3}), Error);
}

// Some ten roundings of values near 3, against a result near 1.
void check_sampler_update(Backend& backend) {
  uint64_t step = 0;
  for (const Shape& shape : shapes())
    for (const SamplerRow& row : kRows) {
      CAPTURE(to_string(shape), row.t);
      const Chain chain{.step = step++ % 3, .first_image = 1000000007};
      const auto out = test::rounded(backend, test::random_values(shape.count(), 1, 1.7f));
      const auto x = test::random_values(shape.count(), 2, 2);
      const auto previous =
          row.x_previous != 0 ? test::random_values(shape.count(), 3) : std::vector<float>{};
      const SamplerRun run = run_row(backend, shape, row, chain, out, x, previous);
      auto expected_x = to_double(x), expected_previous = to_double(previous);
      expected_previous.resize(x.size());
      ref::sampler_row(row, to_double(out), row_noise(shape, row, chain), expected_x,
                       expected_previous);
      CHECK(relative_error(run.x, expected_x) < 1e-6);
      CHECK(relative_error(run.previous, expected_previous) < 1e-6);
      CHECK(run.state.nonfinite == 0);
      CHECK(run.state.step == chain.step);
    }
}

}  // namespace

TEST_CASE("sampler_timestep: tells every image the row's t", "[diffusion]") {
  check_row_timestep(make_cpu_backend({}).get());
}
TEST_CASE("simt.sampler_timestep: tells every image the row's t", "[diffusion]") {
  check_row_timestep(test::make_kernel_backend(DType::kF32).get());
}
namespace {

// Five chains at rows of their own, of other seeds, images and starts, and three idle slots, whose
// x, NaN or not, and `previous` stay. Each image is what it is alone, to the bit.
void check_mixed_rows(Backend& backend) {
  const StepState state{.seed = 77, .step = 10};
  const std::vector<ChainSlot> slots = {
      {.seed = 1, .image = 5, .start = 10, .first_row = 0, .rows = 2},
      {.seed = 1, .image = 5, .start = 9, .first_row = 0, .rows = 2},
      {},
      {.seed = 2, .image = 5, .start = 7, .first_row = 1, .rows = 4},
      {.seed = 1, .image = 6, .start = 11, .first_row = 0, .rows = 2},  // not yet
      {.seed = 1, .image = 7, .start = 10, .first_row = 2, .rows = 1},
      {.seed = 1, .image = 8, .start = 8, .first_row = 0, .rows = 2},  // ended
      {.seed = 3, .image = uint64_t{1} << 35, .start = 10, .first_row = 3, .rows = 1}};
  const std::vector<int> row_of = {0, 1, -1, 4, -1, 2, -1, 3};
  for (const Shape& one : {Shape{1, 5, 7, 3}, Shape{1, 32, 32, 3}, Shape{1, 1, 1, 1}}) {
    const Shape shape{8, one.h, one.w, one.c};
    const auto size = static_cast<size_t>(one.count());
    const auto out = test::rounded(backend, test::random_values(shape.count(), 1, 1.7f));
    auto x = test::random_values(shape.count(), 2, 2);
    const auto previous = test::random_values(shape.count(), 3);
    x[6 * size] = kNaN;
    const SamplerRun run = run_rows(backend, {shape}, kRows, slots, state, out, x, previous);
    CHECK(run.state.nonfinite == 0);
    for (size_t i = 0; i < 8; ++i) {
      CAPTURE(to_string(shape), i);
      const auto image = [&](const std::vector<float>& v) {
        return std::vector<float>(&v[i * size], &v[i * size] + size);
      };
      if (row_of[i] < 0) {
        CHECK(std::memcmp(&run.x[i * size], &x[i * size], size * sizeof(float)) == 0);
        CHECK(image(run.previous) == image(previous));
        continue;
      }
      const SamplerRow& row = kRows[static_cast<size_t>(row_of[i])];
      const Chain alone{.seed = slots[i].seed, .first_image = slots[i].image};
      auto expected_x = to_double(image(x)), expected_previous = to_double(image(previous));
      ref::sampler_row(row, to_double(image(out)), row_noise(one, row, alone), expected_x,
                       expected_previous);
      CHECK(relative_error(image(run.x), expected_x) < 1e-6);
      CHECK(relative_error(image(run.previous), expected_previous) < 1e-6);
      const SamplerRun single =
          run_row(backend, one, row, alone, image(out), image(x), image(previous));
      CHECK(single.x == image(run.x));
      CHECK(single.previous == image(run.previous));
    }
    // Unwatched, a bad image is its own affair.
    x[0] = kNaN;
    for (bool watch : {true, false})
      CHECK(run_rows(backend, {shape, watch}, kRows, slots, state, out, x, previous)
                .state.nonfinite == (watch ? kSampleNonFinite : 0u));
  }
}

}  // namespace

TEST_CASE("sampler_update: images in rows of their own", "[diffusion]") {
  check_mixed_rows(*make_cpu_backend({.threads = 3}));
}
TEST_CASE("simt.sampler_update: images in rows of their own", "[diffusion]") {
  for_simt(check_mixed_rows);
}
TEST_CASE("sampler_update: agrees with the reference", "[diffusion]") {
  check_sampler_update(*make_cpu_backend({}));
}
TEST_CASE("simt.sampler_update: agrees with the reference", "[diffusion]") {
  for_simt(check_sampler_update);
}

namespace {

void check_sampler_slots(Backend* one, Backend* three) {
  for (const Shape& shape : {Shape{5, 7, 7, 3}, Shape{3, 96, 96, 3}, Shape{5, 1, 1, 4097}})
    for (const SamplerRow& row : kRows) {
      const Chain chain{.step = 1, .first_image = 40};
      const auto out = test::random_values(shape.count(), 1),
                 x = test::random_values(shape.count(), 2);
      const auto previous = test::random_values(shape.count(), 3);
      const SamplerRun batch = run_row(*one, shape, row, chain, out, x, previous);
      const SamplerRun same = run_row(*three, shape, row, chain, out, x, previous);
      CHECK(batch.x == same.x);
      CHECK(batch.previous == same.previous);

      const int64_t size = shape.pixels() * shape.c;
      const auto image = [&](const std::vector<float>& v) {
        return std::vector<float>(v.begin() + 2 * size, v.begin() + 3 * size);
      };
      Chain later = chain;
      later.first_image += 2;
      const SamplerRun single = run_row(*three, {1, shape.h, shape.w, shape.c}, row, later,
                                        image(out), image(x), image(previous));
      CHECK(single.x == image(batch.x));
      CHECK(single.previous == image(batch.previous));
    }
}

}  // namespace

TEST_CASE("sampler_update: does not depend on threads, slot or neighbours", "[diffusion]") {
  auto three = make_cpu_backend({.threads = 3});
  check_sampler_slots(make_cpu_backend({.threads = 1}).get(), three.get());
}
TEST_CASE("simt.sampler_update: does not depend on order, slot or neighbours", "[diffusion]") {
  for_simt([](Backend& backend) {
    check_sampler_slots(&backend, &backend);
    const Shape shape{2, 64, 64, 3};
    const auto x = test::random_values(shape.count(), 2);
    const auto once = run_row(backend, shape, kRows[4], {.step = 1}, x, x, x);
    simt::options().seed = 4;
    CHECK(run_row(backend, shape, kRows[4], {.step = 1}, x, x, x).x == once.x);
    simt::options().seed = 0;
  });
}

namespace {

void check_not_finite(Backend* backend) {
  const Shape shape{2, 1, 1, 37};
  for (const SamplerRow& row : kRows)
    for (float bad : {kNaN, kInfinity, -kInfinity})
      for (size_t at : {0, 16, 31, 32, 36, 37, 73})
        for (bool in_out : {true, false}) {
          CAPTURE(row.t, bad, at, in_out);
          auto out = test::random_values(shape.count(), 1),
               x = test::random_values(shape.count(), 2);
          const auto previous = test::random_values(shape.count(), 3);
          (in_out ? out : x)[at] = bad;
          const SamplerRun run = run_row(*backend, shape, row, {.step = 2}, out, x, previous);
          CHECK(run.state.nonfinite == kSampleNonFinite);
          CHECK(run.state.bad_step == 2);
          CHECK_FALSE(std::isfinite(run.x[at]));
          if (std::isnan(bad)) CHECK(std::isnan(run.previous[at]));
          for (size_t i = 0; i < x.size(); ++i)
            if (i != at) CHECK(std::isfinite(run.x[i]));
        }
}

void check_earlier_flag(Backend* backend) {
  const Shape shape{1, 1, 1, 5};
  const StepState state{.bad_step = 1, .nonfinite = kLossNonFinite};
  const Chain chain{.step = 2};
  const auto good = test::random_values(5, 1);
  const std::vector<float> bad(5, kNaN);
  CHECK(run_row(*backend, shape, kRows[1], chain, good, good, {}, state).state.nonfinite ==
        kLossNonFinite);
  const StepState after = run_row(*backend, shape, kRows[1], chain, bad, good, {}, state).state;
  CHECK(after.nonfinite == (kLossNonFinite | kSampleNonFinite));
  CHECK(after.bad_step == 1);
  CHECK_THROWS_AS(backend->sampler_update({{1, 1, 1, 0}}, {0}, {1}, {2}, {3}, {4}, {5}), Error);
}

}  // namespace

TEST_CASE("sampler_update: reports what is not finite", "[diffusion]") {
  check_not_finite(make_cpu_backend({}).get());
}
TEST_CASE("simt.sampler_update: reports what is not finite", "[diffusion]") {
  for_simt([](Backend& backend) { check_not_finite(&backend); });
}
TEST_CASE("sampler_update: keeps an earlier flag and its step", "[diffusion]") {
  check_earlier_flag(make_cpu_backend({}).get());
}
TEST_CASE("simt.sampler_update: keeps an earlier flag and its step", "[diffusion]") {
  for_simt([](Backend& backend) { check_earlier_flag(&backend); });
}

// Some blocks of the large grids, held to the CPU: ten roundings, and those of z.
TEST_CASE("simt.sampler_update: the networks' shapes", "[diffusion]") {
  auto cpu = make_cpu_backend({});
  for_simt([&](Backend& backend) {
    for (const Shape& shape : {Shape{1, 32, 32, 3}, Shape{64, 32, 32, 3}, Shape{1, 256, 256, 3}}) {
      const Chain chain{.step = 1, .first_image = 40};
      const auto out = test::rounded(backend, test::random_values(shape.count(), 1));
      const auto x = test::random_values(shape.count(), 2);
      simt::options().max_blocks = 8;
      const SamplerRun run = run_row(backend, shape, kRows[0], chain, out, x);
      simt::options().max_blocks = 0;
      const SamplerRun expected = run_row(*cpu, shape, kRows[0], chain, out, x);
      int64_t written = 0;
      for (size_t i = 0; i < x.size(); ++i) {
        if (std::isnan(run.previous[i])) continue;  // a block that was left out
        ++written;
        REQUIRE(std::abs(run.x[i] - expected.x[i]) <= 3e-6);
        REQUIRE(std::abs(run.previous[i] - expected.previous[i]) <= 2e-6);
      }
      CHECK(written >= 3000);
    }
  });
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
