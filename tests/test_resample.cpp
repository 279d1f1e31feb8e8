// Concatenation and upsampling of a backend against the reference.
#include <catch2/catch.hpp>

#include <cmath>

#include "tests/kernel_backend.h"
#include "tests/reference/difference.h"
#include "tests/reference/resample.h"
#include "tests/simt/machine.h"
#include "tests/support.h"

using namespace ddpm;
using test::random_values;
using test::relative_error;
using test::to_double;

namespace {

struct Case {
  Shape x;
  int c2;
};
const std::vector<Case> kCases = {
    {{1, 1, 1, 1}, 1},     {{1, 1, 1, 3}, 5},     {{2, 1, 3, 16}, 1},    {{1, 3, 1, 1}, 16},
    {{3, 2, 5, 7}, 9},     {{1, 4, 4, 15}, 17},   {{2, 4, 4, 16}, 16},   {{1, 5, 3, 33}, 31},
    {{5, 3, 3, 20}, 4},    {{1, 7, 7, 64}, 32},   {{2, 8, 8, 32}, 64},   {{1, 2, 2, 128}, 1},
    {{1, 11, 2, 6}, 13},   {{9, 1, 1, 12}, 12},   {{4, 4, 4, 48}, 24},   {{1, 1, 31, 2}, 2},
    {{1, 37, 1, 3}, 8},    {{2, 9, 6, 65}, 63},   {{1, 16, 16, 4}, 3},   {{1, 13, 17, 40}, 20},
    {{2, 5, 5, 96}, 160},  {{1, 3, 3, 129}, 127}, {{1, 4, 4, 256}, 128}, {{8, 2, 2, 10}, 30},
    {{1, 23, 1, 25}, 50},  {{3, 1, 19, 24}, 7},   {{1, 1, 41, 31}, 1},   {{2, 10, 3, 1}, 14},
    {{1, 29, 32, 37}, 19}, {{2, 32, 32, 18}, 14}};

constexpr Write kWrites[] = {Write::kOverwrite, Write::kAccumulate};

Out destination(test::Bench& bench, const std::vector<float>& before, Write write) {
  return write == Write::kAccumulate ? bench.activation_inout(before)
                                     : bench.activation_out(static_cast<int64_t>(before.size()));
}

std::vector<double> plus(std::vector<double> a, const std::vector<float>& b, Write write) {
  if (write == Write::kAccumulate)
    for (size_t i = 0; i < a.size(); ++i) a[i] += static_cast<double>(b[i]);
  return a;
}

std::vector<float> activations(Backend& backend, int64_t count, uint64_t seed, float scale = 1) {
  return test::rounded(backend, random_values(count, seed, scale));
}

std::vector<float> narrowed(Backend& backend, const std::vector<double>& v) {
  return test::rounded(backend, std::vector<float>(v.begin(), v.end()));
}

void check_concat(Backend& backend) {
  for (const auto& [s, c2] : kCases) {
    const int64_t count2 = s.count() / s.c * c2;
    const auto x = activations(backend, s.count(), 1, 1e4f), x2 = activations(backend, count2, 2);
    test::Bench bench(backend);
    const In a = bench.activation(x), b = bench.activation(x2);
    const Out y = bench.activation_out(s.count() + count2);
    bench.run(backend.concat(s, c2, a, b, y));
    INFO(to_string(s) << " and " << c2);
    CHECK(relative_error(bench.get_activation(y),
                         ref::concat(s, c2, to_double(x), to_double(x2))) == 0);
  }
}

void check_split(Backend& backend) {
  for (const auto& [s, c2] : kCases)
    for (const Write write : kWrites)
      for (const Write write2 : kWrites) {
        const Shape both{s.n, s.h, s.w, s.c + c2};
        const auto dy = activations(backend, both.count(), 1);
        const auto before = activations(backend, s.count(), 2);
        const auto before2 = activations(backend, both.count() - s.count(), 3);
        test::Bench bench(backend);
        const In dys = bench.activation(dy);
        const Out dx = destination(bench, before, write);
        const Out dx2 = destination(bench, before2, write2);
        bench.run(backend.split(s, c2, dys, dx, write, dx2, write2));
        INFO(to_string(s) << " and " << c2);
        // At most one addition, rounded once: the same bits.
        const auto expected = plus(ref::channels(both, to_double(dy), 0, s.c), before, write);
        CHECK((bench.get_activation(dx) == narrowed(backend, expected)));
        const auto expected2 = plus(ref::channels(both, to_double(dy), s.c, c2), before2, write2);
        CHECK((bench.get_activation(dx2) == narrowed(backend, expected2)));
      }
}

void check_upsample(Backend& backend) {
  for (const Case& c : kCases) {
    const auto x = activations(backend, c.x.count(), 1, 1e4f);
    test::Bench bench(backend);
    const In xs = bench.activation(x);
    const Out y = bench.activation_out(4 * c.x.count());
    bench.run(backend.upsample(c.x, xs, y));
    INFO(to_string(c.x));
    CHECK(relative_error(bench.get_activation(y), ref::upsample(c.x, to_double(x))) == 0);
  }
}

void check_upsample_backward(Backend& backend) {
  for (const Case& c : kCases)
    for (const Write write : kWrites) {
      const auto dy = activations(backend, 4 * c.x.count(), 1);
      const auto before = activations(backend, c.x.count(), 2);
      test::Bench bench(backend);
      const In dys = bench.activation(dy);
      const Out dx = destination(bench, before, write);
      bench.run(backend.upsample_backward(c.x, dys, dx, write));
      INFO(to_string(c.x));
      const auto expected = plus(ref::upsample_backward(c.x, to_double(dy)), before, write);
      // Four additions; then a rounding to 8 bits moves an element by at most 2^-8 of itself.
      const bool narrow = backend.compute_type() == DType::kBF16;
      CHECK(relative_error(bench.get_activation(dx), expected) <= 2e-7 + (narrow ? 0x1p-8 : 0));
    }
}

void check_refused(Backend& backend) {
  CHECK_THROWS_AS(backend.concat({1, 2, 2, 4}, 0, {0}, {1}, {2}), Error);
  CHECK_THROWS_AS(
      backend.split({1, 2, 0, 4}, 1, {0}, {1}, Write::kOverwrite, {2}, Write::kOverwrite), Error);
  CHECK_THROWS_AS(backend.upsample({1, 2, 2, 0}, {0}, {1}), Error);
  CHECK_THROWS_AS(backend.upsample_backward({0, 2, 2, 1}, {0}, {1}, Write::kOverwrite), Error);
}

constexpr DType kTypes[] = {DType::kF32, DType::kBF16};

}  // namespace

