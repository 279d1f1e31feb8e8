// Attention of a backend against the reference.
#include <catch2/catch.hpp>

#include <cstring>

#include "tests/reference/attention.h"
#include "tests/reference/difference.h"
#include "tests/simt/machine.h"
#include "tests/simt/simt_backend.h"
#include "tests/support.h"

using namespace ddpm;
using test::random_values;
using test::relative_error;
using test::to_double;

namespace {

const std::vector<AttentionDesc> kShapes = {
    {1, 1, 1, 1},   {1, 1, 1, 17},   {2, 1, 3, 5},    {1, 2, 1, 1},    {1, 2, 2, 3},
    {3, 3, 1, 7},   {1, 4, 1, 64},   {2, 5, 2, 8},    {1, 7, 1, 33},   {1, 13, 1, 12},
    {2, 16, 1, 32}, {5, 16, 2, 8},   {1, 16, 1, 256}, {1, 17, 3, 16},  {1, 25, 1, 31},
    {2, 31, 1, 20}, {1, 33, 2, 15},  {1, 36, 1, 48},  {3, 49, 1, 24},  {1, 63, 1, 40},
    {1, 64, 4, 8},  {2, 64, 1, 64},  {1, 65, 1, 9},   {1, 81, 1, 5},   {1, 100, 1, 3},
    {1, 127, 2, 2}, {1, 128, 1, 16}, {1, 16, 1, 512}, {1, 20, 1, 300}, {1, 256, 1, 12},
    {1, 257, 1, 4}, {1, 300, 1, 8},  {1, 523, 1, 3}};

// Unlike ==, true for NaN as well.
bool same_bits(const std::vector<float>& a, const std::vector<float>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
}

struct Result {
  std::vector<float> o, lse, dqkv;
};

// All of an image's numbers: forward with and without lse, then backward.
Result run(Backend& backend, const AttentionDesc& d, const std::vector<float>& qkv,
           const std::vector<float>& d_o) {
  const int64_t count = int64_t{d.n} * d.tokens * d.width();
  test::Bench b(backend);
  const In in = b.activation(qkv), grad = b.activation(d_o);
  const Out o = b.activation_out(count), without_lse = b.activation_out(count);
  const Out dqkv = b.activation_out(3 * count);
  const Out lse = b.out(int64_t{d.n} * d.heads * d.tokens);
  b.run(backend.attention_forward(d, in, o, lse));
  b.run(backend.attention_forward(d, in, without_lse, {}));
  b.run(backend.attention_backward(d, in, {o.slot}, {lse.slot}, grad, dqkv));
  CHECK(same_bits(b.get_activation(o), b.get_activation(without_lse)));
  return {b.get_activation(o), b.get(lse), b.get_activation(dqkv)};
}
Result run_cpu(const AttentionDesc& d, const std::vector<float>& qkv, const std::vector<float>& d_o,
               int threads = 2) {
  return run(*make_cpu_backend({.threads = threads}), d, qkv, d_o);
}

std::vector<float> random_qkv(const AttentionDesc& d, float scale) {
  return random_values(3 * int64_t{d.n} * d.tokens * d.width(), 1, scale);
}
std::vector<float> random_gradient(const AttentionDesc& d) {
  return random_values(int64_t{d.n} * d.tokens * d.width(), 2);
}

std::string name(const AttentionDesc& d) {
  return format("N %d L %d heads %d D %d", d.n, d.tokens, d.heads, d.head_dim);
}

// Dot products of D and of L terms: rounding grows with their square roots. Logits reach about
// scale^2 sqrt(D), and an error e of a logit is an error e of its probability.
double fp32_tolerance(const AttentionDesc& d, float scale) {
  return 1e-7 * (3 + std::sqrt(d.tokens)) + 1e-7 * scale * scale * (3 + std::sqrt(d.head_dim));
}

void check_shape(Backend& backend, const AttentionDesc& d, float scale) {
  const auto qkv = test::rounded(backend, random_qkv(d, scale));
  const auto d_o = test::rounded(backend, random_gradient(d));
  const auto truth = ref::attention(d, to_double(qkv));
  const auto gradient = ref::attention_backward(d, to_double(qkv), to_double(d_o));
  const Result r = run(backend, d, qkv, d_o);
  const double tolerance = fp32_tolerance(d, scale);
  // bf16: the weights of a sum and then the sum are rounded, 2^-9 of each element; in the gradient,
  // o as well.
  const double rounding = backend.compute_type() == DType::kBF16 ? 0x1p-9 : 0;
  INFO(backend.numerics() << " " << name(d) << " scale " << scale);
  if (getenv("SHOW")) {
    printf("%s %s scale %g: o %.3g dqkv %.3g (tol %.3g)", backend.numerics().c_str(),
           name(d).c_str(), scale, relative_error(r.o, truth.o), relative_error(r.dqkv, gradient),
           tolerance);
    for (int part = 0; part < 3; ++part) {
      std::vector<double> a, b;
      for (size_t i = 0; i < r.dqkv.size(); ++i)
        if (static_cast<int>(i) / d.width() % 3 == part) {
          a.push_back(r.dqkv[i]);
          b.push_back(gradient[i]);
        }
      printf(" %.3g", relative_error(a, b));
    }
    printf("\n");
  }
  CHECK(relative_error(r.o, truth.o) <= 2 * rounding + tolerance);
  // lse may be near 0: absolute.
  for (size_t i = 0; i < r.lse.size(); ++i)
    CHECK(std::abs(r.lse[i] - truth.lse[i]) <= tolerance * (1 + std::abs(truth.lse[i])));
  CHECK(relative_error(r.dqkv, gradient) <= 3 * rounding + 2 * tolerance);
}

}  // namespace

