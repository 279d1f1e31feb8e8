// Statistics and sums of a backend against the reference.
#include <catch2/catch.hpp>

#include "tests/kernel_backend.h"
#include "tests/reference/difference.h"
#include "tests/reference/reduce.h"
#include "tests/simt/machine.h"
#include "tests/support.h"

using namespace ddpm;
using test::random_values;
using test::relative_error;
using test::rounded;
using test::to_double;

namespace {

const std::vector<Shape> kShapes = {
    {1, 1, 1, 1},    {1, 1, 1, 5},   {2, 1, 3, 3},    {1, 7, 1, 16},  {3, 5, 5, 17},
    {1, 8, 8, 15},   {2, 8, 8, 32},  {1, 9, 9, 33},   {5, 3, 11, 20}, {1, 13, 7, 64},
    {2, 16, 16, 65}, {1, 2, 2, 128}, {1, 31, 3, 7},   {32, 1, 1, 12}, {7, 4, 4, 96},
    {1, 1, 127, 2},  {1, 129, 1, 3}, {2, 16, 8, 129}, {1, 32, 32, 4}, {4, 6, 6, 48},
    {1, 17, 19, 80}, {2, 5, 5, 256}, {1, 3, 3, 511},  {1, 4, 4, 512}, {8, 2, 2, 40},
    {1, 23, 1, 100}, {3, 1, 64, 24}, {1, 1, 65, 31},  {2, 10, 13, 1}, {2, 33, 32, 66}};

constexpr DType kTypes[] = {DType::kF32, DType::kBF16};

// Largest relative error of the second moments; of the means, relative to the tile's spread.
struct StatsError {
  double mean = 0, m2 = 0;
};

// x is rounded to what the backend's activations can hold.
std::vector<float> run_stats(Backend& backend, const StatsDesc& d, const std::vector<float>& x) {
  test::Bench bench(backend);
  const In xs = bench.activation(x);
  const Out stats = bench.out(d.count());
  bench.run(backend.channel_stats(d, xs, stats));
  return bench.get(stats);
}

StatsError stats_error(Backend& backend, const StatsDesc& d, const std::vector<float>& x) {
  const auto got = run_stats(backend, d, x);
  const auto expected = ref::channel_stats(d, to_double(rounded(backend, x)));
  REQUIRE(got.size() == expected.size());
  StatsError e;
  for (size_t i = 0; i < got.size(); i += 2) {
    REQUIRE(std::isfinite(got[i]));
    REQUIRE(std::isfinite(got[i + 1]));
    e.mean = std::max(e.mean, std::abs(got[i] - expected[i]) / (std::abs(expected[i]) + 1e-30));
    if (expected[i + 1] > 0)
      e.m2 = std::max(e.m2, std::abs(got[i + 1] - expected[i + 1]) / expected[i + 1]);
    else
      CHECK(got[i + 1] == 0);
  }
  return e;
}

// most: of blocks; a tile of one pixel makes many.
void check_stats(Backend& backend, int64_t most) {
  for (const Shape& s : kShapes)
    for (const int tile : {1, 7, 64}) {
      const StatsDesc d{s, tile};
      if (s.n * d.tiles() > most) continue;
      INFO(to_string(s) << " tile " << tile);
      const auto x = rounded(backend, random_values(s.count(), 1));
      CHECK(relative_error(run_stats(backend, d, x), ref::channel_stats(d, to_double(x))) <= 5e-7);
    }
}

// A mean rounds to its own last bit, 6e-8; then M2 is off by the square of 6e-5 of a deviation.
// bf16 can hold a mean of thirty deviations at most.
void check_stats_offset(Backend& backend, float deviations) {
  for (const float scale : {1e-4f, 1.0f, 1e4f})
    for (const Shape& s : {Shape{2, 16, 16, 20}, Shape{1, 9, 9, 129}, Shape{1, 32, 32, 3}}) {
      INFO(to_string(s) << " scale " << scale);
      const auto x = random_values(s.count(), 1, 1.732f * scale, -deviations * scale);
      const StatsError e = stats_error(backend, {s, 64}, x);
      CHECK(e.mean <= 1.2e-7);
      CHECK(e.m2 <= 1e-5);
    }
}

void check_stats_extremes(Backend& backend) {
  for (const int channels : {21, 40}) {
    const StatsDesc d{{1, 8, 8, channels}, 64};
    const auto c = static_cast<size_t>(channels);
    const auto constant = run_stats(backend, d, std::vector<float>(64 * c, 0.1f));
    for (size_t i = 1; i < constant.size(); i += 2) CHECK(constant[i] <= 64 * 6e-17f);
    auto x = random_values(static_cast<int64_t>(64 * c), 1);
    for (size_t i = 0; i < c; ++i) x[i] = 1e4f;
    CHECK(stats_error(backend, d, x).m2 <= 1e-5);
  }
}

// Rounding of a sum of random signs grows with the square root of its length.
double sum_tolerance(double length) { return 1e-7 * (2 + std::sqrt(length)); }

void check_pixel_sum(Backend& backend) {
  for (const Shape& s : kShapes)
    for (const int extra : {0, 5}) {
      const int stride = s.c + 2 * extra;
      const auto x = rounded(backend, random_values(s.count(), 1, 1, 0.5f));  // sums far from 0
      const auto before = random_values(int64_t{s.n} * stride, 2);
      test::Bench bench(backend);
      const In xs = bench.activation(x);
      const Out sums = bench.inout(before);
      bench.run(backend.pixel_sum(s, xs, sums, stride, extra));
      const auto expected = ref::pixel_sum(s, to_double(x)), all = to_double(bench.get(sums));
      std::vector<double> got;
      INFO(to_string(s) << " stride " << stride);
      for (int n = 0; n < s.n; ++n)
        for (int c = 0; c < stride; ++c) {
          const auto i = static_cast<size_t>(n * stride + c);
          if (c >= extra && c < extra + s.c)
            got.push_back(all[i]);
          else
            CHECK(all[i] == static_cast<double>(before[i]));
        }
      CHECK(relative_error(got, expected) <= sum_tolerance(static_cast<double>(s.pixels())));
    }
}

std::vector<float> run_row_sum(Backend& backend, int rows, int columns, int stride, int offset,
                               DType type, const std::vector<float>& x,
                               const std::vector<float>& before, Write write) {
  test::Bench bench(backend);
  std::vector<bf16> narrow;
  for (const float v : x) narrow.push_back(to_bf16(v));
  const In xs = type == DType::kBF16 ? bench.in(narrow) : bench.in(x);
  const Out sums = write == Write::kAccumulate ? bench.inout(before) : bench.out(columns);
  bench.run(backend.row_sum(rows, columns, stride, offset, type, xs, sums, write));
  return bench.get(sums);
}

// Odd columns at odd offsets, and multiples of eight.
void check_row_sum(Backend& backend, DType type) {
  for (const Shape& s : kShapes)
    for (const Write write : {Write::kOverwrite, Write::kAccumulate})
      for (const int extra : {0, 3, 8}) {
        const int rows = static_cast<int>(s.n * s.pixels()), stride = s.c + 2 * extra;
        auto x = random_values(int64_t{rows} * stride, 1, 1, 0.5f);
        if (type == DType::kBF16)
          for (float& v : x) v = to_float(to_bf16(v));
        const auto before = random_values(s.c, 2);
        auto expected = ref::row_sum(rows, s.c, stride, extra, to_double(x));
        if (write == Write::kAccumulate)
          for (size_t c = 0; c < expected.size(); ++c)
            expected[c] += static_cast<double>(before[c]);
        INFO(rows << " rows of " << s.c << " of " << stride);
        CHECK(relative_error(run_row_sum(backend, rows, s.c, stride, extra, type, x, before, write),
                             expected) <= sum_tolerance(rows));
      }
}

void check_refusals(Backend& backend) {
  CHECK_THROWS_AS(backend.channel_stats({{1, 0, 4, 4}, 64}, {0}, {1}), Error);
  CHECK_THROWS_AS(backend.channel_stats({{1, 4, 4, 4}, 0}, {0}, {1}), Error);
  CHECK_THROWS_AS(backend.pixel_sum({1, 4, 4, 4}, {0}, {1}, 3, 0), Error);
  CHECK_THROWS_AS(backend.pixel_sum({1, 4, 4, 4}, {0}, {1}, 8, -1), Error);
  CHECK_THROWS_AS(backend.row_sum(4, 4, 5, 2, DType::kF32, {0}, {1}, Write::kOverwrite), Error);
  CHECK_THROWS_AS(backend.row_sum(4, 4, 4, 0, DType::kI32, {0}, {1}, Write::kOverwrite), Error);
}

// All shapes of the two networks: channels and the resolutions they are met at.
std::vector<Shape> network_shapes() {
  std::vector<Shape> shapes;
  const auto add = [&](int size, std::initializer_list<int> channels) {
    for (const int c : channels) shapes.push_back({1, size, size, c});
  };
  add(32, {128, 256, 384, 512, 768});
  add(16, {128, 256, 384, 512, 768, 1024});
  add(8, {256, 512, 1024});
  add(4, {256, 512});
  add(64, {128, 256, 384, 512});
  add(128, {128, 256});
  add(256, {128, 256});
  return shapes;
}

// Many values from few, since the largest tensors are large.
struct Repeated {
  std::vector<bf16> narrow;
  std::vector<double> base;

