// Sampler rows of a backend against the reference.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include <catch2/catch.hpp>

#include "tests/diffusion_support.h"
#include "tests/reference/diffusion.h"
#include "tests/reference/random.h"
#include "tests/simt/machine.h"

using namespace ddpm;
using test::for_simt;
using test::relative_error;
using test::shapes;
using test::to_double;

namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

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
SamplerRun run_row(Backend& backend, const SamplerDesc& d, const SamplerRow& row,
                   const Chain& chain, const std::vector<float>& out, const std::vector<float>& x,
                   const std::vector<float>& previous = {}, StepState state = {}) {
  std::vector<SamplerRow> rows(static_cast<size_t>(chain.step) + 1, SamplerRow{.x_x = kNaN});
  rows.back() = row;
  std::vector<ChainSlot> slots;
  for (int i = 0; i < d.x.n; ++i)
    slots.push_back({.seed = chain.seed,
                     .image = chain.first_image + static_cast<uint64_t>(i),
                     .rows = static_cast<int32_t>(rows.size())});
  state.step = chain.step;
  return run_rows(backend, d, rows, slots, state, out, x, previous);
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

}  // namespace

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

// Guided outputs, with a variance and without, images by other scales: theirs + guidance (own -
// theirs), which at 3 triples their roundings.
void check_guided(Backend& backend) {
  constexpr float kScales[] = {3, 0, 1};
  for (const bool variance : {false, true})
    for (const Shape& shape : shapes()) {
      if (shape.count() > 10000) continue;
      SamplerRow row = kRows[0];
      row.z_out = 0.5f;
      CAPTURE(variance, to_string(shape));
      const int64_t count = (variance ? 2 : 1) * shape.count();
      const auto both = test::rounded(backend, test::random_values(2 * count, 1, 1.7f));
      const std::vector<float> first(both.begin(), both.begin() + count);
      const auto theirs = std::vector<double>(both.begin() + count, both.end());
      const auto x = test::random_values(shape.count(), 2, 2);
      std::vector<ChainSlot> slots;
      for (int i = 0; i < shape.n; ++i)
        slots.push_back({.seed = Chain().seed,
                         .image = static_cast<uint64_t>(i),
                         .rows = 1,
                         .guidance = kScales[i % 3]});
      const SamplerRun run = run_rows(backend, {.x = shape, .variance = variance, .guided = true},
                                      {row}, slots, {}, both, x, x);
      ref::Halves a = variance ? ref::split_output(to_double(first), shape.c)
                               : ref::Halves{to_double(first), {}};
      const ref::Halves b = variance ? ref::split_output(theirs, shape.c) : ref::Halves{theirs, {}};
      std::vector<double> z = row_noise(shape, row, {});
      const size_t size = a.mean.size() / static_cast<size_t>(shape.n);
      for (size_t i = 0; i < a.mean.size(); ++i) {
        a.mean[i] = b.mean[i] + double{kScales[i / size % 3]} * (a.mean[i] - b.mean[i]);
        if (variance) z[i] *= std::exp(0.5 * a.variance[i]);
      }
      auto expected_x = to_double(x), expected_previous = to_double(x);
      ref::sampler_row(row, a.mean, z, expected_x, expected_previous);
      CHECK(relative_error(run.x, expected_x) < 2e-6);
      CHECK(relative_error(run.previous, expected_previous) < 2e-6);
      // Every third image is as learned: what it is without the others, to the bit.
      const SamplerRun plain =
          run_rows(backend, {.x = shape, .variance = variance}, {row}, slots, {}, first, x, x);
      for (size_t i = 0; i < run.x.size(); ++i)
        if (i / size % 3 == 2 && run.x[i] != plain.x[i]) FAIL_CHECK("element " << i);
    }
}

// Variances that are learned: their factor is exp of 0.1 at most times 3, within 2e-7.
void check_learned(Backend& backend) {
  std::vector<SamplerRow> rows = kRows;
  for (SamplerRow& row : rows) {
    row.z_log = -0.3f;
    row.z_out = 0.8f;
  }
  for (const Shape& shape : shapes())
    for (const SamplerRow& row : rows) {
      if (shape.count() > 10000) continue;
      CAPTURE(to_string(shape), row.t);
      const Chain chain{.step = 1, .first_image = 77};
      const auto out = test::rounded(backend, test::random_values(2 * shape.count(), 1, 1.7f));
      const auto x = test::random_values(shape.count(), 2, 2);
      const auto previous = test::random_values(shape.count(), 3);
      const SamplerRun run =
          run_row(backend, {.x = shape, .variance = true}, row, chain, out, x, previous);
      const ref::Halves halves = ref::split_output(to_double(out), shape.c);
      std::vector<double> z = row_noise(shape, row, chain);
      for (size_t i = 0; i < z.size(); ++i)
        z[i] *= std::exp(double{row.z_log} + double{row.z_out} * halves.variance[i]);
      auto expected_x = to_double(x), expected_previous = to_double(previous);
      ref::sampler_row(row, halves.mean, z, expected_x, expected_previous);
      CHECK(relative_error(run.x, expected_x) < 1e-6);
      CHECK(relative_error(run.previous, expected_previous) < 1e-6);
      CHECK(run.state.nonfinite == 0);
    }
  // A variance that is not finite shows in the state where noise is drawn.
  std::vector<float> out(8, 0.5f);
  out[6] = kInfinity;
  const std::vector<float> x(4, 1.0f);
  for (const SamplerRow& row : rows)
    CHECK((run_row(backend, {.x = {1, 1, 2, 2}, .variance = true}, row, {}, out, x, x)
               .state.nonfinite != 0) == (row.x_z != 0));
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
      const SamplerRun run = run_row(backend, {shape}, row, chain, out, x, previous);
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

TEST_CASE("sampler_timestep: tells every image the row's t", "[sampler_update]") {
  check_row_timestep(make_cpu_backend({}).get());
}
TEST_CASE("simt.sampler_timestep: tells every image the row's t", "[sampler_update]") {
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
          run_row(backend, {one}, row, alone, image(out), image(x), image(previous));
      CHECK(single.x == image(run.x));
      CHECK(single.previous == image(run.previous));
    }
    // Unwatched, a bad image is its own affair.
    x[0] = kNaN;
    for (bool watch : {true, false})
      CHECK(run_rows(backend, {.x = shape, .watch = watch}, kRows, slots, state, out, x, previous)
                .state.nonfinite == (watch ? kSampleNonFinite : 0u));
  }
}

}  // namespace

