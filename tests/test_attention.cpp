// Attention of a backend against the reference.
#include <catch2/catch.hpp>

#include <cstring>

#include "tests/kernel_backend.h"
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

// All of an image's numbers: forward, without lse too where that takes no time, then backward.
Result run(Backend& backend, const AttentionDesc& d, const std::vector<float>& qkv,
           const std::vector<float>& d_o) {
  const int64_t count = int64_t{d.n} * d.tokens * d.width();
  test::Bench b(backend);
  const In in = b.activation(qkv), grad = b.activation(d_o);
  const Out o = b.activation_out(count), without_lse = b.activation_out(count);
  const Out dqkv = b.activation_out(3 * count);
  const Out lse = b.out(int64_t{d.n} * d.heads * d.tokens);
  b.run(backend.attention_forward(d, in, o, lse));
  b.run(backend.attention_backward(d, in, {o.slot}, {lse.slot}, grad, dqkv));
  if (d.tokens <= 64 || backend.name() == "cpu") {
    b.run(backend.attention_forward(d, in, without_lse, {}));
    CHECK(same_bits(b.get_activation(o), b.get_activation(without_lse)));
  }
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

// Each of dq, dk, dv has its share of rows of dqkv.
double worst_part_error(const AttentionDesc& d, const std::vector<float>& dqkv,
                        const ref::Vector& truth) {
  double worst = 0;
  for (size_t part = 0; part < 3; ++part) {
    std::vector<double> a, b;
    for (size_t i = 0; i < dqkv.size(); ++i)
      if (i / static_cast<size_t>(d.width()) % 3 == part) {
        a.push_back(static_cast<double>(dqkv[i]));
        b.push_back(truth[i]);
      }
    worst = std::max(worst, relative_error(a, b));
  }
  return worst;
}

void check_lse(const std::vector<float>& lse, const ref::Vector& truth, double tolerance) {
  REQUIRE(lse.size() == truth.size());
  double worst = 0;  // it may be near 0: absolute
  for (size_t i = 0; i < lse.size(); ++i)
    worst = std::max(worst,
                     std::abs(static_cast<double>(lse[i]) - truth[i]) / (1 + std::abs(truth[i])));
  CHECK(worst <= tolerance);
}

// bf16: the weights of a sum (p, ds) are rounded and then the sum, 2^-9 of each element twice. The
// gradient is that at the rounded o.
void check_shape(Backend& backend, const AttentionDesc& d, float scale) {
  const bool narrow = backend.compute_type() == DType::kBF16;
  const auto qkv = test::rounded(backend, random_qkv(d, scale));
  const auto d_o = test::rounded(backend, random_gradient(d));
  const Result r = run(backend, d, qkv, d_o);
  const auto truth = ref::attention(d, to_double(qkv));
  const double tolerance = fp32_tolerance(d, scale), rounding = narrow ? 2 * 0x1p-9 : 0;
  INFO(backend.numerics() << " " << name(d) << " scale " << scale);
  CHECK(relative_error(r.o, truth.o) <= rounding + tolerance);
  check_lse(r.lse, truth.lse, tolerance);
  const auto gradient = ref::attention_backward(d, to_double(qkv), to_double(d_o),
                                                narrow ? to_double(r.o) : ref::Vector{});
  const double error =
      narrow ? worst_part_error(d, r.dqkv, gradient) : relative_error(r.dqkv, gradient);
  CHECK(error <= rounding + 2 * tolerance);
}

void check_shapes(Backend& backend, int min_tokens, int max_tokens, float scale) {
  for (const AttentionDesc& d : kShapes)
    if (d.tokens >= min_tokens && d.tokens <= max_tokens) check_shape(backend, d, scale);
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
  for (const float scale : {1.0f, 4.0f}) check_shapes(*backend, 1, 1024, scale);
}
TEST_CASE("simt.attention: many shapes, fp32", "[attention]") {
  check_shapes(*test::make_kernel_backend(DType::kF32), 1, 128, 1);
}
TEST_CASE("simt.attention: many shapes, bf16", "[attention]") {
  check_shapes(*test::make_kernel_backend(DType::kBF16), 1, 128, 1);
}
TEST_CASE("simt.attention: large scale, fp32", "[attention]") {
  check_shapes(*test::make_kernel_backend(DType::kF32), 1, 128, 4);
}
TEST_CASE("simt.attention: large scale, bf16", "[attention]") {
  check_shapes(*test::make_kernel_backend(DType::kBF16), 1, 128, 4);
}
TEST_CASE("simt.attention: many tokens, fp32", "[attention]") {
  check_shapes(*test::make_kernel_backend(DType::kF32), 129, 1024, 1);
}
TEST_CASE("simt.attention: many tokens, bf16", "[attention]") {
  check_shapes(*test::make_kernel_backend(DType::kBF16), 129, 1024, 1);
}

// Every width that a kernel is compiled for, full and padded, with its neighbours; token counts
// around a tile.
TEST_CASE("simt.attention: tiles of the tensor cores, full and not", "[attention]") {
  const auto backend = test::make_kernel_backend(DType::kBF16);
  for (const AttentionDesc& d : std::initializer_list<AttentionDesc>{{1, 32, 1, 16},
                                                                     {1, 48, 1, 56},
                                                                     {1, 64, 1, 72},
                                                                     {1, 80, 1, 120},
                                                                     {1, 16, 2, 128},
                                                                     {1, 96, 1, 128},
                                                                     {1, 33, 1, 136},
                                                                     {1, 65, 1, 256},
                                                                     {1, 63, 2, 200},
                                                                     {1, 32, 1, 264},
                                                                     {1, 31, 1, 512},
                                                                     {1, 48, 1, 504}})
    check_shape(*backend, d, 2);
}
TEST_CASE("simt.attention: wider than the tensor cores' kernels", "[attention]") {
  for (const DType type : {DType::kF32, DType::kBF16})
    check_shape(*test::make_kernel_backend(type), {1, 17, 1, 520}, 1);
}
TEST_CASE("simt.attention: 1024 tokens", "[attention]") {
  check_shape(*test::make_kernel_backend(DType::kBF16), {1, 1024, 1, 16}, 1);
}

TEST_CASE("simt.attention: the networks' shapes, bf16", "[attention]") {
  const auto backend = test::make_kernel_backend(DType::kBF16);
  for (const AttentionDesc& d : std::initializer_list<AttentionDesc>{
           {1, 16, 1, 256}, {1, 256, 1, 256}, {1, 64, 1, 512}, {1, 64, 1, 64}})
    check_shape(*backend, d, 1);
}
TEST_CASE("simt.attention: the 256x256 networks' shape, bf16", "[attention]") {
  check_shape(*test::make_kernel_backend(DType::kBF16), {1, 256, 1, 512}, 1);
}
TEST_CASE("simt.attention: the networks' shapes, fp32", "[attention]") {
  const auto backend = test::make_kernel_backend(DType::kF32);
  for (const AttentionDesc& d :
       std::initializer_list<AttentionDesc>{{1, 16, 1, 256}, {1, 64, 1, 256}, {1, 64, 1, 64}})
    check_shape(*backend, d, 1);
}

// Some blocks of a large grid, forward: what they wrote is right, and the rest is untouched.
namespace {
void check_chosen_blocks(Backend& backend, const AttentionDesc& d) {
  const auto qkv = test::rounded(backend, random_qkv(d, 1));
  test::Bench b(backend);
  const In in = b.activation(qkv);
  const Out o = b.activation_out(int64_t{d.n} * d.tokens * d.width());
  simt::options().max_blocks = 2;
  b.run(backend.attention_forward(d, in, o, {}));
  simt::options().max_blocks = 0;
  const auto truth = ref::attention(d, to_double(qkv)).o;
  const auto values = b.get_activation(o);
  std::vector<double> written, expected;
  for (size_t i = 0; i < values.size(); ++i)
    if (!std::isnan(values[i])) {
      written.push_back(static_cast<double>(values[i]));
      expected.push_back(truth[i]);
    }
  INFO(backend.numerics() << " " << name(d));
  CHECK(written.size() >= static_cast<size_t>(64 * d.head_dim));
  CHECK(written.size() < values.size());
  CHECK(relative_error(written, expected) <=
        2 * test::activation_tolerance(backend, 0) + fp32_tolerance(d, 1));
}
}  // namespace

TEST_CASE("simt.attention: chosen blocks of the networks' shapes", "[attention]") {
  for (const DType type : {DType::kF32, DType::kBF16})
    for (const AttentionDesc& d : {AttentionDesc{2, 256, 1, 256}, {1, 256, 1, 512}})
      check_chosen_blocks(*test::make_kernel_backend(type), d);
}
TEST_CASE("simt.attention: chosen blocks of many tokens and heads", "[attention]") {
  const auto backend = test::make_kernel_backend(DType::kBF16);
  for (const AttentionDesc& d : {AttentionDesc{1, 1024, 2, 64}, {1, 4096, 1, 8}})
    check_chosen_blocks(*backend, d);
}

// A softmax that has decided: one probability is 1, exponentials of anything else underflow.
namespace {
void check_saturated(Backend& backend, double rounding) {
  const AttentionDesc d{1, 37, 2, 16};
  auto qkv = test::rounded(backend, random_qkv(d, 100));
  const auto d_o = test::rounded(backend, random_gradient(d));
  const auto saturated = run(backend, d, qkv, d_o);
  auto truth = ref::attention(d, to_double(qkv));
  CHECK(relative_error(saturated.o, truth.o) <= rounding + 1e-5);
  check_lse(saturated.lse, truth.lse, 1e-6);
  for (const float v : saturated.dqkv) REQUIRE(std::isfinite(v));

  qkv = random_qkv(d, 1);
  for (size_t i = 0; i < qkv.size(); ++i)
    if (static_cast<int>(i) % (3 * d.width()) >= 2 * d.width()) qkv[i] *= 1e4f;
  qkv = test::rounded(backend, qkv);
  truth = ref::attention(d, to_double(qkv));
  const auto large = run(backend, d, qkv, d_o);
  CHECK(relative_error(large.o, truth.o) <= rounding + 2e-6);
  const auto gradient = ref::attention_backward(d, to_double(qkv), to_double(d_o),
                                                rounding > 0 ? to_double(large.o) : ref::Vector{});
  CHECK(relative_error(large.dqkv, gradient) <= rounding + 4e-6);
}
}  // namespace

TEST_CASE("attention: logits of 1e4 and values of 1e4", "[attention]") {
  check_saturated(*make_cpu_backend({.threads = 2}), 0);
}
TEST_CASE("simt.attention: logits of 1e4 and values of 1e4", "[attention]") {
  check_saturated(*test::make_kernel_backend(DType::kF32), 0);
  check_saturated(*test::make_kernel_backend(DType::kBF16), 2 * 0x1p-9);
}

namespace {
// Of the last image: alone, whatever the order of warps and blocks.
void check_last_image(Backend& backend, const AttentionDesc& d) {
  const auto qkv = test::rounded(backend, random_qkv(d, 1));
  const auto d_o = test::rounded(backend, random_gradient(d));
  const Result all = run(backend, d, qkv, d_o);
  AttentionDesc one = d;
  one.n = 1;
  const auto size = static_cast<int64_t>(qkv.size()) / d.n;
  simt::options().seed = 12345;
  const Result last =
      run(backend, one, {qkv.end() - size, qkv.end()}, {d_o.end() - size / 3, d_o.end()});
  simt::options().seed = 0;
  INFO(backend.numerics() << " " << name(d));
  CHECK(std::equal(last.o.begin(), last.o.end(), all.o.end() - size / 3));
  CHECK(std::equal(last.lse.begin(), last.lse.end(), all.lse.end() - d.heads * d.tokens));
  CHECK(std::equal(last.dqkv.begin(), last.dqkv.end(), all.dqkv.end() - size));
}
}  // namespace

namespace {
// All logits near -2000: a key outside, whose logit would be 0, has an infinite weight if it is not
// left out.
void check_far_below_zero(Backend& backend, double rounding) {
  for (const AttentionDesc& d : {AttentionDesc{1, 21, 1, 16}, {1, 70, 1, 13}}) {
    auto qkv = random_qkv(d, 1);
    for (size_t i = 0; i < qkv.size(); ++i) {
      const size_t part = i / static_cast<size_t>(d.width()) % 3;
      if (part < 2) qkv[i] += part == 0 ? 24.0f : -24.0f;
    }
    qkv = test::rounded(backend, qkv);
    const auto d_o = test::rounded(backend, random_gradient(d));
    const Result r = run(backend, d, qkv, d_o);
    const auto truth = ref::attention(d, to_double(qkv));
    INFO(backend.numerics() << " " << name(d));
    // A logit's error, 1e-7 of 2000, is its weight's.
    CHECK(relative_error(r.o, truth.o) <= rounding + 1e-3);
    check_lse(r.lse, truth.lse, 1e-6);
    const auto gradient = ref::attention_backward(d, to_double(qkv), to_double(d_o),
                                                  rounding > 0 ? to_double(r.o) : ref::Vector{});
    CHECK(relative_error(r.dqkv, gradient) <= rounding + 2e-3);
  }
}
}  // namespace

TEST_CASE("attention: logits far below zero", "[attention]") {
  check_far_below_zero(*make_cpu_backend({.threads = 2}), 0);
}
TEST_CASE("simt.attention: logits far below zero", "[attention]") {
  check_far_below_zero(*test::make_kernel_backend(DType::kF32), 0);
  check_far_below_zero(*test::make_kernel_backend(DType::kBF16), 2 * 0x1p-9);
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
    check_last_image(*make_cpu_backend({.threads = 3}), d);
  }
}
TEST_CASE("simt.attention: bits depend on neither batch nor order", "[attention]") {
  for (const DType type : {DType::kF32, DType::kBF16})
    for (const AttentionDesc& d : {AttentionDesc{2, 70, 1, 40}, {3, 16, 2, 13}, {2, 16, 1, 256}})
      check_last_image(*test::make_kernel_backend(type), d);
}

