// ReLU, pooling and resizing of a backend against the reference.
#include <catch2/catch.hpp>

#include <cmath>
#include <limits>

#include "tests/kernel_backend.h"
#include "tests/reference/pooling.h"
#include "tests/simt/machine.h"
#include "tests/support.h"

using namespace ddpm;
using test::random_values;
using test::relative_error;
using test::to_double;

namespace {

constexpr DType kTypes[] = {DType::kF32, DType::kBF16};
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

// y's columns for a result of C channels: alone, before others and behind others.
std::vector<Columns> places(int c) { return {{c, 0}, {c + 8, 0}, {2 * c + 3, c + 3}, {c + 8, 8}}; }

// Runs call(x, y) and returns y's columns. The rest of y must be left as it was.
template <typename MakeCall>
std::vector<float> run_into(Backend& backend, const std::vector<float>& x, const Shape& y,
                            const Columns& to, const MakeCall& make) {
  test::Bench bench(backend);
  const In in = bench.activation(x);
  const auto channels = static_cast<size_t>(to.channels), c = static_cast<size_t>(y.c);
  const auto offset = static_cast<size_t>(to.offset);
  const Out out = bench.activation_inout(
      std::vector<float>(static_cast<size_t>(y.count()) / c * channels, 42.0f));
  bench.run(make(in, out));
  std::vector<float> mine;
  int64_t touched = 0;
  const std::vector<float> all = bench.get_activation(out);
  for (size_t i = 0; i < all.size(); ++i) {
    const size_t column = i % channels;
    if (column >= offset && column < offset + c)
      mine.push_back(all[i]);
    else
      touched += all[i] != 42.0f;
  }
  CHECK(touched == 0);
  return mine;
}

const std::vector<Shape> kShapes = {
    {1, 1, 1, 1},   {1, 1, 1, 7},   {2, 1, 3, 16},  {1, 3, 1, 5},   {3, 2, 5, 7},
    {1, 4, 4, 15},  {2, 4, 4, 16},  {1, 5, 3, 33},  {5, 3, 3, 20},  {1, 7, 7, 64},
    {2, 8, 8, 32},  {1, 2, 2, 128}, {1, 11, 2, 6},  {9, 1, 1, 12},  {4, 4, 4, 48},
    {1, 1, 31, 2},  {1, 37, 1, 3},  {2, 9, 6, 65},  {1, 16, 16, 4}, {1, 13, 17, 40},
    {2, 5, 5, 96},  {1, 3, 3, 129}, {1, 4, 4, 256}, {8, 2, 2, 10},  {1, 23, 1, 25},
    {3, 1, 19, 24}, {1, 1, 41, 31}, {2, 10, 3, 1},  {1, 9, 32, 37}, {2, 12, 32, 18}};

void check_relu(Backend& backend) {
  for (const Shape& s : kShapes) {
    std::vector<float> x = test::rounded(backend, random_values(s.count(), 1, 1e4f));
    for (const Columns& to : places(s.c)) {
      INFO(to_string(s) << " at " << to.offset << " of " << to.channels);
      const auto y =
          run_into(backend, x, s, to, [&](In in, Out out) { return backend.relu(s, in, out, to); });
      CHECK(relative_error(y, ref::relu(to_double(x))) == 0);
    }
  }
  const Shape s{1, 1, 1, 24};
  std::vector<float> x(24, -1);
  x[3] = x[20] = kNan;
  x[5] = INFINITY;
  x[6] = -INFINITY;
  const auto y = run_into(backend, x, s, {24, 0}, [&](In in, Out out) {
    return backend.relu(s, in, out, {24, 0});
  });
  for (size_t i = 0; i < 24; ++i) {
    INFO(i);
    if (i == 3 || i == 20)
      CHECK(std::isnan(y[i]));
    else
      CHECK(y[i] == (i == 5 ? INFINITY : 0.0f));
  }
}

// The windows of Inception-v3, and some that are not square or larger than the image.
std::vector<PoolDesc> windows(const Shape& x) {
  std::vector<PoolDesc> all;
  for (const bool average : {false, true}) {
    all.push_back({x, average, 3, 3, 2, 0});
    all.push_back({x, average, 3, 3, 1, 1});
    all.push_back({x, average, x.h, x.w, 1, 0});
    all.push_back({x, average, 2, 5, 3, 1});
    all.push_back({x, average, 4, 3, 2, 2});
  }
  std::erase_if(all, [](const PoolDesc& d) { return !d.valid(); });
  return all;
}

void check_pool(Backend& backend) {
  const bool narrow = backend.compute_type() == DType::kBF16;
  for (const Shape& s : kShapes) {
    const auto x = test::rounded(backend, random_values(s.count(), 1, 30.0f, -5.0f));
    size_t turn = 0;
    for (const PoolDesc& d : windows(s)) {
      const Columns to = places(s.c)[turn++ % 4];
      INFO(to_string(s) << " by " << d.r << "x" << d.s << " stride " << d.stride << " pad " << d.pad
                        << (d.average ? " average" : " max"));
      const auto y = run_into(backend, x, d.y(), to,
                              [&](In in, Out out) { return backend.pool(d, in, out, to); });
      const auto expected = ref::pool(d, to_double(x));
      // Up to a few hundred additions of 2^-24 each, on values that partly cancel; then a rounding.
      CHECK(relative_error(y, expected) <= (d.average ? 2e-6 + (narrow ? 0x1p-8 : 0) : 0));
    }
  }
}

void check_pool_nan(Backend& backend) {
  const Shape s{1, 3, 3, 8};
  for (const bool average : {false, true})
    for (size_t at = 0; at < 9; ++at) {
      std::vector<float> x(72, 2.0f);
      x[at * 8 + 1] = kNan;
      const PoolDesc d{s, average, 3, 3, 1, 0};
      const auto y = run_into(backend, x, d.y(), {8, 0}, [&](In in, Out out) {
        return backend.pool(d, in, out, {8, 0});
      });
      INFO(at);
      CHECK(std::isnan(y[1]));
      CHECK(y[0] == 2.0f);
    }
}

void check_resize(Backend& backend) {
  struct Case {
    Shape x;
    int h, w;
  };
  const std::vector<Case> cases = {
      {{1, 1, 1, 1}, 1, 1},    {{1, 1, 1, 3}, 5, 4},     {{2, 2, 2, 3}, 3, 3},
      {{1, 3, 5, 3}, 7, 11},   {{1, 8, 8, 3}, 29, 29},   {{2, 7, 3, 1}, 14, 9},
      {{1, 9, 9, 4}, 9, 9},    {{1, 31, 17, 3}, 8, 5},   {{1, 5, 5, 2}, 4, 6},
      {{3, 4, 6, 16}, 10, 10}, {{1, 2, 9, 33}, 5, 3},    {{1, 13, 1, 5}, 3, 8},
      {{1, 1, 12, 7}, 6, 5},   {{2, 6, 6, 20}, 3, 12},   {{1, 16, 16, 3}, 15, 17},
      {{1, 40, 30, 3}, 3, 2},  {{1, 3, 3, 64}, 4, 4},    {{1, 10, 4, 9}, 11, 13},
      {{5, 2, 3, 3}, 7, 2},    {{1, 6, 2, 31}, 2, 6},    {{1, 19, 23, 1}, 7, 7},
      {{1, 4, 4, 8}, 1, 1},    {{1, 2, 2, 1}, 31, 1},    {{1, 7, 7, 6}, 21, 21},
      {{2, 3, 4, 12}, 6, 8},   {{1, 11, 13, 2}, 12, 12}, {{1, 5, 9, 17}, 9, 5},
      {{1, 64, 2, 3}, 5, 20},  {{1, 2, 64, 3}, 20, 5},   {{4, 5, 5, 3}, 13, 13}};
  for (const Case& c : cases) {
    const auto x = random_values(c.x.count(), 1);
    test::Bench bench(backend);
    const In in = bench.in(x);
    const Out out = bench.activation_out(int64_t{c.x.n} * c.h * c.w * c.x.c);
    bench.run(backend.resize(c.x, c.h, c.w, in, out));
    INFO(to_string(c.x) << " to " << c.h << "x" << c.w);
    // Weights to 2^-24, three roundings of a value; then one to 8 bits.
    CHECK(relative_error(bench.get_activation(out), ref::resize(c.x, c.h, c.w, to_double(x))) <=
          (backend.compute_type() == DType::kBF16 ? 0x1p-8 : 3e-7));
  }
}

void check_refused(Backend& backend) {
  CHECK_THROWS_AS(backend.relu({1, 2, 2, 4}, {0}, {1}, {4, 1}), Error);
  CHECK_THROWS_AS(backend.relu({1, 2, 2, 4}, {0}, {1}, {8, -1}), Error);
  CHECK_THROWS_AS(backend.pool({{1, 2, 2, 4}}, {0}, {1}, {4, 0}), Error);  // 3x3 without pad
  CHECK_THROWS_AS(backend.pool({{1, 4, 4, 4}, true, 3, 3, 1, 3}, {0}, {1}, {4, 0}), Error);
  CHECK_THROWS_AS(backend.pool({{1, 4, 4, 4}, true, 3, 3, 0, 1}, {0}, {1}, {4, 0}), Error);
  CHECK_THROWS_AS(backend.pool({{1, 4, 4, 4}}, {0}, {1}, {3, 0}), Error);
  CHECK_THROWS_AS(backend.resize({1, 0, 2, 3}, 4, 4, {0}, {1}), Error);
  CHECK_THROWS_AS(backend.resize({1, 2, 2, 3}, 4, 0, {0}, {1}), Error);
}

}  // namespace