TEST_CASE("concat: joins channels, to the bit", "[resample]") {
  check_concat(*make_cpu_backend({.threads = 2}));
}
TEST_CASE("simt.concat: joins channels, to the bit", "[resample]") {
  for (DType type : kTypes) check_concat(*test::make_kernel_backend(type));
}
TEST_CASE("split: every pair of write modes", "[resample]") {
  check_split(*make_cpu_backend({.threads = 2}));
}
TEST_CASE("simt.split: every pair of write modes", "[resample]") {
  for (DType type : kTypes) check_split(*test::make_kernel_backend(type));
}
TEST_CASE("upsample: repeats pixels, to the bit", "[resample]") {
  check_upsample(*make_cpu_backend({.threads = 2}));
}
TEST_CASE("simt.upsample: repeats pixels, to the bit", "[resample]") {
  for (DType type : kTypes) check_upsample(*test::make_kernel_backend(type));
}
TEST_CASE("upsample_backward: both write modes", "[resample]") {
  check_upsample_backward(*make_cpu_backend({.threads = 2}));
}
TEST_CASE("simt.upsample_backward: both write modes", "[resample]") {
  for (DType type : kTypes) check_upsample_backward(*test::make_kernel_backend(type));
}
TEST_CASE("resample: wrong shapes are refused", "[resample]") {
  check_refused(*make_cpu_backend({}));
}
TEST_CASE("simt.resample: wrong shapes are refused", "[resample]") {
  check_refused(*test::make_kernel_backend(DType::kBF16));
}