// At 256 columns another kernel is taken there; at 512 the tensor cores' do not fit at all.
TEST_CASE("simt.attention: what an A100 has of shared memory is enough", "[attention]") {
  constexpr size_t kA100 = 163 * 1024;
  simt::options().max_shared = kA100;
  const auto backend = test::make_simt_backend(DType::kBF16, {.shared_bytes = kA100});
  for (const AttentionDesc& d : {AttentionDesc{1, 70, 2, 40}, {1, 80, 1, 256}, {1, 16, 1, 512}})
    check_shape(*backend, d, 2);
  simt::options() = {};
}

namespace {
void check_not_finite(Backend& backend) {
  const AttentionDesc d{2, 9, 1, 8};
  for (const float bad : {NAN, HUGE_VALF}) {
    auto qkv = random_qkv(d, 1);
    qkv[4 * 24 + 3] = bad;  // image 0, query 4
    const Result r = run(backend, d, qkv, random_gradient(d));
    for (int i = 0; i < 2 * 9; ++i)
      CHECK(std::isfinite(r.o[static_cast<size_t>(i) * 8]) == (i != 4));
    CHECK(!std::isfinite(r.dqkv[4 * 24]));
    for (size_t i = r.dqkv.size() / 2; i < r.dqkv.size(); ++i) CHECK(std::isfinite(r.dqkv[i]));
  }
}
}  // namespace

