#include <catch2/catch.hpp>

#include <cstring>

#include "tests/reference/conv.h"
#include "tests/support.h"

using namespace ddpm;
using test::random_values;
using test::relative_error;
using test::to_double;

namespace {

// Rounding of a sum of `terms` products of random signs grows with sqrt(terms).
double tolerance(int64_t terms) { return 1e-7 * (2 + std::sqrt(static_cast<double>(terms))); }

struct ConvShape {
  int n, h, w, c, k, r = 3, s = 3, stride = 1;
  int top = 1, left = 1, bottom = 1, right = 1;
};

const std::vector<ConvShape> kShapes = {
    // The network's: in, body, down (diffusers' and symmetric padding), out, shortcut.
    {2, 8, 8, 3, 32},
    {2, 8, 8, 32, 32},
    {1, 4, 4, 64, 48},
    {3, 6, 6, 48, 32},
    {2, 8, 8, 16, 16, 3, 3, 2, 0, 0, 1, 1},
    {2, 8, 8, 16, 16, 3, 3, 2},
    {2, 8, 8, 32, 3},
    {2, 4, 4, 64, 32, 1, 1, 1, 0, 0, 0, 0},
    {1, 8, 8, 64, 64},
    {2, 16, 16, 16, 32},
    {1, 4, 4, 256, 16},
    // One of anything, odd, prime.
    {1, 1, 1, 1, 1},
    {1, 1, 1, 16, 16},
    {1, 3, 3, 1, 1},
    {2, 1, 9, 16, 16},
    {2, 9, 1, 16, 16},
    {1, 7, 5, 3, 5},
    {5, 5, 7, 13, 17},
    {1, 11, 13, 7, 1},
    {1, 13, 11, 1, 7},
    {7, 2, 2, 16, 32},
    {2, 9, 10, 32, 16},
    {1, 17, 19, 16, 16},
    {3, 5, 6, 31, 33},
    // Other filters, strides and pads.
    {2, 8, 8, 8, 12, 1, 1, 2, 0, 0, 0, 0},
    {2, 7, 9, 3, 3, 1, 1, 1, 0, 0, 0, 0},
    {1, 9, 9, 8, 8, 5, 5, 1, 2, 2, 2, 2},
    {1, 12, 10, 3, 16, 7, 7, 2, 3, 3, 3, 3},
    {2, 8, 8, 16, 16, 3, 3, 1, 0, 0, 0, 0},
    {1, 6, 7, 4, 6, 2, 2, 2, 0, 0, 0, 0},
    {1, 8, 9, 5, 6, 1, 3, 1, 0, 1, 0, 1},
    {1, 9, 8, 5, 6, 3, 1, 1, 1, 0, 1, 0},
    {2, 7, 7, 16, 16, 3, 3, 2, 0, 0, 1, 1},
    {1, 8, 8, 6, 4, 4, 4, 2, 1, 1, 1, 1},
    {1, 5, 5, 16, 16, 3, 3, 1, 2, 0, 1, 2},
    {1, 6, 6, 4, 4, 6, 6, 1, 0, 0, 0, 0},
};

ConvDesc make_desc(const ConvShape& s) {
  ConvDesc d;
  d.x = {s.n, s.h, s.w, s.c};
  d.k = s.k;
  d.r = s.r;
  d.s = s.s;
  d.stride = s.stride;
  d.pad_top = s.top;
  d.pad_left = s.left;
  d.pad_bottom = s.bottom;
  d.pad_right = s.right;
  return d;
}

std::string describe(const ConvDesc& d) {
  return format("%s by %s stride %d pads %d %d %d %d bias %d sample %d residual %d",
                to_string(d.x).c_str(), to_string(d.filter()).c_str(), d.stride, d.pad_top,
                d.pad_left, d.pad_bottom, d.pad_right, d.bias, d.sample_bias_stride, d.residual);
}

// Seeded tensors of a desc the CPU takes, and a gradient of the output.
struct ConvData {
  std::vector<float> x, filter, bias, sample_bias, residual, dy;
  explicit ConvData(const ConvDesc& d)
      : x(random_values(d.x.count(), 11)),
        filter(random_values(d.filter().count(), 12)),
        bias(random_values(d.bias ? d.k : 0, 13)),
        sample_bias(random_values(int64_t{d.x.n} * d.sample_bias_stride, 14)),
        residual(random_values(d.residual ? d.y().count() : 0, 15)),
        dy(random_values(d.y().count(), 16)) {}
  ref::ConvTensors reference() const {
    return {.x = to_double(x),
            .filter = to_double(filter),
            .bias = to_double(bias),
            .sample_bias = to_double(sample_bias),
            .residual = to_double(residual)};
  }
};

// The filter as the pass reads it: packed where the backend says so.
In packed_filter(Backend& backend, test::Bench& bench, const ConvDesc& d, ConvPass pass,
                 const std::vector<float>& filter) {
  const In plain = bench.in(filter);
  const size_t bytes = backend.packed_bytes(d, pass);
  if (bytes == 0) return plain;
  const Out packed = bench.out<uint8_t>(static_cast<int64_t>(bytes));
  bench.run(backend.conv_pack(d, pass, plain, packed));
  return {packed.slot};
}

std::vector<float> forward(Backend& backend, const ConvDesc& d, const ConvData& t) {
  test::Bench bench(backend);
  ConvSlots s;
  s.x = bench.in(t.x);
  s.filter = packed_filter(backend, bench, d, ConvPass::kForward, t.filter);
  if (d.bias) s.bias = bench.in(t.bias);
  if (d.sample_bias_stride > 0) s.sample_bias = bench.in(t.sample_bias);
  if (d.residual) s.residual = bench.in(t.residual);
  const Out y = bench.out(d.y().count());
  const auto call = backend.conv_forward(d, s, y, {});
  REQUIRE(call.has_value());
  CHECK(call->reads.size() == 2u + d.bias + d.residual + (d.sample_bias_stride > 0));
  bench.run(*call);
  return bench.get(y);
}

std::vector<float> dgrad(Backend& backend, const ConvDesc& d, const ConvData& t, Write write,
                         const std::vector<float>& before) {
  test::Bench bench(backend);
  ConvSlots s;
  s.filter = packed_filter(backend, bench, d, ConvPass::kDgrad, t.filter);
  const In dy = bench.in(t.dy);
  const Out dx = write == Write::kAccumulate ? bench.inout(before) : bench.out(d.x.count());
  const auto call = backend.conv_dgrad(d, s, dy, dx, write);
  REQUIRE(call.has_value());
  bench.run(*call);
  return bench.get(dx);
}

std::vector<float> wgrad(Backend& backend, const ConvDesc& d, const ConvData& t, Write write,
                         const std::vector<float>& before) {
  test::Bench bench(backend);
  ConvSlots s;
  s.x = bench.in(t.x);
  const In dy = bench.in(t.dy);
  const Out df = write == Write::kAccumulate ? bench.inout(before) : bench.out(d.filter().count());
  const auto call = backend.conv_wgrad(d, s, dy, df, write);
  REQUIRE(call.has_value());
  bench.run(*call);
  return bench.get(df);
}

std::vector<double> plus(std::vector<double> a, const std::vector<float>& b) {
  for (size_t i = 0; i < a.size(); ++i) a[i] += static_cast<double>(b[i]);
  return a;
}

void check_forward(Backend& backend, ConvDesc d) {
  const int64_t terms = int64_t{d.r} * d.s * d.c();
  for (int extras = 0; extras < 8; ++extras) {
    d.bias = extras & 1;
    d.residual = extras & 2;
    d.sample_bias_stride = extras & 4 ? 2 * d.k + 3 : 0;
    d.sample_bias_offset = extras & 4 ? d.k + 1 : 0;
    const ConvData t(d);
    INFO("forward " << describe(d));
    CHECK(relative_error(forward(backend, d, t), ref::conv_forward(d, t.reference())) <=
          tolerance(terms));
  }
}

void check_backward(Backend& backend, const ConvDesc& d) {
  const ConvData t(d);
  INFO("backward " << describe(d));
  const auto dx = ref::conv_dgrad(d, to_double(t.filter), to_double(t.dy));
  const auto dx_before = random_values(d.x.count(), 17);
  const int64_t dx_terms = int64_t{d.r} * d.s * d.k;
  CHECK(relative_error(dgrad(backend, d, t, Write::kOverwrite, {}), dx) <= tolerance(dx_terms));
  CHECK(relative_error(dgrad(backend, d, t, Write::kAccumulate, dx_before), plus(dx, dx_before)) <=
        tolerance(dx_terms));
  const auto df = ref::conv_wgrad(d, to_double(t.x), to_double(t.dy));
  const auto df_before = random_values(d.filter().count(), 18);
  const int64_t df_terms = d.x.n * d.y().pixels();
  CHECK(relative_error(wgrad(backend, d, t, Write::kOverwrite, {}), df) <= tolerance(df_terms));
  CHECK(relative_error(wgrad(backend, d, t, Write::kAccumulate, df_before), plus(df, df_before)) <=
        tolerance(df_terms));
}

double dot(const std::vector<double>& a, const std::vector<double>& b) {
  double sum = 0;
  for (size_t i = 0; i < a.size(); ++i) sum += a[i] * b[i];
  return sum;
}

}  // namespace

