// Group norm of a backend, statistics to gradients, against the reference.
#include <catch2/catch.hpp>

#include "tests/kernel_backend.h"
#include "tests/reference/difference.h"
#include "tests/reference/group_norm.h"
#include "tests/reference/resample.h"
#include "tests/simt/machine.h"
#include "tests/support.h"

using namespace ddpm;
using test::random_values;
using test::relative_error;
using test::rounded;
using test::to_double;

namespace {

struct Case {
  Shape x;
  int c2, groups;
};
const std::vector<Case> kCases = {
    {{1, 1, 1, 2}, 0, 1},      {{1, 2, 1, 3}, 0, 1},     {{2, 3, 3, 3}, 0, 3},
    {{1, 5, 3, 5}, 0, 5},      {{2, 4, 4, 20}, 0, 4},    {{1, 7, 7, 33}, 0, 11},
    {{3, 4, 4, 32}, 0, 32},    {{2, 8, 8, 32}, 0, 8},    {{1, 9, 8, 64}, 0, 32},
    {{2, 16, 16, 16}, 0, 4},   {{1, 13, 11, 48}, 0, 6},  {{5, 2, 2, 96}, 0, 32},
    {{1, 1, 67, 12}, 0, 2},    {{1, 129, 1, 6}, 0, 2},   {{4, 4, 4, 128}, 0, 32},
    {{1, 3, 3, 515}, 0, 5},    {{1, 2, 2, 1056}, 0, 32}, {{9, 1, 2, 24}, 0, 3},
    {{1, 4, 4, 256}, 128, 32}, {{2, 3, 5, 4}, 2, 3},     {{1, 1, 1, 1}, 1, 1},
    {{2, 4, 4, 5}, 7, 4},      {{1, 8, 9, 32}, 16, 8},   {{3, 5, 5, 17}, 16, 11},
    {{1, 11, 6, 64}, 32, 32},  {{2, 2, 2, 3}, 13, 2},    {{1, 2, 3, 600}, 40, 20},
    {{2, 9, 9, 20}, 20, 8},    {{7, 2, 2, 48}, 48, 16},  {{1, 17, 5, 1}, 7, 2},
    {{1, 2, 2, 24}, 620, 4},   {{2, 10, 7, 12}, 0, 1}};

// Relative L2 error of `count` activations that were rounded once, and of what else `fp32` is the
// bound. Rounding to 8 bits moves an element by at most 2^-8 of itself, and many of them by 2^-9
// (root mean square: 2^-9.4).
double rounding(const Backend& backend, double fp32, size_t count) {
  if (backend.compute_type() == DType::kF32) return fp32;
  return (count < 256 ? 0x1p-8 : 0x1p-9) + fp32;
}

// Everything of one group norm, and its truth.
struct Problem {
  GroupNormDesc desc;
  StepState state{
      .seed = 0x123456789ABCDEF0, .step = (uint64_t{1} << 32) + 77, .first_image = 4294967295};
  std::vector<float> x, x2, gamma, beta, dy, before, before2, before_gamma, before_beta;
  ref::Vector all, factor;
  std::vector<float> sums;  // where dy is the gradient at z, those that belong to it