TEST_CASE("relu: to the bit, into columns", "[pooling]") {
  check_relu(*make_cpu_backend({.threads = 2}));
}
TEST_CASE("simt.relu: to the bit, into columns", "[pooling]") {
  for (DType type : kTypes) check_relu(*test::make_kernel_backend(type));
}
TEST_CASE("pool: largest and mean of what lies in the image", "[pooling]") {
  check_pool(*make_cpu_backend({.threads = 2}));
}
TEST_CASE("simt.pool: largest and mean of what lies in the image", "[pooling]") {
  for (DType type : kTypes) check_pool(*test::make_kernel_backend(type));
}
TEST_CASE("pool: a NaN is not lost", "[pooling]") { check_pool_nan(*make_cpu_backend({})); }
TEST_CASE("simt.pool: a NaN is not lost", "[pooling]") {
  for (DType type : kTypes) check_pool_nan(*test::make_kernel_backend(type));
}
TEST_CASE("resize: between pixel centres", "[pooling]") {
  check_resize(*make_cpu_backend({.threads = 2}));
}
TEST_CASE("simt.resize: between pixel centres", "[pooling]") {
  for (DType type : kTypes) check_resize(*test::make_kernel_backend(type));
}
TEST_CASE("pooling: wrong shapes are refused", "[pooling]") {
  check_refused(*make_cpu_backend({}));
}
TEST_CASE("simt.pooling: wrong shapes are refused", "[pooling]") {
  check_refused(*test::make_kernel_backend(DType::kBF16));
}