TEST_CASE("conv: the reference's gradients are its finite differences", "[conv]") {
  for (size_t i = 0; i < kShapes.size(); i += 3) {
    const ConvDesc d = make_desc(kShapes[i]);
    const ConvData data(d);
    ref::ConvTensors t = data.reference();
    const auto dy = to_double(data.dy);
    const auto loss = [&] { return dot(ref::conv_forward(d, t), dy); };
    // The loss is linear in x and in the filter: central differences are exact up to rounding.
    const auto slope = [&](ref::Vector& along, const ref::Vector& direction) {
      const ref::Vector at = along;
      for (size_t j = 0; j < at.size(); ++j) along[j] = at[j] + 0.5 * direction[j];
      const double up = loss();
      for (size_t j = 0; j < at.size(); ++j) along[j] = at[j] - 0.5 * direction[j];
      const double down = loss();
      along = at;
      return up - down;
    };
    const auto u = to_double(random_values(d.x.count(), 21));
    const auto v = to_double(random_values(d.filter().count(), 22));
    INFO(describe(d));
    CHECK(dot(ref::conv_dgrad(d, t.filter, dy), u) == Approx(slope(t.x, u)).epsilon(1e-9));
    CHECK(dot(ref::conv_wgrad(d, t.x, dy), v) == Approx(slope(t.filter, v)).epsilon(1e-9));
  }
}

