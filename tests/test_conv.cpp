#include <catch2/catch.hpp>

#include <cstring>

#include "tests/conv_support.h"

using namespace ddpm;
using namespace ddpm::test;

namespace {

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
    ref::ConvTensors t = data.reference(d);
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
    CHECK(relative_error(forward(*backend, d, t), ref::conv_forward(d, t.reference(d))) <=
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
  std::vector<ConvDesc> fused(6, plain);
  fused[0].c2 = 8;
  fused[1].transform.silu = true;
  fused[2].upsample = true;
  fused[3].shortcut_c = 8;
  fused[4].statistics = true;
  fused[5].e4m3 = true;
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
