// Convolutions as tests ask for them: shapes, seeded tensors of everything a desc names, runs and
// comparisons with the double-precision reference.
#pragma once

#include <catch2/catch.hpp>

#include <algorithm>
#include <cmath>
#include <vector>

#include "tests/reference/conv.h"
#include "tests/reference/pointwise.h"
#include "tests/reference/resample.h"
#include "tests/support.h"

namespace ddpm::test {

// Rounding of a sum of `terms` products of random signs grows with sqrt(terms).
inline double tolerance(int64_t terms) {
  return 1e-7 * (2 + std::sqrt(static_cast<double>(terms)));
}

struct ConvShape {
  int n, h, w, c, k, r = 3, s = 3, stride = 1;
  int top = 1, left = 1, bottom = 1, right = 1;
};

inline const std::vector<ConvShape> kShapes = {
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

inline ConvDesc make_desc(const ConvShape& s) {
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

inline const Transform kNormalise{
    .affine = true, .silu = true, .dropout = {.p = 0.25f, .layer = 3}};

inline ConvDesc with_input(ConvShape s, int c2, Transform transform = {}, bool upsample = false) {
  ConvDesc d = make_desc(s);
  d.c2 = c2;
  d.transform = transform;
  d.upsample = upsample;
  return d;
}

// What is added behind the taps, one by one and together.
inline ConvDesc with_addends(ConvDesc d, int which) {
  const bool all = which == 5;
  if (which == 0 || all) d.bias = true;
  if (which == 1 || all) {
    d.sample_bias_stride = 2 * d.k + 3;
    d.sample_bias_offset = 3;
  }
  if (which == 2 || all) d.residual = true;
  if (which == 3) d.shortcut_c = 40;
  if (all) {
    d.shortcut_c = 24;
    d.shortcut_c2 = 80;
  }
  if (which == 4 || all) d.statistics = true;
  return d;
}

inline std::string describe(const ConvDesc& d) {
  return format(
      "%s + %d by %s stride %d pads %d %d %d %d bias %d sample %d residual %d upsample %d affine "
      "%d "
      "silu %d dropout %g shortcut %d + %d statistics %d",
      to_string(d.x).c_str(), d.c2, to_string(d.filter()).c_str(), d.stride, d.pad_top, d.pad_left,
      d.pad_bottom, d.pad_right, d.bias, d.sample_bias_stride, d.residual, d.upsample,
      d.transform.affine, d.transform.silu, static_cast<double>(d.transform.dropout.p),
      d.shortcut_c, d.shortcut_c2, d.statistics);
}

inline const StepState kConvState{.seed = 0x123456789ABCu, .step = 41, .first_image = 30};

// Dropout's factors of the concatenated input, element by element as the design writes them down.
inline std::vector<double> dropout_mask(const ConvDesc& d) {
  if (d.transform.dropout.p <= 0) return {};
  const Dropout& drop = d.transform.dropout;
  const int64_t count = d.x.pixels() * d.c();
  std::vector<double> mask;
  mask.reserve(static_cast<size_t>(d.x.n * count));
  for (int n = 0; n < d.x.n; ++n) {
    const RandomStream stream{.seed = kConvState.seed,
                              .purpose = Purpose::kDropout,
                              .sample = kConvState.first_image + static_cast<uint64_t>(n),
                              .step = static_cast<uint32_t>(kConvState.step),
                              .layer = drop.layer};
    Philox4 words{};
    for (int64_t i = 0; i < count; ++i) {
      if (i % 8 == 0) words = stream.block(static_cast<uint32_t>(i / 8));
      const bool keep = dropout_bits(words, static_cast<int>(i % 8)) >= drop.threshold();
      mask.push_back(keep ? 1.0 / (1.0 - static_cast<double>(drop.p)) : 0.0);
    }
  }
  return mask;
}

// Seeded values; those of large tensors repeat, at a prime.
inline std::vector<float> conv_values(int64_t count, uint64_t seed) {
  constexpr int64_t kPeriod = 262139;
  std::vector<float> v = random_values(std::min(count, kPeriod), seed);
  v.reserve(static_cast<size_t>(count));
  while (static_cast<int64_t>(v.size()) < count) {
    const int64_t more = std::min(kPeriod, count - static_cast<int64_t>(v.size()));
    v.insert(v.end(), v.begin(), v.begin() + more);
  }
  return v;
}

// Seeded tensors of a desc, and a gradient of the output. Activations and filters are values that
// the backend can hold.
struct ConvData {
  std::vector<float> x, filter, bias, sample_bias, residual, dy;
  std::vector<float> x2, scale_shift, shortcut, shortcut2, shortcut_filter, shortcut_bias;
  explicit ConvData(const ConvDesc& d, const Backend* backend = nullptr)
      : x(conv_values(d.x.count(), 11)),
        filter(conv_values(d.filter().count(), 12)),
        bias(conv_values(d.bias ? d.k : 0, 13)),
        sample_bias(conv_values(int64_t{d.x.n} * d.sample_bias_stride, 14)),
        residual(conv_values(d.residual ? d.y().count() : 0, 15)),
        dy(conv_values(d.y().count(), 16)),
        x2(conv_values(int64_t{d.x.n} * d.x.pixels() * d.c2, 31)),
        scale_shift(conv_values(d.transform.affine ? int64_t{d.x.n} * d.c() * 2 : 0, 32)),
        shortcut(conv_values(d.x.n * d.y().pixels() * d.shortcut_c, 33)),
        shortcut2(conv_values(d.x.n * d.y().pixels() * d.shortcut_c2, 34)),
        shortcut_filter(conv_values(int64_t{d.k} * (d.shortcut_c + d.shortcut_c2), 35)),
        shortcut_bias(conv_values(d.shortcut_c > 0 ? d.k : 0, 36)) {
    if (backend == nullptr) return;
    for (auto* v : {&x, &filter, &residual, &dy, &x2, &shortcut, &shortcut2, &shortcut_filter})
      *v = rounded(*backend, std::move(*v));
  }
  ref::ConvTensors reference(const ConvDesc& d) const {
    return {.x = to_double(x),
            .x2 = to_double(x2),
            .scale_shift = to_double(scale_shift),
            .mask = dropout_mask(d),
            .filter = to_double(filter),
            .bias = to_double(bias),
            .sample_bias = to_double(sample_bias),
            .residual = to_double(residual),
            .shortcut = to_double(shortcut),
            .shortcut2 = to_double(shortcut2),
            .shortcut_filter = to_double(shortcut_filter),
            .shortcut_bias = to_double(shortcut_bias)};
  }
};

// The filter as the pass reads it: packed where the backend says so.
inline In packed_filter(Backend& backend, Bench& bench, const ConvDesc& d, ConvPass pass,
                        const std::vector<float>& filter) {
  const In plain = bench.activation(filter);
  const size_t bytes = backend.packed_bytes(d, pass);
  if (bytes == 0) return plain;
  const Out packed = bench.out<uint8_t>(static_cast<int64_t>(bytes));
  bench.run(backend.conv_pack(d, pass, plain, packed));
  return {packed.slot};
}

inline ConvSlots input_slots(Bench& bench, const ConvDesc& d, const ConvData& t) {
  ConvSlots s;
  s.x = bench.activation(t.x);
  if (d.c2 > 0) s.x2 = bench.activation(t.x2);
  if (d.transform.affine) s.scale_shift = bench.in(t.scale_shift);
  if (d.transform.dropout.p > 0) s.state = bench.state(kConvState);
  return s;
}

struct Forward {
  std::vector<float> y, statistics;
};

inline Forward forward_all(Backend& backend, const ConvDesc& d, const ConvData& t) {
  Bench bench(backend);
  ConvSlots s = input_slots(bench, d, t);
  s.filter = packed_filter(backend, bench, d, ConvPass::kForward, t.filter);
  if (d.bias) s.bias = bench.in(t.bias);
  if (d.sample_bias_stride > 0) s.sample_bias = bench.in(t.sample_bias);
  if (d.residual) s.residual = bench.activation(t.residual);
  if (d.shortcut_c > 0) {
    s.shortcut = bench.activation(t.shortcut);
    if (d.shortcut_c2 > 0) s.shortcut2 = bench.activation(t.shortcut2);
    s.shortcut_filter = bench.activation(t.shortcut_filter);
    s.shortcut_bias = bench.in(t.shortcut_bias);
  }
  const Out y = bench.activation_out(d.y().count());
  Out statistics;
  if (d.statistics) statistics = bench.out(StatsDesc{d.y()}.count());
  const auto call = backend.conv_forward(d, s, y, statistics);
  REQUIRE(call.has_value());
  const size_t reads = 2u + d.bias + d.residual + (d.sample_bias_stride > 0) + (d.c2 > 0) +
                       d.transform.affine + (d.transform.dropout.p > 0) + 3 * (d.shortcut_c > 0) +
                       (d.shortcut_c2 > 0);
  CHECK(call->reads.size() == reads);
  CHECK(call->writes.size() == 1u + d.statistics);
  bench.run(*call);
  return {bench.get_activation(y), d.statistics ? bench.get(statistics) : std::vector<float>()};
}

inline std::vector<float> forward(Backend& backend, const ConvDesc& d, const ConvData& t) {
  return forward_all(backend, d, t).y;
}

inline std::vector<float> dgrad(Backend& backend, const ConvDesc& d, const ConvData& t, Write write,
                                const std::vector<float>& before) {
  Bench bench(backend);
  ConvSlots s;
  s.filter = packed_filter(backend, bench, d, ConvPass::kDgrad, t.filter);
  const In dy = bench.activation(t.dy);
  const Out dx = write == Write::kAccumulate ? bench.activation_inout(before)
                                             : bench.activation_out(d.x.count());
  const auto call = backend.conv_dgrad(d, s, dy, dx, write);
  REQUIRE(call.has_value());
  bench.run(*call);
  return bench.get_activation(dx);
}

inline std::vector<float> wgrad(Backend& backend, const ConvDesc& d, const ConvData& t, Write write,
                                const std::vector<float>& before) {
  Bench bench(backend);
  const ConvSlots s = input_slots(bench, d, t);
  const In dy = bench.activation(t.dy);
  const Out df = write == Write::kAccumulate ? bench.inout(before) : bench.out(d.filter().count());
  const auto call = backend.conv_wgrad(d, s, dy, df, write);
  REQUIRE(call.has_value());
  bench.run(*call);
  return bench.get(df);
}

inline std::vector<double> plus(std::vector<double> a, const std::vector<float>& b) {
  for (size_t i = 0; i < a.size(); ++i) a[i] += static_cast<double>(b[i]);
  return a;
}

// Relative L2 error of `count` bf16 values: one is within 2^-8 of itself, many within 2^-9 of their
// norm.
inline double rounding(const Backend& backend, int64_t count) {
  if (backend.compute_type() == DType::kF32) return 0;
  return count < 256 ? 0x1p-8 : 0x1p-9;
}
// Of sums of `terms` products of the input: in bf16 a transformed input is rounded as well.
inline double input_tolerance(const Backend& backend, const ConvDesc& d, int64_t terms) {
  if (!d.transform.any()) return tolerance(terms);
  return tolerance(terms) + 1e-6 + rounding(backend, d.x.count());
}
inline double forward_tolerance(const Backend& backend, const ConvDesc& d) {
  const int64_t terms = int64_t{d.r} * d.s * d.c() + d.shortcut_c + d.shortcut_c2;
  return rounding(backend, d.y().count()) + input_tolerance(backend, d, terms);
}

inline void check_statistics(const ConvDesc& d, const Forward& f) {
  const Shape s = d.y();
  const int tiles = StatsDesc{s}.tiles();
  std::vector<double> mean, m2, mean_is, m2_is;
  for (int n = 0; n < s.n; ++n)
    for (int tile = 0; tile < tiles; ++tile)
      for (int k = 0; k < s.c; ++k) {
        const int64_t begin = int64_t{tile} * 64, end = std::min<int64_t>(begin + 64, s.pixels());
        double sum = 0, squares = 0;
        const auto y = [&](int64_t i) {
          return static_cast<double>(f.y[static_cast<size_t>((n * s.pixels() + i) * s.c + k)]);
        };
        for (int64_t i = begin; i < end; ++i) sum += y(i);
        sum /= static_cast<double>(end - begin);
        for (int64_t i = begin; i < end; ++i) squares += (y(i) - sum) * (y(i) - sum);
        const size_t at = ((static_cast<size_t>(n * tiles + tile)) * static_cast<size_t>(s.c) +
                           static_cast<size_t>(k)) *
                          2;
        mean.push_back(sum);
        m2.push_back(squares);
        mean_is.push_back(static_cast<double>(f.statistics[at]));
        m2_is.push_back(static_cast<double>(f.statistics[at + 1]));
      }
  // Of the values as they were written: only fp32's rounding is left.
  CHECK(relative_error(mean_is, mean) <= 2e-6);
  CHECK(relative_error(m2_is, m2) <= 2e-6);
}

inline void check_fused(Backend& backend, const ConvDesc& d) {
  const ConvData t(d, &backend);
  INFO("forward " << describe(d));
  const Forward f = forward_all(backend, d, t);
  CHECK(relative_error(f.y, ref::conv_forward(d, t.reference(d))) <= forward_tolerance(backend, d));
  if (d.statistics) check_statistics(d, f);
}

inline void check_forward(Backend& backend, ConvDesc d) {
  for (int extras = 0; extras < 8; ++extras) {
    d.bias = extras & 1;
    d.residual = extras & 2;
    d.sample_bias_stride = extras & 4 ? 2 * d.k + 3 : 0;
    d.sample_bias_offset = extras & 4 ? d.k + 1 : 0;
    check_fused(backend, d);
  }
}

inline void check_dgrad(Backend& backend, const ConvDesc& d) {
  const ConvData t(d, &backend);
  INFO("dgrad " << describe(d));
  const auto dx = ref::conv_dgrad(d, to_double(t.filter), to_double(t.dy));
  const auto before = rounded(backend, random_values(d.x.count(), 17));
  const double bound = rounding(backend, d.x.count()) + tolerance(int64_t{d.r} * d.s * d.k);
  CHECK(relative_error(dgrad(backend, d, t, Write::kOverwrite, {}), dx) <= bound);
  CHECK(relative_error(dgrad(backend, d, t, Write::kAccumulate, before), plus(dx, before)) <=
        bound);
}

struct NormGradient {
  std::vector<float> dz, sums;
};

inline NormGradient dgrad_norm(Backend& backend, const ConvDesc& d, const ConvData& t, int groups,
                               const std::vector<float>& mean_rstd) {
  Bench bench(backend);
  ConvSlots s = input_slots(bench, d, t);
  s.filter = packed_filter(backend, bench, d, ConvPass::kDgrad, t.filter);
  const GroupNormDesc norm{.x = d.x, .c2 = d.c2, .groups = groups};
  const Out dz = bench.activation_out(norm.shape().count());
  const Out sums = bench.out(StatsDesc{norm.shape()}.count());
  const auto call =
      backend.conv_dgrad_norm(d, s, norm, bench.in(mean_rstd), bench.activation(t.dy), dz, sums);
  REQUIRE(call.has_value());
  CHECK(call->reads.size() == 5u + (d.c2 > 0) + (d.transform.dropout.p > 0));
  CHECK(call->writes.size() == 2);
  bench.run(*call);
  return {bench.get_activation(dz), bench.get(sums)};
}

// dz against the formula; its sums against those of what was written.
inline void check_dgrad_norm(Backend& backend, const ConvDesc& d) {
  const ConvData t(d, &backend);
  INFO("dgrad_norm " << describe(d));
  const Shape s{d.x.n, d.x.h, d.x.w, d.c()};
  const int groups = s.c % 4 == 0 ? 4 : 1, size = s.c / groups;
  const std::vector<float> mean_rstd = conv_values(int64_t{s.n} * groups * 2, 37);
  const auto in = t.reference(d);
  const auto x = d.c2 > 0 ? ref::concat(d.x, d.c2, in.x, in.x2) : in.x;
  auto dz = ref::conv_dgrad(d, in.filter, to_double(t.dy));
  for (size_t i = 0; i < dz.size(); ++i) {
    const size_t c = i % static_cast<size_t>(s.c);
    const size_t pair =
        (i / static_cast<size_t>(s.pixels() * s.c) * static_cast<size_t>(s.c) + c) * 2;
    if (!in.mask.empty()) dz[i] *= in.mask[i];
    if (d.transform.silu)
      dz[i] *= ref::silu_slope(x[i] * in.scale_shift[pair] + in.scale_shift[pair + 1]);
  }
  const NormGradient is = dgrad_norm(backend, d, t, groups, mean_rstd);
  CHECK(relative_error(is.dz, dz) <=
        rounding(backend, s.count()) + tolerance(int64_t{d.r} * d.s * d.k) + 1e-6);
  const int tiles = StatsDesc{s}.tiles();
  std::vector<double> sums(is.sums.size(), 0.0);
  for (int n = 0; n < s.n; ++n)
    for (int64_t p = 0; p < s.pixels(); ++p)
      for (int c = 0; c < s.c; ++c) {
        const size_t i = static_cast<size_t>((n * s.pixels() + p) * s.c + c);
        const size_t to = static_cast<size_t>(((n * tiles + p / 64) * 2) * s.c + c);
        const double mean =
            static_cast<double>(mean_rstd[static_cast<size_t>((n * groups + c / size) * 2)]);
        sums[to] += static_cast<double>(is.dz[i]);
        sums[to + static_cast<size_t>(s.c)] += static_cast<double>(is.dz[i]) * (x[i] - mean);
      }
  CHECK(relative_error(is.sums, sums) <= 2e-6);
}

inline void check_wgrad(Backend& backend, const ConvDesc& d) {
  const ConvData t(d, &backend);
  INFO("wgrad " << describe(d));
  const auto df = ref::conv_wgrad(d, ref::conv_input(d, t.reference(d)), to_double(t.dy));
  const auto before = random_values(d.filter().count(), 18);
  const double bound = input_tolerance(backend, d, d.x.n * d.y().pixels());
  CHECK(relative_error(wgrad(backend, d, t, Write::kOverwrite, {}), df) <= bound);
  CHECK(relative_error(wgrad(backend, d, t, Write::kAccumulate, before), plus(df, before)) <=
        bound);
}

inline void check_backward(Backend& backend, const ConvDesc& d) {
  check_dgrad(backend, d);
  check_wgrad(backend, d);
}

}  // namespace ddpm::test
