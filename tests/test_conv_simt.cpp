// The CUDA convolutions on the host, against the double-precision reference.
#include <algorithm>

#include "tests/conv_support.h"
#include "tests/kernel_backend.h"
#include "tests/reference/reduce.h"
#include "tests/simt/machine.h"
#include "tests/simt/simt_backend.h"

using namespace ddpm;
using namespace ddpm::test;

namespace {

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
  const auto backend = make_kernel_backend(type);
  for (const ConvShape& s : kShapes) check_forward(*backend, make_desc(s));
}

TEST_CASE("simt.conv_dgrad: every shape", "[simt][conv]") {
  const auto type = GENERATE(DType::kF32, DType::kBF16);
  const auto backend = make_kernel_backend(type);
  for (const ConvShape& s : kShapes) check_dgrad(*backend, make_desc(s));
}

// So many images fill a GPU without cutting the sum over channels, which one image does not.
TEST_CASE("simt.conv_forward: batch-invariant, an image's bits do not depend on the batch",
          "[simt][conv]") {
  const auto backend = make_kernel_backend(DType::kBF16, true);
  ConvDesc many = make_desc({1064, 4, 4, 128, 128, 1, 1, 1, 0, 0, 0, 0}), one = many;
  one.x.n = 1;
  const ConvData all(many, backend.get());
  ConvData alone(one, backend.get());
  const auto size = static_cast<long>(one.x.count());
  const std::vector<float> y = forward(*backend, many, all);
  for (const long image : {0L, 517L, 1063L}) {
    alone.x.assign(all.x.begin() + image * size, all.x.begin() + (image + 1) * size);
    const std::vector<float> expected(y.begin() + image * size, y.begin() + (image + 1) * size);
    CHECK((forward(*backend, one, alone) == expected));
  }
}

// A filter so large that no tile's halo fits in shared memory.
TEST_CASE("simt.conv: filters beyond the tensor cores' tiles", "[simt][conv]") {
  const auto type = GENERATE(DType::kF32, DType::kBF16);
  const auto backend = make_kernel_backend(type);
  const ConvDesc d = make_desc({1, 40, 40, 8, 8, 37, 37, 1, 0, 0, 0, 0});
  check_forward(*backend, d);
  check_dgrad(*backend, d);
}

// ---- every pair of what a desc can say ----

namespace {

// How many values each option has, in the order that pairwise_desc() reads them.
const std::vector<int> kLevels = {9, 6, 4, 4, 4, 4, 2, 2, 2, 2, 2, 2, 2, 4, 2};

ConvDesc pairwise_desc(const std::vector<int>& row) {
  size_t next = 0;
  const auto pick = [&](const auto&... values) {
    const std::vector<int> v{values...};
    return v.at(static_cast<size_t>(row.at(next++)));
  };
  const int n = pick(1, 2, 3, 4, 5, 6, 7, 8, 9);
  const int h = pick(2, 4, 5, 8, 3, 1);
  const int w = std::vector{3, 4, 7, 8, 10, 66}[static_cast<size_t>(row[1])];
  const ConvShape filters[] = {{0, 0, 0, 0, 0},
                               {0, 0, 0, 0, 0, 3, 3, 2, 1, 1, 1, 0},
                               {0, 0, 0, 0, 0, 1, 1, 1, 0, 0, 0, 0},
                               {0, 0, 0, 0, 0, 2, 3, 1, 1, 0, 0, 2}};
  ConvShape s = filters[pick(0, 1, 2, 3)];
  s.n = n;
  s.h = h;
  s.w = w;
  s.c = pick(8, 16, 40, 5);
  const int c2 = pick(0, 8, 24, 3);
  s.k = pick(3, 8, 24, 72);
  ConvDesc d = make_desc(s);
  d.c2 = c2;
  d.transform.affine = pick(0, 1);
  d.transform.silu = pick(0, 1);
  if (pick(0, 1)) d.transform.dropout = {.p = 0.25f, .layer = 2};
  d.upsample = pick(0, 1);
  d.bias = pick(0, 1);
  if (pick(0, 1)) {
    d.sample_bias_stride = 2 * d.k + 3;
    d.sample_bias_offset = 3;
  }
  d.residual = pick(0, 1);
  const int shortcut = pick(0, 1, 2, 3);
  d.shortcut_c = std::vector{0, 40, 8, 5}[static_cast<size_t>(shortcut)];
  d.shortcut_c2 = shortcut == 2 ? 24 : 0;
  d.statistics = pick(0, 1);
  return d;
}

struct Pair {
  size_t i, j;
  int a, b;
  bool in(const std::vector<int>& row) const { return row[i] == a && row[j] == b; }
};

// Rows of values such that every two options take every two of their values in some row: each row
// begins with a pair that is missing, and is the best of many drawn.
std::vector<std::vector<int>> covering_rows() {
  std::vector<Pair> missing;
  for (size_t i = 0; i < kLevels.size(); ++i)
    for (size_t j = i + 1; j < kLevels.size(); ++j)
      for (int a = 0; a < kLevels[i]; ++a)
        for (int b = 0; b < kLevels[j]; ++b) missing.push_back({i, j, a, b});
  std::vector<std::vector<int>> rows;
  uint64_t seed = 1;
  while (!missing.empty()) {
    std::vector<int> best;
    int64_t most = 0;
    for (int draw = 0; draw < 40; ++draw) {
      const auto random = random_values(static_cast<int64_t>(kLevels.size()), seed++);
      std::vector<int> row;
      for (size_t i = 0; i < kLevels.size(); ++i)
        row.push_back(
            std::min(static_cast<int>((random[i] + 1) / 2 * static_cast<float>(kLevels[i])),
                     kLevels[i] - 1));
      row[missing.front().i] = missing.front().a;
      row[missing.front().j] = missing.front().b;
      const auto covers =
          std::count_if(missing.begin(), missing.end(), [&](const Pair& p) { return p.in(row); });
      if (covers <= most) continue;
      most = covers;
      best = row;
    }
    std::erase_if(missing, [&](const Pair& p) { return p.in(best); });
    rows.push_back(best);
  }
  return rows;
}

}  // namespace