  // Activations are such as the backend can hold.
  Problem(const Backend& b, const GroupNormDesc& d, float scale = 1, float offset = 0.3f)
      : desc(d),
        x(rounded(b, random_values(d.x.count(), 1, scale, offset))),
        x2(rounded(b, random_values(d.shape().count() - d.x.count(), 2, scale, offset))),
        gamma(random_values(d.c(), 3, 1, 1)),
        beta(random_values(d.c(), 4)),
        dy(rounded(b, random_values(d.shape().count(), 5))),
        before(rounded(b, random_values(static_cast<int64_t>(x.size()), 6))),
        before2(rounded(b, random_values(static_cast<int64_t>(x2.size()), 7))),
        before_gamma(random_values(d.c(), 8)),
        before_beta(random_values(d.c(), 9)) {
    all = d.c2 > 0 ? ref::concat(d.x, d.c2, to_double(x), to_double(x2)) : to_double(x);
    if (d.dropout.p > 0) factor = ref::dropout_factor(d.shape(), d.dropout, state);
  }
  ref::GroupNorm truth() const {
    return ref::group_norm(desc, all, to_double(gamma), to_double(beta), factor);
  }
  ref::GroupNormGradient gradient() const {
    return ref::group_norm_backward(desc, all, to_double(gamma), to_double(beta), factor,
                                    to_double(dy));
  }
};

struct Result {
  std::vector<float> mean_rstd, y, dx, dx2, dgamma, dbeta;
};

// Statistics, scale and shift, apply and backward, in a row.
Result run(Backend& backend, const Problem& t, Write write = Write::kOverwrite,
           Write write2 = Write::kOverwrite, Write write_parameters = Write::kOverwrite,
           bool in_place = false) {
  const GroupNormDesc& d = t.desc;
  const int64_t n = d.x.n;
  test::Bench b(backend);
  const auto destination = [&](const std::vector<float>& before, Write w) {
    return w == Write::kAccumulate ? b.inout(before) : b.out(static_cast<int64_t>(before.size()));
  };
  const auto activation_destination = [&](const std::vector<float>& before, Write w) {
    return w == Write::kAccumulate ? b.activation_inout(before)
                                   : b.activation_out(static_cast<int64_t>(before.size()));
  };
  const In x = b.activation(t.x), gamma = b.in(t.gamma), beta = b.in(t.beta);
  const In dy = b.activation(t.dy), x2 = d.c2 > 0 ? b.activation(t.x2) : In{};
  const In state = d.dropout.p > 0 ? b.state(t.state) : In{};
  const StatsDesc sd{d.x, d.tile}, sd2{{d.x.n, d.x.h, d.x.w, d.c2}, d.tile};
  const Out stats = b.out(sd.count()), stats2 = d.c2 > 0 ? b.out(sd2.count()) : Out{};
  const Out scale_shift = b.out(n * d.c() * 2), mean_rstd = b.out(n * d.groups * 2);
  const Out y = b.activation_out(d.shape().count());
  b.run(backend.channel_stats(sd, x, stats));
  if (d.c2 > 0) b.run(backend.channel_stats(sd2, x2, stats2));
  const Call merge = backend.group_norm_scale_shift(d, {stats.slot}, {stats2.slot}, gamma, beta,
                                                    scale_shift, mean_rstd);
  CHECK(merge.reads.size() == (d.c2 > 0 ? 4u : 3u));
  b.run(merge);
  b.run(backend.group_norm_apply(d, x, x2, {scale_shift.slot}, state, y));

  const Out dx = in_place ? Out{dy.slot} : activation_destination(t.before, write);
  const Out dx2 = d.c2 > 0 ? activation_destination(t.before2, write2) : Out{};
  const Out dgamma = destination(t.before_gamma, write_parameters);
  const Out dbeta = destination(t.before_beta, write_parameters);
  const In sums = t.sums.empty() ? In{} : b.in(t.sums);
  b.run(backend.group_norm_backward(d, x, x2, {scale_shift.slot}, {mean_rstd.slot}, gamma, state,
                                    dy, sums, dx, write, dx2, write2, dgamma, dbeta,
                                    write_parameters));
  return {b.get(mean_rstd),     b.get_activation(y),
          b.get_activation(dx), d.c2 > 0 ? b.get_activation(dx2) : std::vector<float>{},
          b.get(dgamma),        b.get(dbeta)};
}

ref::Vector plus(ref::Vector a, const std::vector<float>& b, Write write) {
  if (write == Write::kAccumulate)
    for (size_t i = 0; i < a.size(); ++i) a[i] += static_cast<double>(b[i]);
  return a;
}

GroupNormDesc desc_of(const Case& c, bool silu, float p) {
  return {.x = c.x, .c2 = c.c2, .groups = c.groups, .silu = silu, .dropout = {p, 3}};
}

// Relative to the gradient, or to a tenth of its largest term, rstd dy: in a group of two values
// the terms cancel to almost nothing.
double dx_error(const std::vector<float>& got, const ref::Vector& expected, double rstd,
                const std::vector<float>& dy) {
  double difference = 0, norm = 0, direct = 0;
  for (size_t i = 0; i < got.size(); ++i) {
    difference += std::pow(static_cast<double>(got[i]) - expected.at(i), 2);
    norm += expected[i] * expected[i];
  }
  for (const float v : dy) direct += std::pow(0.1 * rstd * static_cast<double>(v), 2);
  return std::sqrt(difference / std::max(norm, direct));
}

// dx and dx2 are rounded to the backend's type once, after the sum with what was there.
void check_gradients(const Backend& backend, const Problem& t, const Result& r, double tolerance,
                     Write write = Write::kOverwrite, Write write2 = Write::kOverwrite,
                     Write write_parameters = Write::kOverwrite) {
  const auto g = t.gradient();
  const GroupNormDesc& d = t.desc;
  const ref::Vector rstd = t.truth().rstd;
  const double largest = *std::max_element(rstd.begin(), rstd.end());
  const auto dx = ref::channels(d.shape(), g.dx, 0, d.x.c);
  CHECK(dx_error(r.dx, plus(dx, t.before, write), largest, t.dy) <=
        rounding(backend, tolerance, dx.size()));
  if (d.c2 > 0) {
    const auto dx2 = ref::channels(d.shape(), g.dx, d.x.c, d.c2);
    CHECK(dx_error(r.dx2, plus(dx2, t.before2, write2), largest, t.dy) <=
          rounding(backend, tolerance, dx2.size()));
  }
  CHECK(relative_error(r.dgamma, plus(g.dgamma, t.before_gamma, write_parameters)) <= tolerance);
  CHECK(relative_error(r.dbeta, plus(g.dbeta, t.before_beta, write_parameters)) <= tolerance);
}

}  // namespace