namespace {

// What the cifar10 and the 256x256 network join and enlarge.
const std::vector<Case> kJoined = {
    {{1, 4, 4, 256}, 256},     {{1, 8, 8, 256}, 256},     {{1, 16, 16, 256}, 256},
    {{1, 16, 16, 256}, 128},   {{1, 32, 32, 256}, 128},   {{1, 32, 32, 128}, 128},
    {{1, 8, 8, 512}, 512},     {{1, 16, 16, 512}, 512},   {{1, 16, 16, 512}, 256},
    {{1, 32, 32, 512}, 256},   {{1, 32, 32, 256}, 256},   {{1, 64, 64, 256}, 256},
    {{1, 64, 64, 256}, 128},   {{1, 128, 128, 256}, 128}, {{1, 128, 128, 128}, 128},
    {{1, 256, 256, 128}, 128},
};
const std::vector<Shape> kEnlarged = {{1, 4, 4, 256},   {1, 8, 8, 256},    {1, 16, 16, 256},
                                      {1, 8, 8, 512},   {1, 16, 16, 512},  {1, 32, 32, 256},
                                      {1, 64, 64, 256}, {1, 128, 128, 128}};

// Small integers, exact in bf16, and so are their sums of four.
std::vector<float> pattern(int64_t count, int64_t salt) {
  std::vector<float> v(static_cast<size_t>(count));
  for (size_t i = 0; i < v.size(); ++i)
    v[i] = static_cast<float>((static_cast<int64_t>(i) * 37 + salt) % 61 - 30);
  return v;
}

// Runs a few blocks of every launch.
class SampledBlocks {
 public:
  SampledBlocks() { simt::options().max_blocks = 8; }
  ~SampledBlocks() { simt::options().max_blocks = 0; }
  SampledBlocks(const SampledBlocks&) = delete;
  SampledBlocks& operator=(const SampledBlocks&) = delete;
};

// The elements that were written are expected(i), and some were.
template <typename F>
void check_written(const std::vector<float>& values, const F& expected) {
  int64_t written = 0, wrong = 0;
  for (size_t i = 0; i < values.size(); ++i) {
    if (std::isnan(values[i])) continue;
    ++written;
    wrong += values[i] != expected(i);
  }
  CHECK(written > 0);
  CHECK(wrong == 0);
}

}  // namespace

TEST_CASE("simt.concat: the networks' shapes", "[resample]") {
  const auto backend = test::make_kernel_backend(DType::kBF16);
  const SampledBlocks sampled;
  for (const auto& [s, c2] : kJoined) {
    const auto c1 = static_cast<size_t>(s.c), c = c1 + static_cast<size_t>(c2);
    const auto x = pattern(s.count(), 1), x2 = pattern(s.pixels() * c2, 2);
    test::Bench bench(*backend);
    const In a = bench.activation(x), b = bench.activation(x2);
    const Out y = bench.activation_out(s.pixels() * (s.c + c2));
    bench.run(backend->concat(s, c2, a, b, y));
    INFO(to_string(s) << " and " << c2);
    check_written(bench.get_activation(y), [&](size_t i) {
      return i % c < c1 ? x[i / c * c1 + i % c] : x2[i / c * (c - c1) + i % c - c1];
    });
  }
}

TEST_CASE("simt.split: the networks' shapes", "[resample]") {
  const auto backend = test::make_kernel_backend(DType::kBF16);
  const SampledBlocks sampled;
  for (const auto& [s, c2] : kJoined) {
    const auto c1 = static_cast<size_t>(s.c), c = c1 + static_cast<size_t>(c2);
    const auto dy = pattern(s.pixels() * (s.c + c2), 3);
    test::Bench bench(*backend);
    const In dys = bench.activation(dy);
    const Out dx = bench.activation_out(s.count()), dx2 = bench.activation_out(s.pixels() * c2);
    bench.run(backend->split(s, c2, dys, dx, Write::kOverwrite, dx2, Write::kOverwrite));
    INFO(to_string(s) << " and " << c2);
    check_written(bench.get_activation(dx), [&](size_t i) { return dy[i / c1 * c + i % c1]; });
    check_written(bench.get_activation(dx2),
                  [&](size_t i) { return dy[i / (c - c1) * c + c1 + i % (c - c1)]; });
  }
}

