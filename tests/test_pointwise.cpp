// SiLU, copies and embeddings of a backend against the reference.
#include <catch2/catch.hpp>

#include <cmath>
#include <numeric>

#include "tests/kernel_backend.h"
#include "tests/reference/difference.h"
#include "tests/reference/pointwise.h"
#include "tests/simt/machine.h"
#include "tests/support.h"

using namespace ddpm;
using test::random_values;
using test::relative_error;
using test::to_double;

namespace {

// One rounding each of exp, sum, quotient and product, each within 1e-7.
constexpr double kTolerance = 5e-7;

constexpr Write kWrites[] = {Write::kOverwrite, Write::kAccumulate};

const std::vector<int64_t> kCounts = {1,   2,   3,   4,   5,   7,   8,    9,    13,    15,   16,
                                      17,  19,  23,  31,  32,  33,  47,   63,   64,    65,   97,
                                      127, 128, 129, 255, 257, 509, 1021, 4099, 16384, 40009};

std::vector<double> plus(std::vector<double> a, const std::vector<float>& b, Write write) {
  if (write == Write::kAccumulate)
    for (size_t i = 0; i < a.size(); ++i) a[i] += static_cast<double>(b[i]);
  return a;
}

}  // namespace

TEST_CASE("silu: the reference's gradient is its finite difference", "[silu]") {
  const auto x = to_double(random_values(41, 1, 6)), dy = to_double(random_values(41, 2));
  const auto loss = [&](const ref::Vector& v) { return ref::dot(ref::silu(v), dy); };
  CHECK(relative_error(ref::silu_backward(x, dy), ref::difference_gradient(loss, x)) < 1e-8);
}

namespace {

void check_silu(Backend& device, double tolerance) {
  Backend* backend = &device;
  for (const int64_t count : kCounts)
    for (const float scale : {1e-4f, 4.0f, 1e4f})
      for (const Write write : kWrites) {
        const auto x = random_values(count, 3, scale), dy = random_values(count, 4);
        const auto before = random_values(count, 5);
        test::Bench bench(*backend);
        const In xs = bench.in(x), dys = bench.in(dy);
        const Out y = bench.out(count);
        const Out dx = write == Write::kAccumulate ? bench.inout(before) : bench.out(count);
        bench.run(backend->silu(count, xs, y));
        bench.run(backend->silu_backward(count, xs, dys, dx, write));
        INFO("count " << count << " scale " << scale);
        CHECK(relative_error(bench.get(y), ref::silu(to_double(x))) <= tolerance);
        const auto expected = plus(ref::silu_backward(to_double(x), to_double(dy)), before, write);
        CHECK(relative_error(bench.get(dx), expected) <= tolerance);
      }
}

}  // namespace

TEST_CASE("silu: forward and backward at many lengths, scales and write modes", "[silu]") {
  check_silu(*make_cpu_backend({.threads = 2}), kTolerance);
}
TEST_CASE("simt.silu: forward and backward at many lengths, scales and write modes", "[silu]") {
  check_silu(*test::make_kernel_backend(DType::kF32), kTolerance);
}

TEST_CASE("silu: every value is close, zeros, denormals and infinities included", "[silu]") {
  std::vector<float> x = {0.0f, -0.0f, 1e-40f, -1e-40f, 1e30f, HUGE_VALF, 87.5f, -87.5f, 120.0f};
  for (int i = -3000; i <= 3000; ++i) x.push_back(static_cast<float>(i) * 0.013f);
  const auto count = static_cast<int64_t>(x.size());
  const auto backend = make_cpu_backend({});
  test::Bench bench(*backend);
  const In xs = bench.in(x), ones = bench.in(std::vector<float>(x.size(), 1.0f));
  const Out y = bench.out(count), dx = bench.out(count);
  bench.run(backend->silu(count, xs, y));
  bench.run(backend->silu_backward(count, xs, ones, dx, Write::kOverwrite));
  const auto ys = bench.get(y), slopes = bench.get(dx);
  CHECK(ys[5] == HUGE_VALF);
  for (size_t i = 0; i < x.size(); ++i) {
    if (std::isinf(x[i])) continue;
    INFO("x " << x[i]);
    const double v = static_cast<double>(x[i]);
    CHECK(std::abs(ys[i] - ref::silu(v)) <= 4e-7 * std::abs(ref::silu(v)) + 1e-35);
    // The slope's two terms cancel near x = -1.28, so its error is relative to them.
    if (std::abs(v) < 40) CHECK(std::abs(slopes[i] - ref::silu_slope(v)) <= 1e-6);
  }
}