  explicit Repeated(int64_t count) : narrow(static_cast<size_t>(count)) {
    const auto values = random_values(65521, 1, 1, 0.3f);
    for (const float v : values) base.push_back(static_cast<double>(to_float(to_bf16(v))));
    std::vector<bf16> piece;
    for (const float v : values) piece.push_back(to_bf16(v));
    for (size_t i = 0; i < narrow.size(); i += piece.size())
      std::copy_n(piece.begin(), std::min(piece.size(), narrow.size() - i),
                  narrow.begin() + static_cast<int64_t>(i));
  }
  double operator[](int64_t i) const { return base[static_cast<size_t>(i) % base.size()]; }
};

}  // namespace

TEST_CASE("channel_stats: many shapes and tiles", "[reduce]") {
  check_stats(*make_cpu_backend({.threads = 2}), INT64_MAX);
}
TEST_CASE("simt.channel_stats: many shapes and tiles", "[reduce]") {
  for (const DType type : kTypes) check_stats(*test::make_kernel_backend(type), 100);
}

TEST_CASE("channel_stats: a mean a thousand deviations from zero", "[reduce]") {
  check_stats_offset(*make_cpu_backend({.threads = 2}), 1000);
}
TEST_CASE("simt.channel_stats: a mean a thousand deviations from zero", "[reduce]") {
  check_stats_offset(*test::make_kernel_backend(DType::kF32), 1000);
  check_stats_offset(*test::make_kernel_backend(DType::kBF16), 30);
}