TEST_CASE("conv: the reference's fused parts by hand", "[conv]") {
  // One pixel, two and one channels, 1x1 filter, everything fused.
  ConvDesc d;
  d.x = {1, 1, 1, 2};
  d.c2 = 1;
  d.k = d.r = d.s = 1;
  d.pad_top = d.pad_left = d.pad_bottom = d.pad_right = 0;
  d.transform = {.affine = true, .silu = true, .dropout = {.p = 0.5f}};
  d.upsample = true;
  d.bias = d.residual = true;
  d.sample_bias_stride = 3;
  d.sample_bias_offset = 1;
  d.shortcut_c = d.shortcut_c2 = 1;
  const ref::ConvTensors t{.x = {1, 2},
                           .x2 = {3},
                           .scale_shift = {2, 1, 0.5, 0, -1, 1},
                           .mask = {2, 0, 2},
                           .filter = {10, 100, 1000},
                           .bias = {0.25},
                           .sample_bias = {7, 0.5, 7},
                           .residual = {1, 2, 3, 4},
                           .shortcut = {1, 1, 1, 2},
                           .shortcut2 = {1, 1, 3, 1},
                           .shortcut_filter = {5, 6},
                           .shortcut_bias = {0.125}};
  const auto silu = [](double v) { return v / (1 + std::exp(-v)); };
  const double taps = 10 * 2 * silu(3) + 1000 * 2 * silu(-2) + 0.25 + 0.5 + 0.125;
  const auto y = ref::conv_forward(d, t);
  REQUIRE(y.size() == 4);
  CHECK(y[0] == Approx(taps + 1 + 5 + 6).epsilon(1e-14));
  CHECK(y[1] == Approx(taps + 2 + 5 + 6).epsilon(1e-14));
  CHECK(y[2] == Approx(taps + 3 + 5 + 18).epsilon(1e-14));
  CHECK(y[3] == Approx(taps + 4 + 10 + 6).epsilon(1e-14));
}

TEST_CASE("conv: every shape, pass, term and write mode", "[conv]") {
  const auto precision = GENERATE(Precision::kAuto, Precision::kFp32);
  const auto backend = make_cpu_backend({.precision = precision, .threads = 2});
  for (const ConvShape& s : kShapes) {
    check_forward(*backend, make_desc(s));
    check_backward(*backend, make_desc(s));
  }
}

TEST_CASE("conv: any number of threads", "[conv]") {
  for (const int threads : {1, 3}) {
    const auto backend = make_cpu_backend({.threads = threads});
    for (size_t i = 0; i < kShapes.size(); i += 5) {
      check_forward(*backend, make_desc(kShapes[i]));
      check_backward(*backend, make_desc(kShapes[i]));
    }
  }
}

TEST_CASE("conv: large and small magnitudes", "[conv]") {
  const auto backend = make_cpu_backend({.threads = 2});
  const ConvDesc d = make_desc({2, 8, 8, 32, 32});
  for (const float scale : {1e-15f, 1e15f}) {
    ConvData t(d);
    for (float& v : t.x) v *= scale;
    for (float& v : t.filter) v *= scale;
    CHECK(relative_error(forward(*backend, d, t), ref::conv_forward(d, t.reference())) <=
          tolerance(9 * 32));
  }
}