TEST_CASE("sampler_update: images in rows of their own", "[sampler_update]") {
  check_mixed_rows(*make_cpu_backend({.threads = 3}));
}
TEST_CASE("simt.sampler_update: images in rows of their own", "[sampler_update]") {
  for_simt(check_mixed_rows);
}
TEST_CASE("sampler_update: agrees with the reference", "[sampler_update]") {
  check_sampler_update(*make_cpu_backend({}));
}
TEST_CASE("simt.sampler_update: agrees with the reference", "[sampler_update]") {
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
      const SamplerRun batch = run_row(*one, {shape}, row, chain, out, x, previous);
      const SamplerRun same = run_row(*three, {shape}, row, chain, out, x, previous);
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

TEST_CASE("sampler_update: does not depend on threads, slot or neighbours", "[sampler_update]") {
  auto three = make_cpu_backend({.threads = 3});
  check_sampler_slots(make_cpu_backend({.threads = 1}).get(), three.get());
}
TEST_CASE("simt.sampler_update: does not depend on order, slot or neighbours", "[sampler_update]") {
  for_simt([](Backend& backend) {
    check_sampler_slots(&backend, &backend);
    const Shape shape{2, 64, 64, 3};
    const auto x = test::random_values(shape.count(), 2);
    const auto once = run_row(backend, {shape}, kRows[4], {.step = 1}, x, x, x);
    simt::options().seed = 4;
    CHECK(run_row(backend, {shape}, kRows[4], {.step = 1}, x, x, x).x == once.x);
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
          const SamplerRun run = run_row(*backend, {shape}, row, {.step = 2}, out, x, previous);
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
  CHECK(run_row(*backend, {shape}, kRows[1], chain, good, good, {}, state).state.nonfinite ==
        kLossNonFinite);
  const StepState after = run_row(*backend, {shape}, kRows[1], chain, bad, good, {}, state).state;
  CHECK(after.nonfinite == (kLossNonFinite | kSampleNonFinite));
  CHECK(after.bad_step == 1);
  CHECK_THROWS_AS(backend->sampler_update({{1, 1, 1, 0}}, {0}, {1}, {2}, {3}, {4}, {5}), Error);
}

}  // namespace

TEST_CASE("sampler_update: reports what is not finite", "[sampler_update]") {
  check_not_finite(make_cpu_backend({}).get());
}
TEST_CASE("simt.sampler_update: reports what is not finite", "[sampler_update]") {
  for_simt([](Backend& backend) { check_not_finite(&backend); });
}
TEST_CASE("sampler_update: keeps an earlier flag and its step", "[sampler_update]") {
  check_earlier_flag(make_cpu_backend({}).get());
}
TEST_CASE("simt.sampler_update: keeps an earlier flag and its step", "[sampler_update]") {
  for_simt([](Backend& backend) { check_earlier_flag(&backend); });
}

// Some blocks of the large grids, held to the CPU: ten roundings, and those of z.
TEST_CASE("simt.sampler_update: the networks' shapes", "[sampler_update]") {
  auto cpu = make_cpu_backend({});
  for_simt([&](Backend& backend) {
    for (const Shape& shape : {Shape{1, 32, 32, 3}, Shape{64, 32, 32, 3}, Shape{1, 256, 256, 3}}) {
      const Chain chain{.step = 1, .first_image = 40};
      const auto out = test::rounded(backend, test::random_values(shape.count(), 1));
      const auto x = test::random_values(shape.count(), 2);
      simt::options().max_blocks = 8;
      const SamplerRun run = run_row(backend, {shape}, kRows[0], chain, out, x);
      simt::options().max_blocks = 0;
      const SamplerRun expected = run_row(*cpu, {shape}, kRows[0], chain, out, x);
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

TEST_CASE("sampler_update: a learned variance scales the noise", "[sampler_update]") {
  check_learned(*make_cpu_backend({}));
}
TEST_CASE("simt.sampler_update: a learned variance scales the noise", "[sampler_update]") {
  for_simt(check_learned);
}

TEST_CASE("sampler_update: guided by the output without classes", "[sampler_update]") {
  check_guided(*make_cpu_backend({}));
}
TEST_CASE("simt.sampler_update: guided by the output without classes", "[sampler_update]") {
  for_simt(check_guided);
}