TEST_CASE("channel_stats: constants have no variance, outliers in the first pixel no effect",
          "[reduce]") {
  check_stats_extremes(*make_cpu_backend({.threads = 2}));
}
TEST_CASE("simt.channel_stats: constants have no variance, outliers in the first pixel no effect",
          "[reduce]") {
  for (const DType type : kTypes) check_stats_extremes(*test::make_kernel_backend(type));
}

TEST_CASE("channel_stats: the same bits for any number of threads", "[reduce]") {
  const StatsDesc d{{3, 40, 40, 24}, 64};
  const auto x = random_values(d.x.count(), 1);
  CHECK((run_stats(*make_cpu_backend({.threads = 1}), d, x) ==
         run_stats(*make_cpu_backend({.threads = 3}), d, x)));
}

TEST_CASE("pixel_sum: many shapes, into a column of a wider matrix", "[reduce]") {
  check_pixel_sum(*make_cpu_backend({.threads = 2}));
}
TEST_CASE("simt.pixel_sum: many shapes, into a column of a wider matrix", "[reduce]") {
  for (const DType type : kTypes) check_pixel_sum(*test::make_kernel_backend(type));
}

TEST_CASE("row_sum: many shapes, both write modes, columns of a wider matrix", "[reduce]") {
  check_row_sum(*make_cpu_backend({.threads = 2}), DType::kF32);
}
TEST_CASE("simt.row_sum: many shapes, both types and write modes, columns of a wider matrix",
          "[reduce]") {
  const auto backend = test::make_kernel_backend(DType::kBF16);
  for (const DType type : kTypes) check_row_sum(*backend, type);
}

TEST_CASE("row_sum: the same bits for any number of threads", "[reduce]") {
  const auto x = random_values(5000 * 40, 1, 1e4f);
  const auto sums = [&](Backend& backend, DType type) {
    return run_row_sum(backend, 5000, 40, 40, 0, type, x, {}, Write::kOverwrite);
  };
  const auto one = sums(*make_cpu_backend({.threads = 1}), DType::kF32);
  for (const int threads : {2, 5})
    CHECK((one == sums(*make_cpu_backend({.threads = threads}), DType::kF32)));
}
TEST_CASE("simt.reduce: the same bits in any order of warps and blocks", "[reduce]") {
  const auto backend = test::make_kernel_backend(DType::kBF16);
  const Shape s{3, 40, 40, 24};
  const auto x = random_values(s.count(), 1, 1e4f);
  const auto all = [&](uint64_t seed) {
    simt::options().seed = seed;
    test::Bench bench(*backend);
    const In xs = bench.activation(x);
    const Out sums = bench.out(s.n * s.c);
    bench.run(backend->pixel_sum(s, xs, sums, s.c, 0));
    auto values = bench.get(sums);
    for (const auto& more :
         {run_stats(*backend, {s, 64}, x),
          run_row_sum(*backend, 4800, 24, 24, 0, DType::kF32, x, {}, Write::kOverwrite)})
      values.insert(values.end(), more.begin(), more.end());
    simt::options().seed = 0;
    return values;
  };
  CHECK((all(0) == all(77)));
}
TEST_CASE("simt.pixel_sum: an image's bits do not depend on the batch", "[reduce]") {
  const auto backend = test::make_kernel_backend(DType::kBF16);
  const Shape all{5, 20, 20, 24}, one{1, 20, 20, 24};
  auto x = random_values(all.count(), 1);
  const auto sums = [&](const Shape& s) {
    test::Bench bench(*backend);
    x.resize(static_cast<size_t>(s.count()));
    const In xs = bench.activation(x);
    const Out y = bench.out(s.n * s.c);
    bench.run(backend->pixel_sum(s, xs, y, s.c, 0));
    return bench.get(y);
  };
  const auto of_all = sums(all), of_one = sums(one);
  CHECK(std::equal(of_one.begin(), of_one.end(), of_all.begin()));
}