TEST_CASE("simt.conv: every pair of options and batches of 1 to 9", "[simt][conv]") {
  const auto type = GENERATE(DType::kF32, DType::kBF16);
  const auto backend = make_kernel_backend(type);
  const auto rows = covering_rows();
  CHECK(rows.size() <= 100);
  for (const auto& row : rows) {
    ConvDesc d = pairwise_desc(row);
    check_fused(*backend, d);
    check_wgrad(*backend, d);
    d.x.c = d.c();
    d.c2 = 0;
    d.transform = {};
    d.upsample = false;
    check_dgrad(*backend, d);
  }
}

// Strides make large halos: tiles shrink until a block fits, and what fits nowhere is plain
// arithmetic. The machine refuses a launch that asks for more than there is.
TEST_CASE("simt.conv: what an A100 and smaller chips have of shared memory is enough",
          "[simt][conv]") {
  const size_t shared = GENERATE(163 * 1024, 99 * 1024, 48 * 1024);
  const Options options(0);
  simt::options().max_shared = shared;
  const auto backend = make_simt_backend(DType::kBF16, {.shared_bytes = shared});
  const std::vector<ConvShape> shapes = {
      {1, 6, 256, 16, 8, 3, 3, 2, 0, 0, 1, 1},  // segments of 64
      {1, 5, 128, 8, 8, 3, 3, 2, 0, 0, 1, 1},   // rows of 64
      {1, 9, 34, 24, 16, 3, 3, 2},              // odd rows
      {33, 4, 4, 16, 8, 3, 3, 2, 0, 0, 1, 1},   // whole images
      {9, 8, 8, 136, 72, 3, 3, 2, 0, 0, 1, 1},  // the same, split
      {130, 2, 2, 16, 8, 3, 3, 2, 0, 0, 1, 1},  // of one pixel
      {2, 5, 128, 8, 16},
      {3, 4, 4, 40, 8, 1, 1, 1, 0, 0, 0, 0},
  };
  for (const ConvShape& s : shapes) {
    ConvDesc d = make_desc(s);
    check_dgrad(*backend, d);
    d.transform = kNormalise;
    check_fused(*backend, with_addends(d, 5));
    check_wgrad(*backend, d);
  }
}

// As many images as fill a tile have a larger halo than one image has.
TEST_CASE("simt.conv_forward: batch-invariant with little shared memory", "[simt][conv]") {
  constexpr size_t kShared = 99 * 1024;
  const auto backend =
      make_simt_backend(DType::kBF16, {.batch_invariant = true, .shared_bytes = kShared});
  const ConvDesc many = make_desc({33, 8, 8, 64, 8, 3, 3, 2, 0, 0, 1, 1});
  ConvDesc one = many;
  one.x.n = 1;
  const ConvData all(many, backend.get());
  ConvData alone(one, backend.get());
  alone.x.assign(all.x.end() - one.x.count(), all.x.end());
  const std::vector<float> y = forward(*backend, many, all);
  CHECK((forward(*backend, one, alone) == std::vector<float>(y.end() - one.y().count(), y.end())));
}