TEST_CASE("group_norm: the reference's gradients are its finite differences", "[group_norm]") {
  for (const bool silu : {false, true})
    for (const float p : {0.0f, 0.3f}) {
      const Problem t(*make_cpu_backend({}), desc_of({{2, 2, 3, 4}, 2, 3}, silu, p));
      const auto gamma = to_double(t.gamma), beta = to_double(t.beta), dy = to_double(t.dy);
      const auto loss = [&](const ref::Vector& x, const ref::Vector& g, const ref::Vector& b) {
        return ref::dot(ref::group_norm(t.desc, x, g, b, t.factor).y, dy);
      };
      const auto g = t.gradient();
      const auto by_x = [&](const ref::Vector& v) { return loss(v, gamma, beta); };
      const auto by_gamma = [&](const ref::Vector& v) { return loss(t.all, v, beta); };
      const auto by_beta = [&](const ref::Vector& v) { return loss(t.all, gamma, v); };
      CHECK(relative_error(g.dx, ref::difference_gradient(by_x, t.all)) < 1e-7);
      CHECK(relative_error(g.dgamma, ref::difference_gradient(by_gamma, gamma)) < 1e-7);
      CHECK(relative_error(g.dbeta, ref::difference_gradient(by_beta, beta)) < 1e-7);
    }
}