// Some tiles of each.
TEST_CASE("simt.channel_stats: the networks' shapes", "[reduce]") {
  const auto backend = test::make_kernel_backend(DType::kBF16);
  simt::options().max_blocks = 6;
  for (const Shape& s : network_shapes()) {
    const StatsDesc d{s, 64};
    const Repeated x(s.count());
    test::Bench bench(*backend);
    const In xs = bench.in(x.narrow);
    const Out stats = bench.out(d.count());
    bench.run(backend->channel_stats(d, xs, stats));
    const auto got = bench.get(stats);
    int64_t written = 0, wrong = 0;
    for (int64_t i = 0; i < d.count() / 2; ++i) {
      if (std::isnan(got[static_cast<size_t>(2 * i)])) continue;
      const int64_t first = i / s.c * 64, last = std::min(first + 64, s.pixels());
      double mean = 0, m2 = 0;
      const auto value = [&](int64_t p) { return x[p * s.c + i % s.c]; };
      for (int64_t p = first; p < last; ++p) mean += value(p) / static_cast<double>(last - first);
      for (int64_t p = first; p < last; ++p) m2 += (value(p) - mean) * (value(p) - mean);
      ++written;
      // A few roundings of values of about 1.
      wrong += std::abs(got[static_cast<size_t>(2 * i)] - mean) > 3e-7 ||
               !(std::abs(got[static_cast<size_t>(2 * i + 1)] - m2) <= 2e-6 * m2);
    }
    INFO(to_string(s));
    CHECK(written >= 128);
    CHECK(wrong == 0);
  }
  simt::options().max_blocks = 0;
}

TEST_CASE("simt.pixel_sum: the networks' shapes", "[reduce]") {
  const auto backend = test::make_kernel_backend(DType::kBF16);
  for (const Shape& s : network_shapes()) {
    if (s.pixels() > 64 * 64) continue;  // more of the same runs
    const Repeated x(s.count());
    test::Bench bench(*backend);
    const In xs = bench.in(x.narrow);
    const Out sums = bench.out(s.c);
    bench.run(backend->pixel_sum(s, xs, sums, s.c, 0));
    INFO(to_string(s));
    ref::Vector expected(static_cast<size_t>(s.c), 0.0);
    for (int64_t i = 0; i < s.count(); ++i) expected[static_cast<size_t>(i % s.c)] += x[i];
    CHECK(relative_error(bench.get(sums), expected) <=
          sum_tolerance(static_cast<double>(s.pixels())));
  }
}

// Gradients of biases: of the time projections, and of attention's matrices at 16 x 16.
TEST_CASE("simt.row_sum: the networks' shapes", "[reduce]") {
  const auto backend = test::make_kernel_backend(DType::kBF16);
  for (const auto& [rows, columns, type] :
       {std::tuple{128, 512, DType::kF32}, std::tuple{128, 256, DType::kF32},
        std::tuple{2048, 768, DType::kBF16}, std::tuple{2048, 256, DType::kBF16},
        std::tuple{1024, 1536, DType::kBF16}}) {
    const auto x = rounded(*backend, random_values(int64_t{rows} * columns, 1));
    const auto got =
        run_row_sum(*backend, rows, columns, columns, 0, type, x, {}, Write::kOverwrite);
    INFO(rows << " rows of " << columns);
    CHECK(relative_error(got, ref::row_sum(rows, columns, columns, 0, to_double(x))) <=
          sum_tolerance(rows));
  }
}

TEST_CASE("reduce: wrong shapes are refused", "[reduce]") { check_refusals(*make_cpu_backend({})); }
TEST_CASE("simt.reduce: wrong shapes are refused", "[reduce]") {
  check_refusals(*test::make_kernel_backend(DType::kF32));
}