TEST_CASE("simt.conv_wgrad: every shape", "[simt][conv]") {
  const auto type = GENERATE(DType::kF32, DType::kBF16);
  const auto backend = make_kernel_backend(type);
  for (const ConvShape& s : kShapes) check_wgrad(*backend, make_desc(s));
}

TEST_CASE("simt.conv_forward: inputs that are concatenated, transformed, upsampled",
          "[simt][conv]") {
  const auto type = GENERATE(DType::kF32, DType::kBF16);
  const auto backend = make_kernel_backend(type);
  for (const ConvDesc& d : fused_inputs()) {
    check_fused(*backend, d);
    check_fused(*backend, with_addends(d, 5));
  }
}

TEST_CASE("simt.conv_wgrad: inputs that are concatenated, transformed, upsampled", "[simt][conv]") {
  const auto type = GENERATE(DType::kF32, DType::kBF16);
  const auto backend = make_kernel_backend(type);
  for (const ConvDesc& d : fused_inputs()) check_wgrad(*backend, d);
}

// Every way that tiles lie, more output channels than a block has, an idle half of one, splits.
TEST_CASE("simt.conv_wgrad_sums: dy's sums beside the filter's gradient", "[simt][conv]") {
  const auto backend = make_kernel_backend(DType::kBF16);
  const std::vector<ConvShape> shapes = {
      {3, 16, 16, 32, 24}, {2, 12, 16, 40, 136},  {2, 3, 32, 32, 16},
      {5, 8, 8, 64, 128},  {7, 4, 8, 32, 8},      {2, 8, 8, 128, 16, 1, 1, 1, 0, 0, 0, 0},
      {1, 4, 128, 32, 16}, {1, 16, 16, 256, 264}, {2, 16, 16, 32, 72, 3, 3, 2, 0, 0, 1, 1},
  };
  for (const ConvShape& shape : shapes) {
    ConvDesc d = make_desc(shape);
    if (shape.stride == 1) d.transform = kNormalise;
    const ConvData t(d, backend.get());
    const auto before = random_values(d.filter().count(), 18);
    const int stride = d.k + 16, offset = 8;
    const auto marks = random_values(int64_t{d.x.n} * stride, 19);
    INFO(describe(d));
    for (const Write write : {Write::kOverwrite, Write::kAccumulate}) {
      Bench bench(*backend);
      const ConvSlots s = input_slots(bench, d, t);
      const In dy = bench.activation(t.dy);
      const Out df = bench.inout(before), sums = bench.inout(marks);
      const auto call = backend->conv_wgrad_sums(d, s, dy, df, write, sums, stride, offset);
      REQUIRE(call.has_value());
      CHECK(call->writes.size() == 2);
      bench.run(*call);
      CHECK((bench.get(df) == wgrad(*backend, d, t, write, before)));
      const std::vector<float> got = bench.get(sums);
      const ref::Vector want = ref::pixel_sum(d.y(), to_double(t.dy));
      std::vector<float> inside;
      for (int i = 0; i < d.x.n * stride; ++i) {
        const int k = i % stride - offset;
        if (k >= 0 && k < d.k)
          inside.push_back(got[static_cast<size_t>(i)]);
        else
          CHECK(got[static_cast<size_t>(i)] == marks[static_cast<size_t>(i)]);
      }
      CHECK(relative_error(inside, want) <= 1e-6);
    }
  }
}

