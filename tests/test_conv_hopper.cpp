// The convolution by wgmma, on the host and, with `--device cuda`, on a Hopper: against the
// double-precision reference, and against the kernel by mma.sync, which it is to equal.
#include <algorithm>

#include "kernels/cuda/conv_plan.h"
#include "kernels/cuda/cuda_backend.h"
#include "tests/conv_support.h"
#include "tests/kernel_backend.h"
#include "tests/simt/machine.h"

using namespace ddpm;
using namespace ddpm::test;

namespace {

constexpr cuda::ConvChip kHopper{cuda::CudaBackend::kHopperShared, 132};

ConvSlots all_slots() {
  ConvSlots s;
  s.x = s.x2 = s.scale_shift = s.filter = s.bias = s.state = In{0};
  return s;
}
bool taken(const ConvDesc& d) {
  return cuda::hopper_forward(kHopper, d, all_slots(), Out{1}, Out{2}).run != nullptr;
}
bool gradient_taken(const ConvDesc& d) {
  return cuda::hopper_dgrad(kHopper, d, all_slots(), In{0}, {.dx = Out{1}}).run != nullptr;
}

// Null on a GPU that has no wgmma: there is nothing to prove there.
std::unique_ptr<Backend> hopper_backend(int blocks = 132) {
  try {
    return make_wgmma_backend(blocks);
  } catch (const Error& e) {
    if (kernel_device() != KernelDevice::kGpu || e.status() != Status::kDevice) throw;
    WARN(e.what());
    return nullptr;
  }
}

// Every way that tiles lie, and channels beside the chunks of 32 and the blocks of 128.
const std::vector<ConvShape> kTiles = {
    {2, 16, 16, 40, 24},                     // whole tiles of one image
    {1, 32, 16, 8, 136},                     // two tiles of an image, two blocks of channels
    {1, 5, 7, 24, 40},                       // less than a tile
    {1, 17, 19, 16, 8},                      // rows that a tile ends within
    {5, 8, 8, 72, 16},                       // several images, the last tile not full
    {17, 4, 4, 16, 8},                       // the same, of parts of 64 rows
    {33, 2, 2, 8, 8},    {1, 5, 128, 8, 8},  // parts of 64 pixels of a row, rows left over
    {1, 6, 192, 16, 8},                      // three to a row
    {1, 1, 1, 8, 5},                         // one pixel, an odd number of channels
    {1, 9, 10, 32, 3},
};

}  // namespace

TEST_CASE("simt.conv_hopper: what it takes", "[simt][conv]") {
  // The shapes it was written for, with everything fused.
  for (const ConvShape& s : {ConvShape{128, 32, 32, 128, 128}, ConvShape{128, 16, 16, 256, 256}}) {
    CHECK(taken(with_addends(with_input(s, 0, kNormalise), 5)));
    CHECK(gradient_taken(make_desc(s)));
  }
  for (const ConvShape& s : kTiles) {
    INFO(describe(make_desc(s)));
    CHECK(taken(with_addends(with_input(s, 0, kNormalise), 5)));
    CHECK(gradient_taken(make_desc({s.n, s.h, s.w, s.c, 8})));
  }
  CHECK_FALSE(taken(make_desc({2, 8, 8, 12, 8})));  // channels not by eight
  CHECK_FALSE(taken(make_desc({3, 5, 7, 8, 8})));
  CHECK_FALSE(taken(make_desc({3, 8, 16, 8, 8})));            // 64 rows of parts of images
  CHECK_FALSE(taken(make_desc({1, 64, 64, 8, 8, 3, 3, 2})));  // its halo does not fit
  CHECK(cuda::hopper_forward({cuda::CudaBackend::kHopperShared, 0}, make_desc({1, 16, 16, 8, 8}),
                             all_slots(), Out{1}, Out{2})
            .run == nullptr);
}

TEST_CASE("simt.conv_hopper: forward, every way that tiles lie", "[simt][conv]") {
  const auto backend = hopper_backend();
  if (backend == nullptr) return;
  for (const ConvShape& s : kTiles) {
    check_fused(*backend, make_desc(s));
    check_fused(*backend, with_addends(with_input(s, 0, kNormalise), 5));
  }
}