TEST_CASE("silu: NaN passes through", "[silu]") {
  auto x = random_values(37, 1);
  for (size_t i = 0; i < x.size(); i += 6) x[i] = NAN;
  const auto backend = make_cpu_backend({});
  test::Bench bench(*backend);
  const In xs = bench.in(x), dy = bench.in(random_values(37, 2));
  const Out y = bench.out(37), dx = bench.out(37);
  bench.run(backend->silu(37, xs, y));
  bench.run(backend->silu_backward(37, xs, dy, dx, Write::kOverwrite));
  for (size_t i = 0; i < x.size(); ++i) {
    CHECK(std::isnan(bench.get(y)[i]) == (i % 6 == 0));
    CHECK(std::isnan(bench.get(dx)[i]) == (i % 6 == 0));
  }
}

namespace {

void check_copy(Backend& backend) {
  for (const int64_t count : kCounts)
    for (const Write write : kWrites) {
      const auto x = test::rounded(backend, random_values(count, 1, 1e4f));
      const auto before = test::rounded(backend, random_values(count, 2, 1e4f));
      test::Bench bench(backend);
      const In xs = bench.activation(x);
      const bool add = write == Write::kAccumulate;
      const Out y = add ? bench.activation_inout(before) : bench.activation_out(count);
      bench.run(backend.copy(count, backend.compute_type(), xs, y, write));
      std::vector<float> expected = x;
      for (size_t i = 0; i < x.size() && add; ++i) expected[i] += before[i];
      INFO("count " << count);
      CHECK((bench.get_activation(y) == test::rounded(backend, expected)));
    }
}

}  // namespace

TEST_CASE("copy: bits in overwrite mode, one rounding in accumulate mode", "[copy]") {
  check_copy(*make_cpu_backend({.threads = 2}));
}
TEST_CASE("simt.copy: bits in overwrite mode, one rounding in accumulate mode", "[copy]") {
  for (DType type : {DType::kF32, DType::kBF16}) check_copy(*test::make_kernel_backend(type));
}

TEST_CASE("simt.copy: fp32 beside a compute type of bf16", "[copy]") {
  const auto backend = test::make_kernel_backend(DType::kBF16);
  const auto x = random_values(1003, 1), before = random_values(1003, 2);
  test::Bench bench(*backend);
  const Out y = bench.inout(before);
  bench.run(backend->copy(1003, DType::kF32, bench.in(x), y, Write::kAccumulate));
  std::vector<float> expected = x;
  for (size_t i = 0; i < x.size(); ++i) expected[i] += before[i];
  CHECK(bench.get(y) == expected);
  CHECK_THROWS_AS(backend->copy(3, DType::kI32, {0}, {1}, Write::kOverwrite), Error);
}

namespace {

void check_cast(Backend& backend) {
  for (const int64_t count : kCounts) {
    auto x = random_values(count, 1, 1e3f);
    x[0] = 1 + 0x1p-8f;  // a tie
    if (count > 8) {
      x[1] = NAN;
      x[2] = -HUGE_VALF;
      x[8] = 1 + 3 * 0x1p-8f;
    }
    test::Bench bench(backend);
    const In xs = bench.in(x);
    const Out narrow = bench.out<bf16>(count), wide = bench.out(count);
    bench.run(backend.cast(count, DType::kF32, xs, DType::kBF16, narrow));
    bench.run(backend.cast(count, DType::kBF16, {narrow.slot}, DType::kF32, wide));
    INFO("count " << count);
    const auto bits = bench.get<bf16>(narrow);
    const auto back = bench.get(wide);
    CHECK(back[0] == 1);
    if (count > 8) {
      CHECK(std::isnan(back[1]));
      CHECK(back[2] == -HUGE_VALF);
      CHECK(back[8] == 1 + 0x1p-6f);
    }
    for (size_t i = 0; i < x.size(); ++i) {
      if (std::isnan(x[i])) continue;
      REQUIRE(bits[i] == to_bf16(x[i]));
      REQUIRE(back[i] == to_float(bits[i]));
    }
  }
}

}  // namespace

TEST_CASE("cast: to bf16 and back, ties to even, NaN and infinity kept", "[cast]") {
  check_cast(*make_cpu_backend({.threads = 2}));
}

TEST_CASE("simt.cast: to bf16 and back, ties to even, NaN and infinity kept", "[cast]") {
  check_cast(*test::make_kernel_backend(DType::kBF16));
}

