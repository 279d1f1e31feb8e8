// The passes around a library's convolution against the reference.
#include <catch2/catch.hpp>

#include "kernels/cuda/bias.h"
#include "tests/simt/machine.h"
#include "tests/simt/simt_backend.h"
#include "tests/support.h"

using namespace ddpm;
using test::random_values;
using test::relative_error;

namespace {

struct BiasCase {
  cuda::BiasPass pass;
  bool bias = false, sample_bias = false, residual = false;
};

struct BiasData {
  std::vector<float> y, bias, sample_bias, residual;
  BiasData(const Backend& backend, const BiasCase& c, float scale)
      : y(test::rounded(backend, random_values(c.pass.y.count(), 1, scale))),
        bias(random_values(c.pass.y.c, 2, scale)),
        sample_bias(random_values(c.pass.y.n * c.pass.sample_bias_stride, 3, scale)),
        residual(test::rounded(backend, random_values(c.pass.y.count(), 4, scale))) {}

  std::vector<double> expected(const BiasCase& c) const {
    const Shape& s = c.pass.y;
    std::vector<double> sum(y.begin(), y.end());
    for (size_t i = 0; i < sum.size(); ++i) {
      const auto channel = static_cast<int64_t>(i) % s.c;
      const auto image = static_cast<int64_t>(i) / (s.pixels() * s.c);
      if (c.bias) sum[i] += static_cast<double>(bias[static_cast<size_t>(channel)]);
      if (c.sample_bias)
        sum[i] += static_cast<double>(sample_bias[static_cast<size_t>(
            image * c.pass.sample_bias_stride + c.pass.sample_bias_offset + channel)]);
      if (c.residual) sum[i] += static_cast<double>(residual[i]);
    }
    return sum;
  }
};

std::vector<float> run_bias(Backend& backend, const BiasCase& c, const BiasData& data) {
  test::Bench bench(backend);
  const Out y = bench.activation_inout(data.y);
  const In bias = c.bias ? bench.in(data.bias) : In{};
  const In sample_bias = c.sample_bias ? bench.in(data.sample_bias) : In{};
  const In residual = c.residual ? bench.activation(data.residual) : In{};
  cuda::check(c.pass);
  bench.run({"add_bias", {}, {y}, 0, [=](const Run& r) {
               cuda::add_bias(c.pass, r.stream, r.out<void>(y), r.in<float>(bias),
                              r.in<float>(sample_bias), r.in<void>(residual));
             }});
  return bench.get_activation(y);
}

enum class Place { kAligned, kOddOffset, kOddStride };  // of the sample bias in its table

BiasCase make_case(const Backend& backend, const Shape& y, int addends, Place place) {
  BiasCase c;
  c.pass = {.y = y, .type = backend.compute_type()};
  c.bias = addends & 1;
  c.residual = addends & 2;
  c.sample_bias = addends & 4;
  if (c.sample_bias) {
    c.pass.sample_bias_stride = 2 * y.c + (place == Place::kOddStride ? 9 : 8);
    c.pass.sample_bias_offset = y.c + (place == Place::kOddOffset ? 3 : 4);
  }
  return c;
}

std::vector<Shape> shapes() {
  std::vector<Shape> all;
  for (const int channels : {1, 3, 4, 8, 13, 16, 24, 31, 128, 384})
    for (const Shape& s : {Shape{1, 1, 1, channels}, Shape{2, 5, 3, channels},
                           Shape{3, 8, 8, channels}, Shape{7, 4, 4, channels}})
      all.push_back(s);
  return all;
}

}  // namespace

TEST_CASE("simt.bias: every sum of addends, wide and narrow", "[bias]") {
  for (const DType type : {DType::kF32, DType::kBF16}) {
    const auto backend = test::make_simt_backend(type);
    int round = 0;
    for (const Shape& s : shapes())
      for (const int addends : {1, 2, 4, 7, round++ % 8}) {
        const BiasCase c = make_case(*backend, s, addends, static_cast<Place>(round % 3));
        const BiasData data(*backend, c, round % 5 == 0 ? 1e4f : 1.0f);
        INFO(to_string(s) << " addends " << addends << " of " << name_of(type));
        // Three sums, each rounded to 2^-24 of itself, and one rounding to 8 bits; what cancels is
        // small in the norm.
        CHECK(relative_error(run_bias(*backend, c, data), data.expected(c)) <=
              (type == DType::kBF16 ? 0x1p-8 : 0) + 3e-7);
      }
  }
}