TEST_CASE("simt.conv_wgrad_sums: left to a pass of its own", "[simt][conv]") {
  const auto asked = [](Backend& backend, const ConvDesc& d) {
    ConvSlots s;
    s.x = {0};
    return backend.conv_wgrad_sums(d, s, {1}, {2}, Write::kOverwrite, {3}, d.k, 0).has_value();
  };
  const auto backend = make_kernel_backend(DType::kBF16);
  CHECK(asked(*backend, make_desc({8, 8, 8, 32, 8})));
  CHECK_FALSE(asked(*backend, make_desc({8, 4, 4, 32, 8})));  // two images to 32 pixels
  CHECK_FALSE(asked(*backend, make_desc({8, 8, 8, 24, 8})));  // an idle warp
  CHECK_FALSE(asked(*backend, make_desc({8, 8, 8, 33, 8})));  // by scalars
  CHECK_FALSE(asked(*make_kernel_backend(DType::kF32), make_desc({8, 8, 8, 32, 8})));
  const ConvDesc wide = make_desc({2, 8, 32, 32, 16});
  CHECK(asked(*backend, wide));
  CHECK_FALSE(asked(*make_simt_backend(DType::kBF16, {.shared_bytes = 48 * 1024}), wide));
  ConvSlots s;
  s.x = {0};
  CHECK_THROWS_AS(backend->conv_wgrad_sums(make_desc({8, 8, 8, 32, 8}), s, {1}, {2},
                                           Write::kOverwrite, {3}, 8, 1),
                  Error);
}

// What lies behind a norm, at every way that tiles lie; the last is split over blocks.
TEST_CASE("simt.conv_dgrad_norm: back through SiLU and dropout, and summed", "[simt][conv]") {
  const auto type = GENERATE(DType::kF32, DType::kBF16);
  const auto backend = make_kernel_backend(type);
  for (const ConvDesc& d : fused_inputs())
    if (d.transform.affine && !d.upsample) check_dgrad_norm(*backend, d);
  const std::vector<ConvShape> shapes = {{1, 2, 128, 8, 8},   {1, 3, 192, 8, 16}, {1, 9, 17, 8, 16},
                                         {2, 16, 16, 136, 8}, {9, 4, 4, 16, 72},  {5, 3, 3, 12, 8},
                                         {2, 8, 8, 48, 264},  {3, 4, 4, 40, 512}};
  for (const ConvShape& s : shapes) check_dgrad_norm(*backend, with_input(s, 0, kNormalise));
  check_dgrad_norm(*backend, with_input({2, 8, 8, 24, 264}, 40, kNormalise));
}

TEST_CASE("simt.conv_forward: what is added behind the taps, and statistics", "[simt][conv]") {
  const auto type = GENERATE(DType::kF32, DType::kBF16);
  const auto backend = make_kernel_backend(type);
  const std::vector<ConvShape> shapes = {
      {1, 1, 1, 8, 8},
      {2, 8, 8, 8, 24},
      {1, 16, 16, 16, 16},
      {9, 4, 4, 16, 72},
      {1, 2, 128, 8, 8},
      {1, 3, 192, 8, 8},
      {2, 5, 7, 8, 5},
      {1, 9, 17, 8, 16},
      {1, 3, 70, 8, 8},
      {5, 3, 3, 256, 8},
      {2, 8, 8, 16, 8, 3, 3, 2, 0, 0, 1, 1},
  };
  for (const ConvShape& s : shapes)
    for (int which = 0; which < 6; ++which)
      check_fused(*backend, with_addends(make_desc(s), which));
}

TEST_CASE("simt.conv: sums that are split over blocks", "[simt][conv]") {
  const auto backend = make_kernel_backend(DType::kBF16);
  for (const ConvShape& s : {ConvShape{1, 4, 4, 256, 40}, ConvShape{2, 8, 8, 136, 136},
                             ConvShape{1, 8, 8, 512, 8, 1, 1, 1, 0, 0, 0, 0}}) {
    check_fused(*backend, with_addends(with_input(s, 24, kNormalise), 5));
    check_dgrad(*backend, make_desc({s.n, s.h, s.w, s.k, s.c, s.r, s.s, 1, s.top, s.left, s.bottom,
                                     s.right}));
  }
  // Weight gradients of many tiles: 8 images of 16x16 give each of 14 shares one or two.
  check_wgrad(*backend, with_input({8, 16, 16, 8, 1032}, 0, kNormalise));
}

TEST_CASE("simt.conv: the order of warps and blocks does not change a bit", "[simt][conv]") {
  const auto type = GENERATE(DType::kF32, DType::kBF16);
  const auto backend = make_kernel_backend(type);
  for (const ConvDesc& d : {with_addends(with_input({2, 8, 8, 136, 40}, 24, kNormalise), 5),
                            with_addends(with_input({3, 5, 7, 16, 8}, 8, kNormalise), 5)}) {
    const ConvData t(d, backend.get());
    const Forward f = forward_all(*backend, d, t);
    const auto df = wgrad(*backend, d, t, Write::kOverwrite, {});
    const Options options(0, 987654321);
    const Forward again = forward_all(*backend, d, t);
    CHECK((again.y == f.y));
    CHECK((again.statistics == f.statistics));
    CHECK((wgrad(*backend, d, t, Write::kOverwrite, {}) == df));
  }
}