TEST_CASE("silu, copy: nothing to do is refused", "[silu][copy]") {
  const auto backend = make_cpu_backend({});
  CHECK_THROWS_AS(backend->silu(0, {0}, {1}), Error);
  CHECK_THROWS_AS(backend->silu_backward(-1, {0}, {1}, {2}, Write::kOverwrite), Error);
  CHECK_THROWS_AS(backend->copy(0, DType::kF32, {0}, {1}, Write::kOverwrite), Error);
}

namespace {

void check_embedding(Backend& backend, int n, int rows, int dim, Write write) {
  std::vector<int32_t> index;
  for (int i = 0; i < n; ++i) index.push_back(static_cast<int32_t>(int64_t{i} * i * 5 % rows));
  const auto table = random_values(int64_t{rows} * dim, 1);
  const auto dy = random_values(int64_t{n} * dim, 2);
  const auto before = random_values(int64_t{n} * dim, 3);
  const auto dbefore = random_values(int64_t{rows} * dim, 4);
  const bool add = write == Write::kAccumulate;
  test::Bench bench(backend);
  const In ts = bench.in(table), is = bench.in(index), dys = bench.in(dy);
  const Out y = add ? bench.inout(before) : bench.out(int64_t{n} * dim);
  const Out dtable = add ? bench.inout(dbefore) : bench.out(int64_t{rows} * dim);
  bench.run(backend.embedding(n, rows, dim, ts, is, y, write));
  bench.run(backend.embedding_backward(n, rows, dim, is, dys, dtable, write));
  INFO("n " << n << " rows " << rows << " dim " << dim);
  const auto expected = plus(ref::embedding(dim, to_double(table), index), before, write);
  CHECK(relative_error(bench.get(y), expected) <= 1e-7);
  const auto gradient =
      plus(ref::embedding_backward(rows, dim, index, to_double(dy)), dbefore, write);
  CHECK(relative_error(bench.get(dtable), gradient) <= 1e-6);  // sums of up to 33
}

void check_embeddings(Backend& backend) {
  for (const int n : {1, 2, 7, 33})
    for (const int rows : {1, 3, 10})
      for (const int dim : {1, 5, 16, 67})
        for (const Write write : kWrites) check_embedding(backend, n, rows, dim, write);
}

}  // namespace

TEST_CASE("embedding: forward and backward with repeated and untouched rows", "[embedding]") {
  check_embeddings(*make_cpu_backend({.threads = 2}));
}
TEST_CASE("simt.embedding: forward and backward with repeated and untouched rows", "[embedding]") {
  check_embeddings(*test::make_kernel_backend(DType::kF32));
}
// Class labels of networks, a hundred tables' worth of columns, and more columns than a block has.
TEST_CASE("simt.embedding: the networks' shapes", "[embedding]") {
  const auto backend = test::make_kernel_backend(DType::kBF16);
  check_embedding(*backend, 128, 10, 512, Write::kAccumulate);
  check_embedding(*backend, 64, 30, 512, Write::kOverwrite);
  check_embedding(*backend, 8, 2, 1028, Write::kAccumulate);
}

// The sum's order is the images', so these are the bits of the loop that adds them.
TEST_CASE("simt.embedding: gradients are added in the images' order, blocks in any",
          "[embedding]") {
  const int n = 61, rows = 3, dim = 12;
  std::vector<int32_t> index;
  for (int i = 0; i < n; ++i) index.push_back(i * 7 % rows);
  auto dy = random_values(n * dim, 1);
  for (size_t i = 0; i < dy.size(); i += 3) dy[i] *= 1e5f;
  std::vector<float> sums = random_values(rows * dim, 2);
  const auto before = sums;
  for (int i = 0; i < n; ++i)
    for (int c = 0; c < dim; ++c)
      sums[static_cast<size_t>(index[static_cast<size_t>(i)] * dim + c)] +=
          dy[static_cast<size_t>(i * dim + c)];
  for (const uint64_t seed : {0, 77}) {
    simt::options().seed = seed;
    const auto backend = test::make_kernel_backend(DType::kF32);
    test::Bench bench(*backend);
    const In is = bench.in(index), dys = bench.in(dy);
    const Out dtable = bench.inout(before);
    bench.run(backend->embedding_backward(n, rows, dim, is, dys, dtable, Write::kAccumulate));
    CHECK((bench.get(dtable) == sums));
  }
  simt::options().seed = 0;
}

