#include <catch2/catch.hpp>

#include <cstring>

#include "kernels/cpu/winograd.h"
#include "tests/reference/conv.h"
#include "tests/support.h"

using namespace ddpm;
using test::random_values;
using test::relative_error;
using test::to_double;
namespace winograd = cpu::winograd;

namespace {

// fp32 Winograd at these points: about 1e-6 of the result, little depending on the channels; the
// bound is what the precision "auto" promises.
constexpr double kTolerance = 5e-6;

ConvDesc make_desc(int n, int h, int w, int c, int k) {
  ConvDesc d;
  d.x = {n, h, w, c};
  d.k = k;
  return d;
}

struct Data {
  std::vector<float> x, filter, dy;
  explicit Data(const ConvDesc& d)
      : x(random_values(d.x.count(), 1)),
        filter(random_values(d.filter().count(), 2)),
        dy(random_values(d.y().count(), 3)) {}
};

// Memory with a guard behind it that the destructor checks.
class Guarded {
 public:
  explicit Guarded(size_t bytes) : floats_(bytes / sizeof(float)), values_(floats_ + 64, kGuard) {
    REQUIRE(bytes % sizeof(float) == 0);
    std::fill_n(values_.begin(), floats_, std::numeric_limits<float>::quiet_NaN());
  }
  ~Guarded() {
    for (size_t i = floats_; i < values_.size(); ++i) CHECK(values_[i] == kGuard);
  }
  float* data() { return values_.data(); }
  std::vector<float> values() const { return {values_.begin(), values_.end() - 64}; }

 private:
  static constexpr float kGuard = 12345;
  size_t floats_;
  std::vector<float> values_;
};

std::vector<float> run(const ConvDesc& d, ConvPass pass, int threads, const std::vector<float>& in,
                       const std::vector<float>& filter, const winograd::Epilogue& e = {}) {
  Guarded packed(winograd::filter_bytes(d));
  winograd::pack(d, pass, threads, filter.data(), packed.data());
  Guarded workspace(winograd::workspace_bytes(d, pass, threads));
  Guarded out(sizeof(float) * (pass == ConvPass::kDgrad ? d.x : d.y()).count());
  winograd::run(d, pass, threads, in.data(), packed.data(), e, out.data(), workspace.data());
  return out.values();
}

std::vector<float> wgrad(const ConvDesc& d, int threads, const Data& t, bool accumulate) {
  Guarded workspace(winograd::workspace_bytes(d, ConvPass::kWgrad, threads));
  Guarded out(sizeof(float) * d.filter().count());
  if (accumulate) std::copy(t.filter.begin(), t.filter.end(), out.data());
  winograd::run_wgrad(d, threads, t.x.data(), t.dy.data(), accumulate, out.data(),
                      workspace.data());
  return out.values();
}

// N, H, W, C, K: whole tiles, tiles hanging over, less than a tile, channel panels of 32 and of 16,
// several blocks of 64 channels, one tile for several threads, several steps of tiles.
const std::vector<ConvDesc> kShapes = {
    make_desc(1, 4, 4, 16, 16),   make_desc(2, 8, 8, 32, 32),   make_desc(1, 1, 1, 16, 16),
    make_desc(1, 2, 3, 16, 32),   make_desc(3, 5, 7, 32, 16),   make_desc(1, 9, 6, 48, 80),
    make_desc(1, 17, 1, 16, 16),  make_desc(1, 1, 19, 16, 16),  make_desc(5, 3, 3, 64, 48),
    make_desc(2, 4, 4, 144, 16),  make_desc(2, 4, 4, 16, 144),  make_desc(1, 8, 8, 80, 112),
    make_desc(1, 16, 16, 32, 32), make_desc(33, 4, 4, 16, 16),  make_desc(1, 29, 31, 16, 16),
    make_desc(2, 12, 20, 16, 48), make_desc(1, 4, 4, 272, 16),  make_desc(1, 8, 4, 128, 64),
    make_desc(7, 6, 6, 16, 16),   make_desc(1, 13, 11, 64, 64), make_desc(4, 8, 8, 96, 32),
};

}  // namespace

TEST_CASE("winograd: forward, dgrad and wgrad of every shape", "[winograd]") {
  for (const ConvDesc& d : kShapes) {
    const Data t(d);
    INFO(to_string(d.x) << " by " << to_string(d.filter()));
    const ref::ConvTensors tensors{.x = to_double(t.x), .filter = to_double(t.filter)};
    const auto y = ref::conv_forward(d, tensors);
    const auto dx = ref::conv_dgrad(d, tensors.filter, to_double(t.dy));
    const auto df = ref::conv_wgrad(d, tensors.x, to_double(t.dy));
    auto sum = df;
    for (size_t i = 0; i < sum.size(); ++i) sum[i] += static_cast<double>(t.filter[i]);
    for (const int threads : {1, 2, 3, 5}) {
      CHECK(relative_error(run(d, ConvPass::kForward, threads, t.x, t.filter), y) <= kTolerance);
      CHECK(relative_error(run(d, ConvPass::kDgrad, threads, t.dy, t.filter), dx) <= kTolerance);
      CHECK(relative_error(wgrad(d, threads, t, false), df) <= kTolerance);
      CHECK(relative_error(wgrad(d, threads, t, true), sum) <= kTolerance);
    }
  }
}