TEST_CASE("simt.conv: an image's bits do not depend on its neighbours", "[simt][conv]") {
  const auto type = GENERATE(DType::kF32, DType::kBF16);
  const auto backend = make_kernel_backend(type);
  for (const int h : {4, 8, 13}) {
    const ConvDesc d =
        with_addends(with_input({3, h, h, 16, 8}, 8, {.affine = true, .silu = true}), 5);
    ConvData t(d, backend.get());
    const auto y = forward(*backend, d, t);
    std::fill(t.x.begin() + d.x.count() / 3, t.x.end(), 100.0f);
    std::fill(t.scale_shift.begin() + static_cast<int64_t>(t.scale_shift.size()) / 3,
              t.scale_shift.end(), -3.0f);
    const auto changed = forward(*backend, d, t);
    const auto third = static_cast<int64_t>(y.size()) / 3;
    CHECK(std::equal(y.begin(), y.begin() + third, changed.begin()));
    CHECK_FALSE(std::equal(y.begin() + third, y.end(), changed.begin() + third));
  }
}

TEST_CASE("simt.conv: refuses what it cannot mean, leaves what is not its own", "[simt][conv]") {
  const auto backend = make_kernel_backend(DType::kBF16);
  ConvSlots slots;
  slots.x = {0};
  slots.filter = {1};
  const auto make = [&](const ConvDesc& d) { backend->conv_forward(d, slots, Out{2}, {}); };
  make(make_desc({1, 4, 4, 8, 8}));
  std::vector<ConvDesc> bad(8, make_desc({1, 4, 4, 8, 8}));
  bad[0].bias = true;  // no slot for these
  bad[1].c2 = 8;
  bad[2].transform.affine = true;
  bad[3].transform.dropout.p = 0.5f;
  bad[4].statistics = true;
  bad[5].shortcut_c = 8;
  bad[6] = make_desc({0, 4, 4, 8, 8});
  bad[7] = make_desc({1, 4, 4, 8, 8, 7, 7});  // larger than the padded image
  for (const ConvDesc& d : bad) CHECK_THROWS_AS(make(d), Error);
  for (int i = 1; i < 4; ++i)
    CHECK_THROWS_AS(
        backend->conv_wgrad(bad[static_cast<size_t>(i)], slots, In{1}, Out{2}, Write::kOverwrite),
        Error);
  ConvDesc d = make_desc({1, 4, 4, 8, 8});
  d.c2 = 8;
  CHECK_FALSE(backend->conv_dgrad(d, slots, In{0}, Out{2}, Write::kOverwrite).has_value());
  d = make_desc({1, 4, 4, 8, 8});
  d.e4m3 = true;
  CHECK_FALSE(backend->conv_forward(d, slots, Out{2}, {}).has_value());
  CHECK_FALSE(backend->conv_dgrad(d, slots, In{0}, Out{2}, Write::kOverwrite).has_value());
  CHECK_FALSE(backend->conv_wgrad(d, slots, In{0}, Out{2}, Write::kOverwrite).has_value());
  CHECK_FALSE(backend->conv_wgrad_sums(d, slots, In{0}, Out{2}, Write::kOverwrite, Out{3}, 8, 0));
  // A norm of other channels, none at all, upsampling behind one.
  d = make_desc({1, 4, 4, 8, 8});
  d.transform.affine = true;
  slots.scale_shift = {3};
  const auto at_norm = [&](int channels, int groups) {
    return backend->conv_dgrad_norm(d, slots, {.x = {1, 4, 4, channels}, .groups = groups}, In{4},
                                    In{5}, Out{2}, Out{6});
  };
  CHECK(at_norm(8, 2).has_value());
  CHECK_THROWS_AS(at_norm(16, 2), Error);
  CHECK_THROWS_AS(at_norm(8, 3), Error);
  d.transform.affine = false;
  CHECK_THROWS_AS(at_norm(8, 2), Error);
  d.transform.affine = d.upsample = true;
  CHECK_FALSE(at_norm(8, 2).has_value());
  d.upsample = false;
  d.e4m3 = true;
  CHECK_FALSE(at_norm(8, 2).has_value());
}