TEST_CASE("simt.bias: the networks' shapes", "[bias]") {
  simt::options().max_blocks = 6;
  for (const DType type : {DType::kF32, DType::kBF16}) {
    const auto backend = test::make_simt_backend(type);
    for (const Shape& s : {Shape{1, 32, 32, 128}, Shape{1, 16, 16, 256}, Shape{1, 8, 8, 256},
                           Shape{1, 4, 4, 256}, Shape{1, 32, 32, 3}, Shape{1, 256, 256, 3},
                           Shape{1, 128, 128, 128}, Shape{1, 64, 64, 256}, Shape{1, 32, 32, 256},
                           Shape{1, 16, 16, 512}, Shape{1, 8, 8, 512}}) {
      const BiasCase c = make_case(*backend, s, 5, Place::kAligned);
      const BiasData data(*backend, c, 1);
      const auto y = run_bias(*backend, c, data);
      const auto expected = data.expected(c);
      int64_t touched = 0;
      for (size_t i = 0; i < y.size(); ++i) {
        if (y[i] == data.y[i]) continue;  // of a block that did not run
        ++touched;
        const double bound = type == DType::kBF16 ? 0x1p-8 : 1e-6;
        REQUIRE(std::abs(static_cast<double>(y[i]) - expected[i]) <=
                bound * (1 + std::abs(expected[i])));
      }
      INFO(to_string(s));
      CHECK(touched > 200);
    }
  }
  simt::options().max_blocks = 0;
}

TEST_CASE("simt.bias: the order of warps and blocks changes no bit", "[bias]") {
  const auto backend = test::make_simt_backend(DType::kBF16);
  const BiasCase c = make_case(*backend, {3, 8, 8, 24}, 7, Place::kAligned);
  const BiasData data(*backend, c, 1);
  const auto first = run_bias(*backend, c, data);
  for (uint64_t seed = 1; seed < 4; ++seed) {
    simt::options().seed = seed;
    CHECK((run_bias(*backend, c, data) == first));
  }
  simt::options().seed = 0;
}

TEST_CASE("simt.bias: what it cannot mean is refused", "[bias]") {
  const auto check = [](const Shape& y, int64_t stride, int64_t offset) {
    cuda::check(cuda::BiasPass{y, DType::kF32, stride, offset});
  };
  CHECK_NOTHROW(check({2, 4, 4, 8}, 9, 1));
  CHECK_THROWS_AS(check({2, 4, 4, 8}, 9, 2), Error);
  CHECK_THROWS_AS(check({2, 4, 0, 8}, 0, 0), Error);
  CHECK_THROWS_AS(check({70000, 4, 4, 8}, 0, 0), Error);
  CHECK_THROWS_AS(cuda::check(cuda::BiasPass{{1, 1, 1, 1}, DType::kI32}), Error);
}

TEST_CASE("simt.convert: types and write modes of a convolution's results", "[bias]") {
  const auto backend = test::make_simt_backend(DType::kBF16);
  const auto convert = [](int64_t count, DType from, In x, DType to, Out y, Write write) {
    return Call{"convert", {x}, {y}, 0, [=](const Run& r) {
                  cuda::convert(r.stream, count, from, r.in<void>(x), to, r.out<void>(y), write);
                }};
  };
  for (const int64_t count : {1, 3, 7, 8, 9, 64, 255, 2048, 4099}) {
    const auto x = test::rounded(*backend, random_values(count, 1, 100));
    const auto before = test::rounded(*backend, random_values(count, 2, 100));
    const auto wide = random_values(count, 3);
    std::vector<float> sum = x;
    for (size_t i = 0; i < sum.size(); ++i) sum[i] += before[i];
    test::Bench bench(*backend);
    const In narrow_x = bench.activation(x), wide_x = bench.in(x), any = bench.in(wide);
    const Out set = bench.out(count), narrow = bench.activation_out(count);
    const Out added = bench.inout(before), added_wide = bench.inout(before);
    const Out added_narrow = bench.activation_inout(before);
    const auto kSet = Write::kOverwrite, kAdd = Write::kAccumulate;
    bench.run(convert(count, DType::kBF16, narrow_x, DType::kF32, set, kSet));
    bench.run(convert(count, DType::kF32, any, DType::kBF16, narrow, kSet));
    bench.run(convert(count, DType::kBF16, narrow_x, DType::kF32, added, kAdd));
    bench.run(convert(count, DType::kF32, wide_x, DType::kF32, added_wide, kAdd));
    bench.run(convert(count, DType::kBF16, narrow_x, DType::kBF16, added_narrow, kAdd));
    INFO("count " << count);
    CHECK((bench.get(set) == x));
    CHECK((bench.get_activation(narrow) == test::rounded(*backend, wide)));
    CHECK((bench.get(added) == sum));
    CHECK((bench.get(added_wide) == sum));
    CHECK((bench.get_activation(added_narrow) == test::rounded(*backend, sum)));
    CHECK_THROWS_AS(bench.run(convert(count, DType::kF32, wide_x, DType::kF32, set, kSet)), Error);
    CHECK_THROWS_AS(bench.run(convert(count, DType::kF32, wide_x, DType::kBF16, narrow, kAdd)),
                    Error);
  }
}