namespace {

// Forward: five roundings. Backward: besides, sums of up to a thousand random signs in fp32 tiles,
// and cancellation between the terms of dx where a group has few values. bf16: one rounding more.
void check_shapes(Backend& backend, bool silu) {
  for (const Case& c : kCases)
    for (const float p : {0.0f, 0.1f}) {
      const Problem t(backend, desc_of(c, silu, p));
      INFO(to_string(c.x) << " and " << c.c2 << ", groups " << c.groups << " silu " << silu << " p "
                          << p);
      const Result r = run(backend, t);
      const auto truth = t.truth();
      CHECK(relative_error(r.y, truth.y) <= rounding(backend, 1e-6, r.y.size()));
      for (size_t i = 0; i < truth.mean.size(); ++i) {
        CHECK(std::abs(r.mean_rstd[2 * i] - truth.mean[i]) <= 2e-7);
        CHECK(r.mean_rstd[2 * i + 1] == Approx(truth.rstd[i]).epsilon(2e-6));
      }
      check_gradients(backend, t, r, 5e-6);
    }
}

// As a convolution leaves them: (N, tiles, 2, C), of dz and of dz (x - mean).
std::vector<float> tile_sums(const Problem& t) {
  const Shape s = t.desc.shape();
  const int tiles = StatsDesc{s}.tiles(), size = s.c / t.desc.groups;
  const ref::Vector mean = t.truth().mean;
  ref::Vector sums(static_cast<size_t>(StatsDesc{s}.count()), 0.0);
  for (int n = 0; n < s.n; ++n)
    for (int64_t p = 0; p < s.pixels(); ++p)
      for (int c = 0; c < s.c; ++c) {
        const size_t i = static_cast<size_t>((n * s.pixels() + p) * s.c + c);
        const size_t to = static_cast<size_t>((n * tiles + p / 64) * 2 * s.c + c);
        const double dz = static_cast<double>(t.dy[i]);
        sums[to] += dz;
        sums[to + static_cast<size_t>(s.c)] +=
            dz * (t.all[i] - mean[static_cast<size_t>(n * t.desc.groups + c / size)]);
      }
  return {sums.begin(), sums.end()};
}

// From dz and its sums: SiLU and dropout are behind it.
void check_summed(Backend& backend) {
  for (const Case& c : kCases) {
    const Problem plain(backend, desc_of(c, false, 0));
    Problem t = plain;
    t.desc.silu = true;
    t.desc.dropout = {0.25f, 3};
    t.sums = tile_sums(plain);
    INFO(to_string(c.x) << " and " << c.c2 << ", groups " << c.groups);
    check_gradients(backend, plain, run(backend, t), 5e-6);
    check_gradients(backend, plain, run(backend, t, Write::kAccumulate, Write::kAccumulate), 5e-6,
                    Write::kAccumulate, Write::kAccumulate);
  }
}

void check_write_modes(Backend& backend, int first, int last) {
  for (const Case& c : kCases)
    for (int bits = first; bits < last; ++bits) {
      const auto mode = [&](int bit) {
        return bits >> bit & 1 ? Write::kAccumulate : Write::kOverwrite;
      };
      const Problem t(backend, desc_of(c, true, bits & 1 ? 0.25f : 0.0f));
      INFO(to_string(c.x) << " and " << c.c2 << ", groups " << c.groups << " modes " << bits);
      const Result r = run(backend, t, mode(0), mode(1), mode(2));
      check_gradients(backend, t, r, 5e-6, mode(0), mode(1), mode(2));
    }
}

void check_in_place(Backend& backend) {
  for (const Case& c :
       {Case{{2, 9, 8, 40}, 0, 8}, Case{{3, 7, 5, 64}, 0, 16}, Case{{1, 5, 5, 13}, 0, 1}}) {
    const Problem t(backend, desc_of(c, true, 0.1f));
    const Result apart = run(backend, t);
    const Result in_place =
        run(backend, t, Write::kOverwrite, Write::kOverwrite, Write::kOverwrite, true);
    CHECK((apart.dx == in_place.dx));
    CHECK((apart.dgamma == in_place.dgamma));
  }
}

// fp32 holds x itself to 6e-8 * 1000 of a deviation; the variance must not be worse. bf16 can hold
// no such tensor: it has 8 bits.
void check_offset(Backend& backend, float deviations = 1000) {
  for (const float scale : {1e-2f, 1.0f, 1e4f})
    for (const Case& c :
         {Case{{2, 16, 16, 32}, 0, 8}, Case{{1, 13, 9, 20}, 4, 3}, Case{{1, 32, 32, 3}, 0, 1}}) {
      const Problem t(backend, desc_of(c, false, 0), 1.732f * scale, deviations * scale);
      INFO(to_string(c.x) << " scale " << scale);
      const Result r = run(backend, t);
      const auto truth = t.truth();
      for (size_t i = 0; i < truth.rstd.size(); ++i) {
        const double rstd = static_cast<double>(r.mean_rstd[2 * i + 1]);
        CHECK(std::abs(truth.rstd[i] * truth.rstd[i] / (rstd * rstd) - 1) <= 1e-5);
      }
      CHECK(relative_error(r.y, truth.y) <= rounding(backend, 1e-4, r.y.size()));
      check_gradients(backend, t, r, 1e-4);
    }
}

void check_scales(Backend& backend) {
  for (const float scale : {1e4f, 1e-4f}) {
    const Problem t(backend, desc_of({{2, 8, 8, 48}, 16, 8}, true, 0), scale, 0);
    const Result r = run(backend, t);
    CHECK(relative_error(r.y, t.truth().y) <= rounding(backend, 1e-6, r.y.size()));
    check_gradients(backend, t, r, 5e-6);
  }
}

void check_tiles(Backend& backend) {
  for (const int tile : {1, 5, 64, 1000}) {
    GroupNormDesc d = desc_of({{2, 9, 9, 12}, 6, 6}, true, 0);
    d.tile = tile;
    const Problem t(backend, d);
    const Result r = run(backend, t);
    CHECK(relative_error(r.y, t.truth().y) <= rounding(backend, 1e-6, r.y.size()));
  }
}

bool same(const Result& a, const Result& b) {
  return a.mean_rstd == b.mean_rstd && a.y == b.y && a.dx == b.dx && a.dx2 == b.dx2 &&
         a.dgamma == b.dgamma && a.dbeta == b.dbeta;
}

// The same tensors, cut after the first image.
void check_first_image(Backend& backend, const Problem& t, const Result& all) {
  GroupNormDesc d = t.desc;
  d.x.n = 1;
  Problem first(backend, d);
  first.x.assign(t.x.begin(), t.x.begin() + static_cast<int64_t>(first.x.size()));
  first.x2.assign(t.x2.begin(), t.x2.begin() + static_cast<int64_t>(first.x2.size()));
  first.dy.assign(t.dy.begin(), t.dy.begin() + static_cast<int64_t>(first.dy.size()));
  const Result one = run(backend, first);
  CHECK(std::equal(one.y.begin(), one.y.end(), all.y.begin()));
  CHECK(std::equal(one.dx.begin(), one.dx.end(), all.dx.begin()));
  CHECK(std::equal(one.dx2.begin(), one.dx2.end(), all.dx2.begin()));
}

void check_dropout(Backend& backend) {
  for (const Shape& s : {Shape{3, 1, 1, 1}, Shape{2, 3, 5, 7}, Shape{2, 4, 4, 24},
                         Shape{1, 8, 8, 100}, Shape{2, 2, 3, 513}, Shape{1, 3, 1, 1100}})
    for (const float p : {0.1f, 0.5f, 0.9f}) {
      GroupNormDesc d{.x = s, .groups = 1, .dropout = {p, 65535}};
      const StepState state{.seed = 9, .step = 3, .first_image = 6};
      // scale 0, shift 1: what comes out is the factor itself.
      std::vector<float> scale_shift;
      for (int i = 0; i < s.n * s.c; ++i) scale_shift.insert(scale_shift.end(), {0.0f, 1.0f});
      test::Bench b(backend);
      const In x = b.activation(random_values(s.count(), 1)), ss = b.in(scale_shift);
      const In st = b.state(state);
      const Out y = b.activation_out(s.count());
      b.run(backend.group_norm_apply(d, x, {}, ss, st, y));
      const auto expected = ref::dropout_factor(s, d.dropout, state);
      const auto got = b.get_activation(y);
      INFO(to_string(s) << " p " << p);
      int64_t wrong = 0;
      for (size_t i = 0; i < got.size(); ++i)
        wrong += (got[i] == 0) != (expected[i] == 0) ||
                 std::abs(got[i] - expected[i]) > rounding(backend, 2e-7, 1) * expected[i];
      CHECK(wrong == 0);
    }
}

void check_nan(Backend& backend) {
  Problem t(backend, desc_of({{2, 4, 4, 12}, 0, 3}, true, 0));
  t.x[5] = NAN;  // image 0, group 1
  const Result r = run(backend, t);
  for (size_t i = 0; i < r.y.size(); ++i)
    CHECK(std::isnan(r.y[i]) == (i < 16 * 12 && i % 12 / 4 == 1));
}

void check_refusals(Backend& backend) {
  const auto apply = [&](const GroupNormDesc& d, In x2, In state) {
    return backend.group_norm_apply(d, {0}, x2, {1}, state, {2});
  };
  const auto backward = [&](const GroupNormDesc& d, In x2, Out dx, Out dx2) {
    return backend.group_norm_backward(d, {0}, x2, {1}, {2}, {3}, {}, {4}, {}, dx,
                                       Write::kOverwrite, dx2, Write::kOverwrite, {7}, {8},
                                       Write::kOverwrite);
  };
  CHECK_THROWS_AS(apply({.x = {1, 2, 2, 5}, .groups = 2}, {}, {}), Error);
  CHECK_THROWS_AS(apply({.x = {1, 2, 2, 4}, .c2 = 2, .groups = 2}, {}, {}), Error);
  CHECK_THROWS_AS(apply({.x = {1, 2, 2, 4}, .groups = 2}, {3}, {}), Error);
  CHECK_THROWS_AS(apply({.x = {1, 2, 2, 4}, .groups = 2, .dropout = {0.1f, 0}}, {}, {}), Error);
  CHECK_THROWS_AS(apply({.x = {1, 2, 2, 4}, .groups = 2, .dropout = {1.0f, 0}}, {}, {3}), Error);
  CHECK_THROWS_AS(apply({.x = {0, 2, 2, 4}, .groups = 2}, {}, {}), Error);
  CHECK_THROWS_AS(backward({.x = {1, 2, 2, 4}, .groups = 2}, {}, {}, {}), Error);
  CHECK_THROWS_AS(backward({.x = {1, 2, 2, 4}, .groups = 2}, {}, {5}, {6}), Error);
  CHECK_THROWS_AS(backward({.x = {1, 2, 2, 4}, .c2 = 4, .groups = 2}, {9}, {5}, {}), Error);
}

const auto cpu = [](int threads = 2) { return make_cpu_backend({.threads = threads}); };
const auto simt32 = [] { return test::make_kernel_backend(DType::kF32); };
const auto simt16 = [] { return test::make_kernel_backend(DType::kBF16); };

}  // namespace