TEST_CASE("conv: an image's bits depend neither on the batch size nor on its place", "[conv]") {
  const auto backend = make_cpu_backend({.threads = 2, .batch_invariant = true});
  const std::vector<ConvShape> shapes = {
      {64, 8, 8, 32, 32},  {64, 8, 8, 3, 16},
      {64, 8, 8, 16, 3},   {64, 4, 4, 64, 64},
      {64, 5, 7, 13, 17},  {64, 8, 8, 16, 16, 3, 3, 2, 0, 0, 1, 1},
      {64, 2, 2, 128, 64}, {64, 8, 8, 48, 32, 1, 1, 1, 0, 0, 0, 0},
  };
  for (const ConvShape& s : shapes)
    for (const bool extras : {false, true}) {
      ConvDesc d = make_desc(s);
      d.bias = true;
      d.residual = extras;
      d.sample_bias_stride = extras ? s.k : 0;
      const ConvData all(d);
      const auto whole = forward(*backend, d, all);
      for (const int n : {1, 2, 7}) {
        d.x.n = n;
        ConvData last(d);  // the last images of the large batch
        last.x.assign(all.x.end() - d.x.count(), all.x.end());
        last.sample_bias.assign(all.sample_bias.end() - int64_t{n} * d.sample_bias_stride,
                                all.sample_bias.end());
        if (extras) last.residual.assign(all.residual.end() - d.y().count(), all.residual.end());
        const auto y = forward(*backend, d, last);
        INFO(describe(d));
        CHECK(std::memcmp(y.data(), whole.data() + whole.size() - y.size(),
                          y.size() * sizeof(float)) == 0);
      }
    }
}

TEST_CASE("conv: two runs give the same bits", "[conv]") {
  const auto backend = make_cpu_backend({.threads = 2});
  for (const ConvShape& s : {ConvShape{2, 8, 8, 32, 32}, ConvShape{2, 8, 8, 3, 16}}) {
    const ConvDesc d = make_desc(s);
    const ConvData t(d);
    CHECK(wgrad(*backend, d, t, Write::kOverwrite, {}) ==
          wgrad(*backend, d, t, Write::kOverwrite, {}));
    CHECK(dgrad(*backend, d, t, Write::kOverwrite, {}) ==
          dgrad(*backend, d, t, Write::kOverwrite, {}));
  }
}

TEST_CASE("conv: leaves to the caller what it does not fuse", "[conv]") {
  const auto backend = make_cpu_backend({.threads = 1});
  const ConvDesc plain = make_desc({1, 4, 4, 8, 8});
  std::vector<ConvDesc> fused(5, plain);
  fused[0].c2 = 8;
  fused[1].transform.silu = true;
  fused[2].upsample = true;
  fused[3].shortcut_c = 8;
  fused[4].statistics = true;
  const ConvSlots slots;
  for (const ConvDesc& d : fused) {
    CHECK_FALSE(backend->conv_forward(d, slots, Out{0}, {}).has_value());
    CHECK_FALSE(backend->conv_dgrad(d, slots, In{0}, Out{1}, Write::kOverwrite).has_value());
    CHECK_FALSE(backend->conv_wgrad(d, slots, In{0}, Out{1}, Write::kOverwrite).has_value());
    CHECK(backend->packed_bytes(d, ConvPass::kForward) == 0);
  }
}

TEST_CASE("conv: refuses what it cannot mean", "[conv]") {
  const auto backend = make_cpu_backend({.threads = 1});
  ConvSlots slots;
  slots.x = {0};
  slots.filter = {1};
  const auto make = [&](const ConvDesc& d) { backend->conv_forward(d, slots, Out{2}, {}); };
  ConvDesc d = make_desc({1, 4, 4, 8, 8});
  make(d);
  d.bias = true;  // no slot for it
  CHECK_THROWS_AS(make(d), Error);
  d = make_desc({0, 4, 4, 8, 8});
  CHECK_THROWS_AS(make(d), Error);
  d = make_desc({1, 4, 4, 8, 8, 7, 7});  // larger than the padded image
  CHECK_THROWS_AS(make(d), Error);
  d = make_desc({1, 4, 4, 8, 8});
  d.sample_bias_stride = 8;
  d.sample_bias_offset = 1;  // beyond its row
  CHECK_THROWS_AS(make(d), Error);
  CHECK_THROWS_AS(backend->conv_pack(make_desc({1, 4, 4, 8, 8}), ConvPass::kWgrad, In{0}, Out{1}),
                  Error);
}