TEST_CASE("attention: what is not finite shows in its rows", "[attention]") {
  check_not_finite(*make_cpu_backend({.threads = 2}));
}
TEST_CASE("simt.attention: what is not finite shows in its rows", "[attention]") {
  for (const DType type : {DType::kF32, DType::kBF16})
    check_not_finite(*test::make_kernel_backend(type));
}

TEST_CASE("attention: wrong shapes are refused", "[attention]") {
  const auto backend = make_cpu_backend({});
  CHECK_THROWS_AS(backend->attention_forward({1, 0, 1, 8}, {0}, {1}, {2}), Error);
  CHECK_THROWS_AS(backend->attention_backward({1, 4, 1, 0}, {0}, {1}, {2}, {3}, {4}), Error);
}
TEST_CASE("simt.attention: wrong shapes and missing tensors are refused", "[attention]") {
  const auto backend = test::make_kernel_backend(DType::kBF16);
  CHECK_THROWS_WITH(backend->attention_forward({1, 0, 1, 8}, {0}, {1}, {2}),
                    Catch::Contains("attention_forward: 1 images of 0 tokens, 1 heads of 8"));
  CHECK_THROWS_AS(backend->attention_backward({1, 4, 1, 0}, {0}, {1}, {2}, {3}, {4}), Error);
  CHECK_THROWS_AS(backend->attention_forward({1 << 20, 1 << 20, 1, 8}, {0}, {1}, {2}), Error);
  CHECK_THROWS_AS(backend->attention_forward({1, 4, 1, 8}, {0}, {}, {2}), Error);
  CHECK_THROWS_AS(backend->attention_backward({1, 4, 1, 8}, {0}, {1}, {}, {3}, {4}), Error);
}