TEST_CASE("group_norm_apply: every shape, SiLU and dropout", "[group_norm]") {
  for (const bool silu : {false, true}) check_shapes(*cpu(), silu);
}
TEST_CASE("simt.group_norm: every shape in fp32, SiLU and dropout", "[group_norm]") {
  check_shapes(*simt32(), true);
}
TEST_CASE("simt.group_norm: every shape in bf16, SiLU and dropout", "[group_norm]") {
  check_shapes(*simt16(), true);
}
TEST_CASE("simt.group_norm: every shape without SiLU, dropout", "[group_norm]") {
  check_shapes(*simt16(), false);
}

TEST_CASE("group_norm_backward: every combination of write modes", "[group_norm]") {
  check_write_modes(*cpu(), 1, 8);
}
TEST_CASE("simt.group_norm_backward: write modes in fp32", "[group_norm]") {
  check_write_modes(*simt32(), 2, 4);
}
TEST_CASE("simt.group_norm_backward: write modes in fp32, gamma and beta too", "[group_norm]") {
  check_write_modes(*simt32(), 5, 7);
}
TEST_CASE("simt.group_norm_backward: write modes in bf16", "[group_norm]") {
  check_write_modes(*simt16(), 1, 3);
}
TEST_CASE("simt.group_norm_backward: write modes in bf16, gamma and beta too", "[group_norm]") {
  check_write_modes(*simt16(), 6, 8);
}

