// The CUDA convolutions on the host, against the double-precision reference.
#include <algorithm>

#include "tests/conv_support.h"
#include "tests/simt/machine.h"
#include "tests/simt/simt_backend.h"

using namespace ddpm;
using namespace ddpm::test;

namespace {

const Transform kNormalise{.affine = true, .silu = true, .dropout = {.p = 0.25f, .layer = 3}};

ConvDesc with_input(ConvShape s, int c2, Transform transform = {}, bool upsample = false) {
  ConvDesc d = make_desc(s);
  d.c2 = c2;
  d.transform = transform;
  d.upsample = upsample;
  return d;
}

// Inputs that are not read as they are.
std::vector<ConvDesc> fused_inputs() {
  const Transform affine{.affine = true}, silu{.silu = true}, drop{.dropout = {.p = 0.5f}};
  return {
      with_input({2, 8, 8, 16, 24}, 0, affine),
      with_input({2, 8, 8, 16, 24}, 0, silu),
      with_input({2, 8, 8, 16, 24}, 0, drop),
      with_input({2, 8, 8, 40, 24}, 0, kNormalise),
      with_input({1, 16, 16, 72, 16}, 0, kNormalise),
      with_input({9, 4, 4, 32, 16}, 0, kNormalise),
      with_input({3, 5, 7, 24, 40}, 0, kNormalise),
      with_input({1, 11, 13, 8, 8}, 0, kNormalise),
      with_input({2, 8, 8, 64, 8, 1, 1, 1, 0, 0, 0, 0}, 0, kNormalise),
      with_input({1, 9, 7, 136, 8, 1, 1, 1, 0, 0, 0, 0}, 0, kNormalise),
      // Chunks of 32 channels that straddle the concatenation.
      with_input({2, 8, 8, 24, 16}, 16),
      with_input({1, 8, 8, 8, 16}, 64),
      with_input({2, 4, 4, 40, 16}, 24, kNormalise),
      with_input({1, 6, 9, 16, 72}, 8, kNormalise),
      with_input({2, 8, 8, 24, 8, 1, 1, 1, 0, 0, 0, 0}, 104, kNormalise),
      // Nearest x2 on read, strides, other filters, odd channels.
      with_input({2, 4, 4, 16, 16}, 0, {}, true),
      with_input({1, 3, 5, 24, 8}, 16, {}, true),
      with_input({1, 4, 4, 16, 16}, 16, kNormalise, true),
      with_input({1, 4, 4, 16, 16, 3, 3, 2}, 8, kNormalise, true),
      with_input({2, 8, 8, 32, 16, 3, 3, 2, 0, 0, 1, 1}, 0, kNormalise),
      with_input({1, 9, 9, 8, 8, 3, 3, 2}, 8, kNormalise),
      with_input({1, 8, 8, 16, 8, 5, 5, 1, 2, 2, 2, 2}, 16, kNormalise),
      with_input({1, 8, 8, 48, 8, 1, 2, 1, 0, 0, 0, 1}, 32, kNormalise),
      with_input({2, 5, 6, 13, 7}, 6, kNormalise),
      with_input({2, 5, 6, 3, 9}, 0, kNormalise),
      with_input({1, 4, 3, 5, 4}, 2, kNormalise, true),
  };
}

// What is added behind the taps, one by one and together.
ConvDesc with_addends(ConvDesc d, int which) {
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

// Sets simt's options back.
struct Options {
  explicit Options(int64_t max_blocks, uint64_t seed = 0) {
    simt::options().max_blocks = max_blocks;
    simt::options().seed = seed;
  }
  ~Options() { simt::options() = {}; }
  Options(const Options&) = delete;
  Options& operator=(const Options&) = delete;
};

}  // namespace

TEST_CASE("simt.conv_forward: every shape and term", "[simt][conv]") {
  const auto type = GENERATE(DType::kF32, DType::kBF16);
  const auto backend = make_simt_backend(type);
  for (const ConvShape& s : kShapes) check_forward(*backend, make_desc(s));
}

TEST_CASE("simt.conv_dgrad: every shape", "[simt][conv]") {
  const auto type = GENERATE(DType::kF32, DType::kBF16);
  const auto backend = make_simt_backend(type);
  for (const ConvShape& s : kShapes) check_dgrad(*backend, make_desc(s));
}

TEST_CASE("simt.conv_wgrad: every shape", "[simt][conv]") {
  const auto type = GENERATE(DType::kF32, DType::kBF16);
  const auto backend = make_simt_backend(type);
  for (const ConvShape& s : kShapes) check_wgrad(*backend, make_desc(s));
}

TEST_CASE("simt.conv_forward: inputs that are concatenated, transformed, upsampled",
          "[simt][conv]") {
  const auto type = GENERATE(DType::kF32, DType::kBF16);
  const auto backend = make_simt_backend(type);
  for (const ConvDesc& d : fused_inputs()) {
    check_fused(*backend, d);
    check_fused(*backend, with_addends(d, 5));
  }
}

TEST_CASE("simt.conv_wgrad: inputs that are concatenated, transformed, upsampled",
          "[simt][conv]") {
  const auto type = GENERATE(DType::kF32, DType::kBF16);
  const auto backend = make_simt_backend(type);
  for (const ConvDesc& d : fused_inputs()) check_wgrad(*backend, d);
}

TEST_CASE("simt.conv_forward: what is added behind the taps, and statistics", "[simt][conv]") {
  const auto type = GENERATE(DType::kF32, DType::kBF16);
  const auto backend = make_simt_backend(type);
  const std::vector<ConvShape> shapes = {
      {1, 1, 1, 8, 8},  {2, 8, 8, 8, 24},  {1, 16, 16, 16, 16}, {9, 4, 4, 16, 72},
      {1, 2, 128, 8, 8}, {1, 3, 192, 8, 8}, {2, 5, 7, 8, 5},     {1, 9, 17, 8, 16},
      {1, 3, 70, 8, 8}, {5, 3, 3, 256, 8}, {2, 8, 8, 16, 8, 3, 3, 2, 0, 0, 1, 1},
  };
  for (const ConvShape& s : shapes)
    for (int which = 0; which < 6; ++which) check_fused(*backend, with_addends(make_desc(s), which));
}