TEST_CASE("embedding: the reference's gradient is its finite difference", "[embedding]") {
  const std::vector<int32_t> index = {2, 0, 2, 1};
  const auto table = to_double(random_values(4 * 3, 1)), dy = to_double(random_values(4 * 3, 2));
  const auto loss = [&](const ref::Vector& v) { return ref::dot(ref::embedding(3, v, index), dy); };
  CHECK(relative_error(ref::embedding_backward(4, 3, index, dy),
                       ref::difference_gradient(loss, table)) < 1e-8);
}

TEST_CASE("embedding: a row outside the table is refused", "[embedding]") {
  const auto backend = make_cpu_backend({});
  for (const int32_t row : {-1, 4}) {
    test::Bench bench(*backend);
    const In table = bench.in(random_values(4 * 3, 1)), index = bench.in(std::vector<int32_t>{row});
    const In dy = bench.in(random_values(3, 2));
    const Out y = bench.out(3), dtable = bench.out(12);
    CHECK_THROWS_AS(bench.run(backend->embedding(1, 4, 3, table, index, y, Write::kOverwrite)),
                    Error);
    CHECK_THROWS_AS(
        bench.run(backend->embedding_backward(1, 4, 3, index, dy, dtable, Write::kOverwrite)),
        Error);
  }
}

TEST_CASE("simt.embedding: a row outside the table is NaN, and no row's gradient", "[embedding]") {
  const auto backend = test::make_kernel_backend(DType::kF32);
  for (const int dim : {3, 4})
    for (const int32_t row : {-1, 4, 1 << 30, -(1 << 30)}) {
      test::Bench bench(*backend);
      const In table = bench.in(random_values(4 * dim, 1));
      const In index = bench.in(std::vector<int32_t>{2, row});
      const In dy = bench.in(std::vector<float>(static_cast<size_t>(2 * dim), 1.0f));
      const Out y = bench.out(2 * dim), dtable = bench.out(4 * dim);
      bench.run(backend->embedding(2, 4, dim, table, index, y, Write::kOverwrite));
      bench.run(backend->embedding_backward(2, 4, dim, index, dy, dtable, Write::kOverwrite));
      const auto values = bench.get(y), sums = bench.get(dtable);
      for (int c = 0; c < 2 * dim; ++c)
        CHECK(std::isnan(values[static_cast<size_t>(c)]) == (c >= dim));
      for (int c = 0; c < 4 * dim; ++c)
        CHECK(sums[static_cast<size_t>(c)] == (c / dim == 2 ? 1.0f : 0.0f));
    }
}

namespace {

void check_time_embedding(Backend& backend) {
  for (const int dim : {4, 5, 7, 8, 32, 33, 64, 128, 257})
    for (const bool flip : {false, true})
      for (const float shift : {0.0f, 1.0f}) {
        const TimeEmbeddingDesc d{
            .n = 9, .dim = dim, .timesteps = 1000, .flip_sin_to_cos = flip, .freq_shift = shift};
        const std::vector<int32_t> t = {0, 1, 2, 10, 500, 999, 998, 37, 1};
        test::Bench bench(backend);
        const In ts = bench.in(t);
        const Out y = bench.out(9 * dim);
        bench.run(backend.time_embedding(d, ts, y));
        const auto values = bench.get(y);
        const auto expected = ref::time_embedding(d, t);
        INFO("dim " << dim << " flip " << flip << " shift " << shift);
        CHECK(relative_error(values, expected) <= 1e-7);  // one rounding of a double
      }
}

// Every timestep, each value within `tolerance`.
void check_all_timesteps(Backend& backend, int dim, int timesteps, double tolerance) {
  const TimeEmbeddingDesc d{.n = timesteps, .dim = dim, .timesteps = timesteps};
  std::vector<int32_t> t(static_cast<size_t>(timesteps));
  std::iota(t.begin(), t.end(), 0);
  test::Bench bench(backend);
  const In ts = bench.in(t);
  const Out y = bench.out(int64_t{timesteps} * dim);
  bench.run(backend.time_embedding(d, ts, y));
  const auto values = bench.get(y);
  const auto expected = ref::time_embedding(d, t);
  double worst = 0;
  for (size_t i = 0; i < values.size(); ++i) {
    const double error = std::abs(static_cast<double>(values[i]) - expected[i]);
    worst = error <= worst ? worst : error;  // a NaN stays
  }
  INFO("dim " << dim << " T " << timesteps);
  CHECK(worst <= tolerance);
}

}  // namespace