TEST_CASE("simt.group_norm_backward: from the gradient at z and its sums", "[group_norm]") {
  check_summed(*simt32());
  check_summed(*simt16());
}
TEST_CASE("group_norm_backward: sums that no convolution of the CPU gives", "[group_norm]") {
  Problem t(*cpu(), desc_of(kCases[6], true, 0));
  t.sums = tile_sums(t);
  CHECK_THROWS_AS(run(*cpu(), t), Error);
}

TEST_CASE("group_norm_backward: dx in the memory of dy", "[group_norm]") { check_in_place(*cpu()); }
TEST_CASE("simt.group_norm_backward: dx in the memory of dy", "[group_norm]") {
  check_in_place(*simt32());
  check_in_place(*simt16());
}

TEST_CASE("group_norm: a mean a thousand deviations from zero", "[group_norm]") {
  check_offset(*cpu());
}
TEST_CASE("simt.group_norm: a mean a thousand deviations from zero", "[group_norm]") {
  check_offset(*simt32());
  check_offset(*simt16(), 30);
}

TEST_CASE("group_norm: values of 1e4 and of 1e-4", "[group_norm]") { check_scales(*cpu()); }
TEST_CASE("simt.group_norm: values of 1e4 and of 1e-4", "[group_norm]") {
  check_scales(*simt32());
  check_scales(*simt16());
}