TEST_CASE("simt.conv_hopper: forward, what happens to the input and behind the taps",
          "[simt][conv]") {
  const auto backend = hopper_backend();
  if (backend == nullptr) return;
  const ConvShape square{1, 8, 16, 40, 16}, pointwise{2, 8, 8, 64, 8, 1, 1, 1, 0, 0, 0, 0};
  for (const Transform& t :
       {Transform{.affine = true}, Transform{.silu = true}, Transform{.dropout = {.p = 0.5f}}})
    check_fused(*backend, with_input(square, 0, t));
  for (int which = 0; which < 5; ++which)
    check_fused(*backend, with_addends(make_desc(square), which));
  const std::vector<ConvDesc> descs = {
      with_input(square, 24, kNormalise),  // a chunk that straddles the concatenation
      with_input(pointwise, 0, kNormalise),
      with_input({2, 4, 4, 16, 16}, 16, kNormalise, true),
      with_input({2, 8, 8, 16, 8, 3, 3, 2, 0, 0, 1, 1}, 0, kNormalise),
      with_input({1, 9, 8, 16, 8, 5, 5, 1, 2, 2, 2, 2}, 0, kNormalise),
      with_input({1, 8, 9, 16, 8, 1, 3, 1, 0, 1, 0, 1}, 8),
  };
  for (const ConvDesc& d : descs) {
    INFO(describe(d));
    REQUIRE(taken(with_addends(d, 5)));
    check_fused(*backend, with_addends(d, 5));
  }
}

TEST_CASE("simt.conv_hopper: gradient by the input, with a norm and without", "[simt][conv]") {
  const auto backend = hopper_backend();
  if (backend == nullptr) return;
  for (const ConvShape& s :
       {ConvShape{2, 16, 16, 24, 40}, ConvShape{1, 17, 19, 8, 16}, ConvShape{5, 8, 8, 16, 72},
        ConvShape{17, 4, 4, 8, 16}, ConvShape{1, 5, 128, 8, 8}, ConvShape{1, 8, 9, 136, 8},
        ConvShape{2, 8, 8, 8, 40, 1, 1, 1, 0, 0, 0, 0}}) {
    REQUIRE(gradient_taken(make_desc(s)));
    check_dgrad(*backend, make_desc(s));
    check_dgrad_norm(*backend, with_input(s, 0, kNormalise));
  }
  check_dgrad_norm(*backend, with_input({1, 8, 16, 24, 40}, 16, kNormalise));
}

// Rounded to bf16, two right sums of the same products differ in few places, by one unit there.
TEST_CASE("simt.conv_hopper: equals the kernel by mma.sync", "[simt][conv]") {
  const auto backend = hopper_backend(), other = make_kernel_backend(DType::kBF16);
  if (backend == nullptr) return;
  const auto compare = [](const std::vector<float>& is, const std::vector<float>& expected) {
    CHECK(relative_error(is, to_double(expected)) <= 0x1p-10);
  };
  const auto forwards = [&](const ConvDesc& d) {
    INFO(describe(d));
    const ConvData t(d, backend.get());
    const Forward is = forward_all(*backend, d, t), expected = forward_all(*other, d, t);
    compare(is.y, expected.y);
    CHECK(relative_error(is.statistics, to_double(expected.statistics)) <= 0x1p-8);
  };
  const auto gradients = [&](const ConvDesc& d) {
    INFO(describe(d));
    const ConvData t(d, backend.get());
    compare(dgrad(*backend, d, t, Write::kOverwrite, {}),
            dgrad(*other, d, t, Write::kOverwrite, {}));
  };
  forwards(with_addends(with_input({1, 32, 32, 128, 128}, 0, kNormalise), 5));
  forwards(with_addends(with_input({3, 8, 8, 72, 136}, 0, kNormalise), 5));
  gradients(make_desc({1, 16, 16, 256, 256}));
  gradients(make_desc({3, 8, 8, 72, 136}));
}

// One block, or few, take tile after tile through the same slots and stages.
TEST_CASE("simt.conv_hopper: neither blocks nor the order of warps change a bit", "[simt][conv]") {
  const auto backend = hopper_backend();
  if (backend == nullptr) return;
  for (const ConvDesc& d : {with_addends(with_input({3, 16, 16, 40, 136}, 24, kNormalise), 5),
                            with_input({5, 16, 16, 8, 8, 1, 1, 1, 0, 0, 0, 0}, 0, kNormalise)}) {
    const ConvData t(d, backend.get());
    const Forward f = forward_all(*backend, d, t);
    for (const int blocks : {1, 2}) {
      simt::options().seed = 77u + static_cast<uint64_t>(blocks);
      const auto few = hopper_backend(blocks);
      const Forward again = forward_all(*few, d, t);
      CHECK((again.y == f.y));
      CHECK((again.statistics == f.statistics));
    }
    simt::options() = {};
  }
}

TEST_CASE("simt.conv_hopper: an image's bits depend neither on the batch nor on its neighbours",
          "[simt][conv]") {
  const auto backend = hopper_backend();
  if (backend == nullptr) return;
  for (const int h : {4, 8, 16}) {
    const ConvDesc many = make_desc({9, h, h, 16, 8});
    ConvDesc one = many;
    one.x.n = 1;
    const ConvData all(many, backend.get());
    ConvData alone(one, backend.get());
    alone.x.assign(all.x.end() - one.x.count(), all.x.end());
    const std::vector<float> y = forward(*backend, many, all);
    CHECK(
        (forward(*backend, one, alone) == std::vector<float>(y.end() - one.y().count(), y.end())));
  }
}