TEST_CASE("time_embedding: every dimension, order and shift", "[time_embedding]") {
  check_time_embedding(*make_cpu_backend({.threads = 2}));
}
TEST_CASE("simt.time_embedding: every dimension, order and shift", "[time_embedding]") {
  check_time_embedding(*test::make_kernel_backend(DType::kF32));
}
// A value near 1 is rounded by at most 2^-25; the rest is double's.
TEST_CASE("simt.time_embedding: every timestep of the networks within a rounding",
          "[time_embedding]") {
  const auto backend = test::make_kernel_backend(DType::kBF16);
  for (const int dim : {128, 192, 512, 33})
    check_all_timesteps(*backend, dim, 1000, 0x1p-25 + 1e-12);
  check_all_timesteps(*backend, 6, 20011, 0x1p-25 + 1e-11);
}

TEST_CASE("time_embedding: a timestep outside the schedule is refused", "[time_embedding]") {
  const auto backend = make_cpu_backend({});
  const TimeEmbeddingDesc d{.n = 1, .dim = 8, .timesteps = 10};
  for (const int32_t t : {-1, 10}) {
    test::Bench bench(*backend);
    const In ts = bench.in(std::vector<int32_t>{t});
    const Out y = bench.out(8);
    CHECK_THROWS_AS(bench.run(backend->time_embedding(d, ts, y)), Error);
  }
  CHECK_THROWS_AS(backend->time_embedding({.n = 1, .dim = 2}, {0}, {1}), Error);
}

TEST_CASE("simt.time_embedding: a timestep outside the schedule is NaN", "[time_embedding]") {
  const auto backend = test::make_kernel_backend(DType::kF32);
  test::Bench bench(*backend);
  const In ts = bench.in(std::vector<int32_t>{-1, 9, 10, -(1 << 30)});
  const Out y = bench.out(4 * 8);
  bench.run(backend->time_embedding({.n = 4, .dim = 8, .timesteps = 10}, ts, y));
  const auto values = bench.get(y);
  for (size_t i = 0; i < values.size(); ++i) CHECK(std::isnan(values[i]) == (i / 8 != 1));
  CHECK_THROWS_AS(backend->time_embedding({.n = 1, .dim = 2}, {0}, {1}), Error);
  CHECK_THROWS_AS(backend->embedding(0, 4, 3, {0}, {1}, {2}, Write::kOverwrite), Error);
  CHECK_THROWS_AS(backend->embedding_backward(1, 0, 3, {0}, {1}, {2}, Write::kOverwrite), Error);
}

namespace {

void check_step_row(Backend& backend) {
  for (const int n : {1, 2, 7, 64})
    for (const int rows : {1, 3, 50})
      for (const int dim : {1, 6, 16, 67, 260})
        for (const uint64_t step : {0, rows / 2, rows - 1}) {
          const auto table = random_values(int64_t{rows} * dim, 1);
          test::Bench bench(backend);
          const In ts = bench.in(table), state = bench.state({.step = step});
          const Out y = bench.out(int64_t{n} * dim);
          bench.run(backend.step_row(n, rows, dim, ts, state, y));
          INFO("n " << n << " rows " << rows << " dim " << dim << " step " << step);
          CHECK(relative_error(bench.get(y), ref::step_row(n, dim, to_double(table), step)) == 0);
        }
  CHECK_THROWS_AS(backend.step_row(1, 4, 0, {0}, {1}, {2}), Error);
}

}  // namespace

TEST_CASE("step_row: the row of the step for all images", "[step_row]") {
  check_step_row(*make_cpu_backend({.threads = 2}));
}
TEST_CASE("simt.step_row: the row of the step for all images", "[step_row]") {
  check_step_row(*test::make_kernel_backend(DType::kF32));
}

TEST_CASE("step_row: a step behind the table is refused", "[step_row]") {
  const auto backend = make_cpu_backend({});
  test::Bench bench(*backend);
  const In table = bench.in(random_values(12, 1)), state = bench.state({.step = 4});
  const Out y = bench.out(3);
  CHECK_THROWS_AS(bench.run(backend->step_row(1, 4, 3, table, state, y)), Error);
}
TEST_CASE("simt.step_row: a step behind the table is NaN", "[step_row]") {
  const auto backend = test::make_kernel_backend(DType::kF32);
  test::Bench bench(*backend);
  const In table = bench.in(random_values(12, 1)), state = bench.state({.step = 4});
  const Out y = bench.out(6);
  bench.run(backend->step_row(2, 4, 3, table, state, y));
  for (const float v : bench.get(y)) CHECK(std::isnan(v));
}
