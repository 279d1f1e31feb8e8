// Statistics and sums of a backend against the reference.
#include <catch2/catch.hpp>

#include "tests/reference/difference.h"
#include "tests/reference/reduce.h"
#include "tests/support.h"

using namespace ddpm;
using test::random_values;
using test::relative_error;
using test::to_double;

namespace {

const std::vector<Shape> kShapes = {
    {1, 1, 1, 1},    {1, 1, 1, 5},   {2, 1, 3, 3},    {1, 7, 1, 16},  {3, 5, 5, 17},
    {1, 8, 8, 15},   {2, 8, 8, 32},  {1, 9, 9, 33},   {5, 3, 11, 20}, {1, 13, 7, 64},
    {2, 16, 16, 65}, {1, 2, 2, 128}, {1, 31, 3, 7},   {32, 1, 1, 12}, {7, 4, 4, 96},
    {1, 1, 127, 2},  {1, 129, 1, 3}, {2, 16, 8, 129}, {1, 32, 32, 4}, {4, 6, 6, 48},
    {1, 17, 19, 80}, {2, 5, 5, 256}, {1, 3, 3, 511},  {1, 4, 4, 512}, {8, 2, 2, 40},
    {1, 23, 1, 100}, {3, 1, 64, 24}, {1, 1, 65, 31},  {2, 10, 13, 1}, {2, 33, 32, 66}};

// Largest relative error of the second moments; of the means, relative to the tile's spread.
struct StatsError {
  double mean = 0, m2 = 0;
};

std::vector<float> run_stats(const StatsDesc& d, const std::vector<float>& x, int threads = 2) {
  const auto backend = make_cpu_backend({.threads = threads});
  test::Bench bench(*backend);
  const In xs = bench.in(x);
  const Out stats = bench.out(d.count());
  bench.run(backend->channel_stats(d, xs, stats));
  return bench.get(stats);
}

StatsError stats_error(const StatsDesc& d, const std::vector<float>& x) {
  const auto got = run_stats(d, x);
  const auto expected = ref::channel_stats(d, to_double(x));
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

}  // namespace

TEST_CASE("channel_stats: many shapes and tiles", "[reduce]") {
  for (const Shape& s : kShapes)
    for (const int tile : {1, 7, 64}) {
      const StatsDesc d{s, tile};
      INFO(to_string(s) << " tile " << tile);
      const auto x = random_values(s.count(), 1);
      CHECK(relative_error(run_stats(d, x), ref::channel_stats(d, to_double(x))) <= 5e-7);
    }
}

// A mean rounds to its own last bit, 6e-8; then M2 is off by the square of 6e-5 of a deviation.
TEST_CASE("channel_stats: a mean a thousand deviations from zero", "[reduce]") {
  for (const float scale : {1e-4f, 1.0f, 1e4f})
    for (const Shape& s : {Shape{2, 16, 16, 20}, Shape{1, 9, 9, 129}, Shape{1, 32, 32, 3}}) {
      INFO(to_string(s) << " scale " << scale);
      const auto x = random_values(s.count(), 1, 1.732f * scale, -1000 * scale);
      const StatsError e = stats_error({s, 64}, x);
      CHECK(e.mean <= 1.2e-7);
      CHECK(e.m2 <= 1e-5);
    }
}

TEST_CASE("channel_stats: constants have no variance, outliers in the first pixel no effect",
          "[reduce]") {
  const StatsDesc d{{1, 8, 8, 21}, 64};
  const auto constant = run_stats(d, std::vector<float>(64 * 21, 0.1f));
  for (size_t i = 1; i < constant.size(); i += 2) CHECK(constant[i] <= 64 * 6e-17f);
  auto x = random_values(64 * 21, 1);
  for (size_t c = 0; c < 21; ++c) x[c] = 1e4f;
  CHECK(stats_error(d, x).m2 <= 1e-5);
}

TEST_CASE("channel_stats: the same bits for any number of threads", "[reduce]") {
  const StatsDesc d{{3, 40, 40, 24}, 64};
  const auto x = random_values(d.x.count(), 1);
  CHECK((run_stats(d, x, 1) == run_stats(d, x, 3)));
}

TEST_CASE("pixel_sum: many shapes, into a column of a wider matrix", "[reduce]") {
  const auto backend = make_cpu_backend({.threads = 2});
  for (const Shape& s : kShapes)
    for (const int extra : {0, 5}) {
      const int stride = s.c + 2 * extra;
      const auto x = random_values(s.count(), 1, 1, 0.5f);  // sums far from 0
      const auto before = random_values(int64_t{s.n} * stride, 2);
      test::Bench bench(*backend);
      const In xs = bench.in(x);
      const Out sums = bench.inout(before);
      bench.run(backend->pixel_sum(s, xs, sums, stride, extra));
      const auto expected = ref::pixel_sum(s, to_double(x));
      std::vector<float> got;
      INFO(to_string(s) << " stride " << stride);
      for (int n = 0; n < s.n; ++n)
        for (int c = 0; c < stride; ++c) {
          const float v = bench.get(sums)[static_cast<size_t>(n * stride + c)];
          if (c >= extra && c < extra + s.c)
            got.push_back(v);
          else
            CHECK(v == before[static_cast<size_t>(n * stride + c)]);
        }
      // Rounding of a sum of random signs grows with the square root of its length.
      CHECK(relative_error(got, expected) <= 1e-7 * (2 + std::sqrt(s.pixels())));
    }
}

TEST_CASE("row_sum: many shapes, both write modes, columns of a wider matrix", "[reduce]") {
  const auto backend = make_cpu_backend({.threads = 2});
  for (const Shape& s : kShapes)
    for (const Write write : {Write::kOverwrite, Write::kAccumulate})
      for (const int extra : {0, 3}) {
        const int rows = static_cast<int>(s.n * s.pixels()), stride = s.c + 2 * extra;
        const auto x = random_values(int64_t{rows} * stride, 1, 1, 0.5f);
        const auto before = random_values(s.c, 2);
        test::Bench bench(*backend);
        const In xs = bench.in(x);
        const Out sums = write == Write::kAccumulate ? bench.inout(before) : bench.out(s.c);
        bench.run(backend->row_sum(rows, s.c, stride, extra, DType::kF32, xs, sums, write));
        auto expected = ref::row_sum(rows, s.c, stride, extra, to_double(x));
        if (write == Write::kAccumulate)
          for (size_t c = 0; c < expected.size(); ++c)
            expected[c] += static_cast<double>(before[c]);
        INFO(rows << " rows of " << s.c << " of " << stride);
        CHECK(relative_error(bench.get(sums), expected) <= 1e-7 * (2 + std::sqrt(rows)));
      }
}

TEST_CASE("row_sum: the same bits for any number of threads", "[reduce]") {
  const auto x = random_values(5000 * 40, 1, 1e4f);
  std::vector<std::vector<float>> results;
  for (const int threads : {1, 2, 5}) {
    const auto backend = make_cpu_backend({.threads = threads});
    test::Bench bench(*backend);
    const In xs = bench.in(x);
    const Out sums = bench.out(40);
    bench.run(backend->row_sum(5000, 40, 40, 0, DType::kF32, xs, sums, Write::kOverwrite));
    results.push_back(bench.get(sums));
  }
  CHECK((results[0] == results[1]));
  CHECK((results[0] == results[2]));
}

TEST_CASE("reduce: wrong shapes are refused", "[reduce]") {
  const auto backend = make_cpu_backend({});
  CHECK_THROWS_AS(backend->channel_stats({{1, 0, 4, 4}, 64}, {0}, {1}), Error);
  CHECK_THROWS_AS(backend->channel_stats({{1, 4, 4, 4}, 0}, {0}, {1}), Error);
  CHECK_THROWS_AS(backend->pixel_sum({1, 4, 4, 4}, {0}, {1}, 3, 0), Error);
  CHECK_THROWS_AS(backend->row_sum(4, 4, 5, 2, DType::kF32, {0}, {1}, Write::kOverwrite), Error);
}
