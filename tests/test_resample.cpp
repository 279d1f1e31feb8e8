// Concatenation and upsampling of a backend against the reference.
#include <catch2/catch.hpp>

#include "tests/reference/difference.h"
#include "tests/reference/resample.h"
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
  return write == Write::kAccumulate ? bench.inout(before)
                                     : bench.out(static_cast<int64_t>(before.size()));
}

std::vector<double> plus(std::vector<double> a, const std::vector<float>& b, Write write) {
  if (write == Write::kAccumulate)
    for (size_t i = 0; i < a.size(); ++i) a[i] += static_cast<double>(b[i]);
  return a;
}

}  // namespace

TEST_CASE("concat: joins channels, to the bit", "[resample]") {
  const auto backend = make_cpu_backend({.threads = 2});
  for (const auto& [s, c2] : kCases) {
    const int64_t count2 = s.count() / s.c * c2;
    const auto x = random_values(s.count(), 1, 1e4f), x2 = random_values(count2, 2);
    test::Bench bench(*backend);
    const In a = bench.in(x), b = bench.in(x2);
    const Out y = bench.out(s.count() + count2);
    bench.run(backend->concat(s, c2, a, b, y));
    INFO(to_string(s) << " and " << c2);
    CHECK(relative_error(bench.get(y), ref::concat(s, c2, to_double(x), to_double(x2))) == 0);
  }
}

TEST_CASE("split: every pair of write modes", "[resample]") {
  const auto backend = make_cpu_backend({.threads = 2});
  for (const auto& [s, c2] : kCases)
    for (const Write write : kWrites)
      for (const Write write2 : kWrites) {
        const Shape both{s.n, s.h, s.w, s.c + c2};
        const auto dy = random_values(both.count(), 1);
        const auto before = random_values(s.count(), 2);
        const auto before2 = random_values(both.count() - s.count(), 3);
        test::Bench bench(*backend);
        const In dys = bench.in(dy);
        const Out dx = destination(bench, before, write);
        const Out dx2 = destination(bench, before2, write2);
        bench.run(backend->split(s, c2, dys, dx, write, dx2, write2));
        INFO(to_string(s) << " and " << c2);
        // At most one addition: half a last bit.
        const auto expected = plus(ref::channels(both, to_double(dy), 0, s.c), before, write);
        CHECK(relative_error(bench.get(dx), expected) <= 6e-8);
        const auto expected2 = plus(ref::channels(both, to_double(dy), s.c, c2), before2, write2);
        CHECK(relative_error(bench.get(dx2), expected2) <= 6e-8);
      }
}

TEST_CASE("upsample: repeats pixels, to the bit", "[resample]") {
  const auto backend = make_cpu_backend({.threads = 2});
  for (const Case& c : kCases) {
    const auto x = random_values(c.x.count(), 1, 1e4f);
    test::Bench bench(*backend);
    const In xs = bench.in(x);
    const Out y = bench.out(4 * c.x.count());
    bench.run(backend->upsample(c.x, xs, y));
    INFO(to_string(c.x));
    CHECK(relative_error(bench.get(y), ref::upsample(c.x, to_double(x))) == 0);
  }
}

TEST_CASE("upsample_backward: both write modes", "[resample]") {
  const auto backend = make_cpu_backend({.threads = 2});
  for (const Case& c : kCases)
    for (const Write write : kWrites) {
      const auto dy = random_values(4 * c.x.count(), 1), before = random_values(c.x.count(), 2);
      test::Bench bench(*backend);
      const In dys = bench.in(dy);
      const Out dx = destination(bench, before, write);
      bench.run(backend->upsample_backward(c.x, dys, dx, write));
      INFO(to_string(c.x));
      const auto expected = plus(ref::upsample_backward(c.x, to_double(dy)), before, write);
      CHECK(relative_error(bench.get(dx), expected) <= 2e-7);  // four additions
    }
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

TEST_CASE("resample: wrong shapes are refused", "[resample]") {
  const auto backend = make_cpu_backend({});
  CHECK_THROWS_AS(backend->concat({1, 2, 2, 4}, 0, {0}, {1}, {2}), Error);
  CHECK_THROWS_AS(
      backend->split({1, 2, 0, 4}, 1, {0}, {1}, Write::kOverwrite, {2}, Write::kOverwrite), Error);
  CHECK_THROWS_AS(backend->upsample({1, 2, 2, 0}, {0}, {1}), Error);
  CHECK_THROWS_AS(backend->upsample_backward({0, 2, 2, 1}, {0}, {1}, Write::kOverwrite), Error);
}