TEST_CASE("attention: the reference's gradient is its finite difference", "[attention]") {
  for (const AttentionDesc& d : {AttentionDesc{1, 1, 1, 2}, {2, 3, 1, 2}, {1, 5, 2, 3}}) {
    const auto qkv = to_double(random_qkv(d, 2)), d_o = to_double(random_gradient(d));
    const auto loss = [&](const ref::Vector& v) { return ref::dot(ref::attention(d, v).o, d_o); };
    CHECK(relative_error(ref::attention_backward(d, qkv, d_o),
                         ref::difference_gradient(loss, qkv)) < 1e-7);
  }
}

TEST_CASE("attention_forward, attention_backward: many shapes and scales", "[attention]") {
  const auto backend = make_cpu_backend({.threads = 2});
  for (const AttentionDesc& d : kShapes)
    for (const float scale : {1.0f, 4.0f}) check_shape(*backend, d, scale);
}
TEST_CASE("simt.attention: many shapes and scales, fp32", "[attention]") {
  const auto backend = test::make_simt_backend(DType::kF32);
  for (const AttentionDesc& d : kShapes)
    for (const float scale : {1.0f, 4.0f}) check_shape(*backend, d, scale);
}
TEST_CASE("simt.attention: many shapes and scales, bf16", "[attention]") {
  const auto backend = test::make_simt_backend(DType::kBF16);
  for (const AttentionDesc& d : kShapes)
    for (const float scale : {1.0f, 4.0f}) check_shape(*backend, d, scale);
}

// A softmax that has decided: one probability is 1, exponentials of anything else underflow.
TEST_CASE("attention: logits of 1e4 and values of 1e4", "[attention]") {
  const AttentionDesc d{1, 37, 2, 16};
  auto qkv = random_qkv(d, 100);
  const auto saturated = run_cpu(d, qkv, random_gradient(d));
  CHECK(relative_error(saturated.o, ref::attention(d, to_double(qkv)).o) <= 1e-5);
  for (const float v : saturated.dqkv) REQUIRE(std::isfinite(v));

  qkv = random_qkv(d, 1);
  for (size_t i = 0; i < qkv.size(); ++i)
    if (static_cast<int>(i) % (3 * d.width()) >= 2 * d.width()) qkv[i] *= 1e4f;
  const auto d_o = random_gradient(d);
  const auto large = run_cpu(d, qkv, d_o);
  CHECK(relative_error(large.o, ref::attention(d, to_double(qkv)).o) <= 2e-6);
  CHECK(relative_error(large.dqkv, ref::attention_backward(d, to_double(qkv), to_double(d_o))) <=
        4e-6);
}

TEST_CASE("attention: bits depend on neither batch nor threads", "[attention]") {
  for (const AttentionDesc& d : {AttentionDesc{3, 300, 1, 40}, {3, 64, 2, 24}, {5, 16, 1, 8}}) {
    const auto qkv = random_qkv(d, 1), d_o = random_gradient(d);
    const Result all = run_cpu(d, qkv, d_o, 1);
    for (const int threads : {2, 7}) {
      const Result r = run_cpu(d, qkv, d_o, threads);
      CHECK((r.o == all.o));
      CHECK((r.lse == all.lse));
      CHECK((r.dqkv == all.dqkv));
    }
    AttentionDesc one = d;
    one.n = 1;
    const auto size = static_cast<int64_t>(qkv.size()) / d.n;
    const Result last =
        run_cpu(one, {qkv.end() - size, qkv.end()}, {d_o.end() - size / 3, d_o.end()}, 3);
    CHECK(std::equal(last.o.begin(), last.o.end(), all.o.end() - size / 3));
    CHECK(std::equal(last.dqkv.begin(), last.dqkv.end(), all.dqkv.end() - size));
  }
}

TEST_CASE("attention: what is not finite shows in its rows", "[attention]") {
  const AttentionDesc d{2, 9, 1, 8};
  for (const float bad : {NAN, HUGE_VALF}) {
    auto qkv = random_qkv(d, 1);
    qkv[4 * 24 + 3] = bad;  // image 0, query 4
    const Result r = run_cpu(d, qkv, random_gradient(d));
    for (int i = 0; i < 2 * 9; ++i)
      CHECK(std::isfinite(r.o[static_cast<size_t>(i) * 8]) == (i != 4));
    CHECK(!std::isfinite(r.dqkv[4 * 24]));
    for (size_t i = r.dqkv.size() / 2; i < r.dqkv.size(); ++i) CHECK(std::isfinite(r.dqkv[i]));
  }
}

TEST_CASE("attention: wrong shapes are refused", "[attention]") {
  const auto backend = make_cpu_backend({});
  CHECK_THROWS_AS(backend->attention_forward({1, 0, 1, 8}, {0}, {1}, {2}), Error);
  CHECK_THROWS_AS(backend->attention_backward({1, 4, 1, 0}, {0}, {1}, {2}, {3}, {4}), Error);
}