TEST_CASE("group_norm: tiles of any size give the same statistics", "[group_norm]") {
  check_tiles(*cpu());
}
TEST_CASE("simt.group_norm: tiles of any size give the same statistics", "[group_norm]") {
  check_tiles(*simt32());
  check_tiles(*simt16());
}

TEST_CASE("group_norm: an image's bits depend on neither batch nor threads", "[group_norm]") {
  const auto backend = cpu();
  const Problem t(*backend, desc_of({{5, 16, 16, 24}, 8, 4}, true, 0));
  const Result all = run(*backend, t);
  CHECK(same(all, run(*cpu(3), t)));
  check_first_image(*backend, t, all);
}
TEST_CASE("simt.group_norm: an image's bits depend on neither batch nor order", "[group_norm]") {
  for (const DType type : {DType::kF32, DType::kBF16})
    for (const Case& c : {Case{{3, 16, 16, 24}, 8, 4}, Case{{4, 5, 7, 9}, 6, 5}}) {
      const auto backend = test::make_kernel_backend(type);
      const Problem t(*backend, desc_of(c, true, 0.1f));
      const Result all = run(*backend, t);
      simt::options().seed = 77;
      const Result again = run(*backend, t);
      simt::options().seed = 0;
      CHECK(same(all, again));
      check_first_image(*backend, t, all);
    }
}

TEST_CASE("group_norm_apply: dropout's decisions are those of the Philox address", "[group_norm]") {
  check_dropout(*cpu());
}
TEST_CASE("simt.group_norm_apply: dropout's decisions are those of the Philox address",
          "[group_norm]") {
  check_dropout(*simt32());
  check_dropout(*simt16());
}

TEST_CASE("group_norm: NaN stays in its group", "[group_norm]") { check_nan(*cpu()); }
TEST_CASE("simt.group_norm: NaN stays in its group", "[group_norm]") {
  check_nan(*simt32());
  check_nan(*simt16());
}

TEST_CASE("group_norm: wrong shapes are refused", "[group_norm]") { check_refusals(*cpu()); }
TEST_CASE("simt.group_norm: wrong shapes are refused", "[group_norm]") {
  check_refusals(*simt32());
}

namespace {

// Inputs of a group norm: C, c2 and the resolution, in both networks; 32 groups.
std::vector<Case> network_cases() {
  std::vector<Case> cases;
  const auto add = [&](int size, std::initializer_list<std::pair<int, int>> channels) {
    for (const auto& [c, c2] : channels) cases.push_back({{1, size, size, c}, c2, 32});
  };
  add(32, {{128, 0}, {256, 0}, {256, 128}, {128, 128}, {512, 0}, {256, 256}, {512, 256}});
  add(16, {{128, 0}, {256, 0}, {256, 128}, {256, 256}, {512, 0}, {512, 256}, {512, 512}});
  add(8, {{256, 0}, {256, 256}, {512, 0}, {512, 512}});
  add(4, {{256, 0}, {256, 256}});
  add(64, {{128, 0}, {256, 0}, {256, 128}, {256, 256}});
  add(128, {{128, 0}, {128, 128}, {256, 128}});
  add(256, {{128, 0}, {128, 128}});
  return cases;
}

// Values that repeat after a prime number, made once: the largest tensors are large.
std::vector<bf16> repeated(int64_t count, uint64_t seed) {
  std::vector<bf16> piece, all(static_cast<size_t>(count));
  for (const float v : random_values(65521, seed, 1, 0.2f)) piece.push_back(to_bf16(v));
  for (size_t i = 0; i < all.size(); i += piece.size())
    std::copy_n(piece.begin(), std::min(piece.size(), all.size() - i),
                all.begin() + static_cast<int64_t>(i));
  return all;
}

float dropout_factor_at(const Dropout& d, const StepState& state, int64_t element) {
  const RandomStream stream{.seed = state.seed,
                            .purpose = Purpose::kDropout,
                            .sample = 0,
                            .step = static_cast<uint32_t>(state.step),
                            .layer = d.layer};
  const Philox4 words = stream.block(static_cast<uint32_t>(element / 8));
  return dropout_bits(words, static_cast<int>(element % 8)) >= d.threshold() ? 1 / (1 - d.p) : 0;
}

}  // namespace

