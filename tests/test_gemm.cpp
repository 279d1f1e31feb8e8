#include <catch2/catch.hpp>

#include <cstring>

#include "tests/reference/gemm.h"
#include "tests/support.h"

using namespace ddpm;
using test::random_values;
using test::relative_error;
using test::to_double;

namespace {

// Rounding of a sum of k products of random signs grows with sqrt(k).
double tolerance(int k) { return 1e-7 * (2 + std::sqrt(static_cast<double>(k))); }

struct GemmData {
  std::vector<float> a, b, bias, residual, before;
  explicit GemmData(const GemmDesc& g, uint64_t seed = 1)
      : a(random_values(int64_t{g.batch} * g.m * g.k, seed)),
        b(random_values(int64_t{g.batch} * g.k * g.n, seed + 1)),
        bias(random_values(g.bias ? g.n : 0, seed + 2)),
        residual(random_values(g.residual ? int64_t{g.batch} * g.m * g.n : 0, seed + 3)),
        before(random_values(int64_t{g.batch} * g.m * g.n, seed + 4)) {}
};

std::vector<float> run(Backend& backend, const GemmDesc& g, const GemmData& t, Write write) {
  test::Bench bench(backend);
  const In a = bench.in(t.a), b = bench.in(t.b);
  const In bias = g.bias ? bench.in(t.bias) : In{};
  const In residual = g.residual ? bench.in(t.residual) : In{};
  const Out c = write == Write::kAccumulate ? bench.inout(t.before)
                                            : bench.out(static_cast<int64_t>(t.before.size()));
  const Call call = backend.gemm(g, a, b, bias, residual, c, write);
  CHECK(call.reads.size() == 2u + g.bias + g.residual);
  bench.run(call);
  return bench.get(c);
}

const std::vector<GemmDesc> kShapes = {
    {.m = 1, .n = 1, .k = 1},
    {.m = 1, .n = 5, .k = 17},
    {.m = 2, .n = 3, .k = 5},
    {.m = 1, .n = 512, .k = 128},
    {.m = 8, .n = 512, .k = 128},
    {.m = 8, .n = 512, .k = 512},
    {.m = 7, .n = 256, .k = 512},
    {.m = 32, .n = 64, .k = 256},
    {.m = 13, .n = 31, .k = 29},
    {.m = 64, .n = 64, .k = 64},
    {.m = 16, .n = 4096, .k = 64},
    {.m = 127, .n = 3, .k = 61},
    {.m = 3, .n = 127, .k = 1},
    {.m = 257, .n = 16, .k = 2},
    {.m = 5, .n = 7, .k = 1021},
    {.m = 33, .n = 33, .k = 33},
    {.m = 128, .n = 96, .k = 192},
    {.m = 16, .n = 16, .k = 8, .batch = 4},
    {.m = 1, .n = 1, .k = 3, .batch = 5},
    {.m = 17, .n = 19, .k = 23, .batch = 3},
    {.m = 64, .n = 64, .k = 32, .batch = 2},
};

}  // namespace

TEST_CASE("gemm: every transpose, term and write mode", "[gemm]") {
  const auto backend = make_cpu_backend({.threads = 2});
  for (size_t shape = 0; shape < kShapes.size(); ++shape)
    for (unsigned bits = 0; bits < 4; ++bits) {
      const size_t variant = shape + bits;  // every transpose meets every set of terms
      GemmDesc g = kShapes[shape];
      g.transpose_a = bits & 1;
      g.transpose_b = bits & 2;
      g.bias = variant & 1;
      g.residual = variant & 2;
      const GemmData t(g);
      const auto expected =
          ref::gemm(g, to_double(t.a), to_double(t.b), to_double(t.bias), to_double(t.residual));
      INFO("batch " << g.batch << " m " << g.m << " n " << g.n << " k " << g.k << " transposes "
                    << g.transpose_a << g.transpose_b << " bias " << g.bias << " residual "
                    << g.residual);
      CHECK(relative_error(run(*backend, g, t, Write::kOverwrite), expected) <= tolerance(g.k));
      auto sum = expected;
      for (size_t i = 0; i < sum.size(); ++i) sum[i] += static_cast<double>(t.before[i]);
      CHECK(relative_error(run(*backend, g, t, Write::kAccumulate), sum) <= tolerance(g.k));
    }
}

TEST_CASE("gemm: large and small magnitudes", "[gemm]") {
  const auto backend = make_cpu_backend({.threads = 2});
  const GemmDesc g{.m = 19, .n = 37, .k = 53};
  for (const float scale : {1e-15f, 1e15f}) {
    GemmData t(g);
    for (float& v : t.a) v *= scale;
    for (float& v : t.b) v *= scale;
    const auto expected = ref::gemm(g, to_double(t.a), to_double(t.b), {}, {});
    CHECK(relative_error(run(*backend, g, t, Write::kOverwrite), expected) <= tolerance(g.k));
  }
}

TEST_CASE("gemm: a row's bits do not depend on the number of rows", "[gemm]") {
  const auto backend = make_cpu_backend({.threads = 2, .batch_invariant = true});
  for (const auto& [n, k] : {std::pair{512, 128}, {64, 512}, {31, 29}, {256, 1024}})
    for (const bool transpose_b : {false, true}) {
      GemmDesc g{.m = 129, .n = n, .k = k, .transpose_b = transpose_b, .bias = true};
      const GemmData all(g);
      const auto whole = run(*backend, g, all, Write::kOverwrite);
      for (const int m : {1, 2, 7, 64}) {
        g.m = m;
        // The last rows rather than the first: neither place nor number may matter.
        GemmData part = all;
        part.a.assign(all.a.end() - int64_t{m} * k, all.a.end());
        part.before.resize(static_cast<size_t>(m) * n);
        const auto rows = run(*backend, g, part, Write::kOverwrite);
        CHECK(std::memcmp(rows.data(), whole.data() + whole.size() - rows.size(),
                          rows.size() * sizeof(float)) == 0);
      }
    }
}

TEST_CASE("gemm: refuses what it cannot mean", "[gemm]") {
  const auto backend = make_cpu_backend({.threads = 1});
  const In a{0}, b{1}, none;
  const Out c{2};
  CHECK_THROWS_AS(backend->gemm({.m = 0, .n = 1, .k = 1}, a, b, none, none, c, Write::kOverwrite),
                  Error);
  CHECK_THROWS_AS(
      backend->gemm({.m = 1, .n = 1, .k = 1}, a, none, none, none, c, Write::kOverwrite), Error);
  CHECK_THROWS_AS(
      backend->gemm({.m = 1, .n = 1, .k = 1, .bias = true}, a, b, none, none, c, Write::kOverwrite),
      Error);
}