TEST_CASE("simt.upsample: the networks' shapes", "[resample]") {
  const auto backend = test::make_kernel_backend(DType::kBF16);
  const SampledBlocks sampled;
  for (const Shape& s : kEnlarged) {
    const auto w = static_cast<size_t>(s.w), c = static_cast<size_t>(s.c);
    const auto x = pattern(s.count(), 1), dy = pattern(4 * s.count(), 2);
    test::Bench bench(*backend);
    const In xs = bench.activation(x), dys = bench.activation(dy);
    const Out y = bench.activation_out(4 * s.count()), dx = bench.activation_out(s.count());
    bench.run(backend->upsample(s, xs, y));
    bench.run(backend->upsample_backward(s, dys, dx, Write::kOverwrite));
    INFO(to_string(s));
    check_written(bench.get_activation(y), [&](size_t i) {
      const size_t column = i / c % (2 * w), row = i / c / (2 * w);
      return x[(row / 2 * w + column / 2) * c + i % c];
    });
    check_written(bench.get_activation(dx), [&](size_t i) {
      const size_t column = i / c % w, row = i / c / w;
      const size_t top = (2 * row * 2 * w + 2 * column) * c + i % c, bottom = top + 2 * w * c;
      return dy[top] + dy[top + c] + dy[bottom] + dy[bottom + c];
    });
  }
}

TEST_CASE("simt.resample: the order of blocks changes no bit", "[resample]") {
  const Shape s{2, 5, 7, 40};
  const auto run = [&](uint64_t seed) {
    simt::options().seed = seed;
    const auto backend = test::make_kernel_backend(DType::kBF16);
    test::Bench bench(*backend);
    const In x = bench.activation(random_values(s.count(), 1));
    const In dy = bench.activation(random_values(4 * s.count(), 2));
    const Out dx = bench.activation_inout(random_values(s.count(), 3));
    const Out a = bench.activation_inout(random_values(s.count() / 5 * 2, 4));
    const Out b = bench.activation_inout(random_values(s.count() / 5 * 3, 5));
    bench.run(backend->upsample_backward(s, dy, dx, Write::kAccumulate));
    bench.run(backend->split({2, 5, 7, 16}, 24, x, a, Write::kAccumulate, b, Write::kAccumulate));
    simt::options().seed = 0;
    std::vector<float> all = bench.get_activation(dx);
    for (const Out o : {a, b}) {
      const auto part = bench.get_activation(o);
      all.insert(all.end(), part.begin(), part.end());
    }
    return all;
  };
  CHECK(run(0) == run(77));
}

TEST_CASE("resample: the references' gradients are their finite differences", "[resample]") {
  const Shape s{2, 3, 2, 3};
  const auto x = to_double(random_values(s.count(), 1));
  const auto dy = to_double(random_values(4 * s.count(), 2));
  const auto up = [&](const ref::Vector& v) { return ref::dot(ref::upsample(s, v), dy); };
  CHECK(relative_error(ref::upsample_backward(s, dy), ref::difference_gradient(up, x)) < 1e-8);

  const Shape both{2, 3, 2, 5};
  const auto x2 = to_double(random_values(2 * 3 * 2 * 2, 3));
  const auto d_both = to_double(random_values(both.count(), 4));
  const auto first = [&](const ref::Vector& v) {
    return ref::dot(ref::concat(s, 2, v, x2), d_both);
  };
  const auto second = [&](const ref::Vector& v) {
    return ref::dot(ref::concat(s, 2, x, v), d_both);
  };
  CHECK(relative_error(ref::channels(both, d_both, 0, 3), ref::difference_gradient(first, x)) <
        1e-8);
  CHECK(relative_error(ref::channels(both, d_both, 3, 2), ref::difference_gradient(second, x2)) <
        1e-8);
}