TEST_CASE("winograd: what the epilogue adds", "[winograd]") {
  ConvDesc d = make_desc(3, 5, 6, 16, 48);
  const Data t(d);
  const auto bias = random_values(d.k, 4), residual = random_values(d.y().count(), 5);
  const auto sample_bias = random_values(int64_t{d.x.n} * 100, 6);
  for (int parts = 0; parts < 8; ++parts) {
    ref::ConvTensors r{.x = to_double(t.x), .filter = to_double(t.filter)};
    winograd::Epilogue e;
    d.bias = parts & 1;
    d.sample_bias_stride = parts & 2 ? 100 : 0;
    d.sample_bias_offset = parts & 2 ? 7 : 0;
    d.residual = parts & 4;
    if (d.bias) r.bias = to_double(bias), e.bias = bias.data();
    if (d.residual) r.residual = to_double(residual), e.residual = residual.data();
    if (parts & 2) {
      r.sample_bias = to_double(sample_bias);
      e.sample_bias = sample_bias.data() + 7;
      e.sample_bias_stride = 100;
    }
    INFO("parts " << parts);
    CHECK(relative_error(run(d, ConvPass::kForward, 2, t.x, t.filter, e),
                         ref::conv_forward(d, r)) <= kTolerance);
  }
}

TEST_CASE("winograd: one image's bits, whatever the batch, its place and the threads",
          "[winograd]") {
  const ConvDesc all = make_desc(37, 6, 5, 48, 32);
  const Data t(all);
  const auto whole = run(all, ConvPass::kForward, 1, t.x, t.filter);
  for (const int n : {1, 2, 7, 37})
    for (const int threads : {1, 2, 3}) {
      ConvDesc d = all;
      d.x.n = n;
      const std::vector<float> last(t.x.end() - d.x.count(), t.x.end());
      const auto y = run(d, ConvPass::kForward, threads, last, t.filter);
      CHECK(std::memcmp(y.data(), whole.data() + whole.size() - y.size(),
                        y.size() * sizeof(float)) == 0);
    }
}

TEST_CASE("winograd: large and small magnitudes", "[winograd]") {
  const ConvDesc d = make_desc(2, 8, 8, 32, 32);
  for (const float scale : {1e-15f, 1e15f}) {
    Data t(d);
    for (float& v : t.x) v *= scale;
    for (float& v : t.filter) v *= scale;
    const auto y = ref::conv_forward(d, {.x = to_double(t.x), .filter = to_double(t.filter)});
    CHECK(relative_error(run(d, ConvPass::kForward, 2, t.x, t.filter), y) <= kTolerance);
  }
}

TEST_CASE("winograd: used where it is possible and faster", "[winograd]") {
  ConvDesc d = make_desc(8, 16, 16, 128, 128);
  for (const ConvPass pass : {ConvPass::kForward, ConvPass::kDgrad, ConvPass::kWgrad}) {
    CHECK(winograd::takes(d, pass));
    CHECK_FALSE(winograd::takes(make_desc(1, 4, 4, 256, 256), pass));
    CHECK_FALSE(winograd::takes(make_desc(64, 2, 2, 256, 256), pass));
    CHECK_FALSE(winograd::takes(make_desc(8, 16, 16, 3, 128), pass));
    CHECK_FALSE(winograd::takes(make_desc(8, 16, 16, 128, 3), pass));
    for (int ConvDesc::*field : {&ConvDesc::stride, &ConvDesc::r, &ConvDesc::s}) {
      ConvDesc other = d;
      other.*field = 2;
      CHECK_FALSE(winograd::takes(other, pass));
    }
    for (int ConvDesc::*pad :
         {&ConvDesc::pad_top, &ConvDesc::pad_left, &ConvDesc::pad_bottom, &ConvDesc::pad_right}) {
      ConvDesc other = d;
      other.*pad = 0;
      CHECK_FALSE(winograd::takes(other, pass));
    }
  }
  // Only precision "auto" without batch invariance: elsewhere the filter has oneDNN's size.
  for (const auto& [options, expected] :
       {std::pair{BackendOptions{.threads = 2}, true},
        {BackendOptions{.precision = Precision::kFp32, .threads = 2}, false},
        {BackendOptions{.threads = 2, .batch_invariant = true}, false}})
    CHECK((make_cpu_backend(options)->packed_bytes(d, ConvPass::kForward) ==
           winograd::filter_bytes(d)) == expected);
}