// Some blocks of each; what they wrote, element by element.
TEST_CASE("simt.group_norm_apply: the networks' shapes", "[group_norm]") {
  const auto backend = test::make_kernel_backend(DType::kBF16);
  const StepState state{.seed = 3, .step = 9};
  simt::options().max_blocks = 3;
  for (const Case& c : network_cases()) {
    const GroupNormDesc d = desc_of(c, true, 0.1f);
    const int64_t count = d.shape().count();
    const auto x = repeated(c.x.count(), 1), x2 = repeated(count - c.x.count(), 2);
    const auto scale_shift = random_values(2 * d.c(), 3);
    test::Bench b(*backend);
    const In xs = b.in(x), x2s = c.c2 > 0 ? b.in(x2) : In{}, ss = b.in(scale_shift);
    const In st = b.state(state);
    const Out y = b.activation_out(count);
    b.run(backend->group_norm_apply(d, xs, x2s, ss, st, y));
    const auto got = b.get<bf16>(y);
    int64_t written = 0, wrong = 0;
    for (int64_t i = 0; i < count; ++i) {
      if (got[static_cast<size_t>(i)].bits == 0xFFFF) continue;
      const int64_t pixel = i / d.c(), k = i % d.c();
      const bf16 value = k < c.x.c ? x[static_cast<size_t>(pixel * c.x.c + k)]
                                   : x2[static_cast<size_t>(pixel * c.c2 + k - c.x.c)];
      const float* pair = scale_shift.data() + 2 * k;
      const double z = static_cast<double>(to_float(value)) * static_cast<double>(pair[0]) +
                       static_cast<double>(pair[1]);
      const double expected =
          ref::silu(z) * static_cast<double>(dropout_factor_at(d.dropout, state, i));
      ++written;
      // One rounding to bf16, and z's to fp32.
      wrong += !(std::abs(to_float(got[static_cast<size_t>(i)]) - expected) <=
                 0x1p-8 * std::abs(expected) + 5e-7);
    }
    INFO(to_string(c.x) << " and " << c.c2);
    CHECK(written >= std::min<int64_t>(count, 3 * 2048));
    CHECK(wrong == 0);
  }
  simt::options().max_blocks = 0;
}

namespace {

// All kernels of each shape, whose height is cut where it has more than 2^16 elements: pixels are
// only counted. In bf16.
void check_network(bool small) {
  const auto backend = test::make_kernel_backend(DType::kBF16);
  for (Case c : network_cases()) {
    if ((c.x.h < 32) != small) continue;
    c.x.h = std::max(std::min(c.x.h, 65536 / (c.x.w * (c.x.c + c.c2))), 1);
    const Problem t(*backend, desc_of(c, true, 0.1f));
    INFO(to_string(c.x) << " and " << c.c2);
    const Result r = run(*backend, t, Write::kOverwrite, Write::kAccumulate);
    CHECK(relative_error(r.y, t.truth().y) <= rounding(*backend, 1e-6, r.y.size()));
    check_gradients(*backend, t, r, 5e-6, Write::kOverwrite, Write::kAccumulate);
  }
}

}  // namespace

TEST_CASE("simt.group_norm: the networks' shapes from 32 x 32 up", "[group_norm]") {
  check_network(false);
}
TEST_CASE("simt.group_norm: the networks' shapes below 32 x 32", "[group_norm]") {
  check_network(true);
}
