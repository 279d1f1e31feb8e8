// The CUDA convolutions on the host at the networks' shapes. Grids are large, so some blocks are
// run, and some of what they wrote is compared with the formula, element by element.
#include <algorithm>
#include <fstream>
#include <iterator>

#include "tests/conv_support.h"
#include "tests/conv_table.h"
#include "tests/kernel_backend.h"
#include "tests/network_layers.h"
#include "tests/simt/machine.h"

using namespace ddpm;
using namespace ddpm::test;

namespace {

// So many images that no sum is split over blocks: a split needs all of them.
int enough_images(int h, int channels) {
  const int tiles = std::max(1, h * h / 128), columns = (channels + 127) / 128;
  const int images = 1 + 133 / (tiles * columns);
  return h == 4 ? images * 8 : h == 8 ? images * 2 : images;
}

// As a residual block would ask for it.
ConvDesc block_desc(const Layer& l) {
  ConvDesc d = test::desc_of(l, enough_images(l.h, l.k));
  d.statistics = true;
  if (!l.up && l.stride == 1 && l.kernel == 3 && l.c1 >= 8) {
    d.transform = {.affine = true, .silu = true, .dropout = {.p = 0.1f, .layer = 5}};
    d.sample_bias_stride = l.k;
    d.residual = l.k >= 8;
    d.shortcut_c = l.k >= 8 ? 40 : 0;
  }
  return d;
}

// The input under the taps.
double input_at(const ConvDesc& d, const ConvData& t, int n, int i, int j, int c) {
  if (i < 0 || j < 0 || i >= d.in_h() || j >= d.in_w()) return 0;
  const int up = d.upsample ? 2 : 1;
  const int64_t pixel = int64_t{i / up} * d.x.w + j / up, at = n * d.x.pixels() + pixel;
  double v = c < d.x.c ? t.x[static_cast<size_t>(at * d.x.c + c)]
                       : t.x2[static_cast<size_t>(at * d.c2 + c - d.x.c)];
  if (d.transform.affine) {
    const size_t pair =
        (static_cast<size_t>(n) * static_cast<size_t>(d.c()) + static_cast<size_t>(c)) * 2;
    v = v * static_cast<double>(t.scale_shift[pair]) + static_cast<double>(t.scale_shift[pair + 1]);
  }
  if (d.transform.silu) v = v / (1 + std::exp(-v));
  if (d.transform.dropout.p > 0) {
    const Dropout& drop = d.transform.dropout;
    const RandomStream stream{.seed = kConvState.seed,
                              .purpose = Purpose::kDropout,
                              .sample = kConvState.first_image + static_cast<uint64_t>(n),
                              .step = static_cast<uint32_t>(kConvState.step),
                              .layer = drop.layer};
    const int64_t e = pixel * d.c() + c;
    const bool keep = dropout_bits(stream.block(static_cast<uint32_t>(e / 8)),
                                   static_cast<int>(e % 8)) >= drop.threshold();
    v = keep ? v / (1.0 - static_cast<double>(drop.p)) : 0.0;
  }
  return v;
}

double forward_at(const ConvDesc& d, const ConvData& t, int64_t index) {
  const int k = static_cast<int>(index % d.k);
  const int64_t pixel = index / d.k;
  const int q = static_cast<int>(pixel % d.q()), p = static_cast<int>(pixel / d.q() % d.p());
  const int n = static_cast<int>(pixel / d.y().pixels());
  double sum = static_cast<double>(t.bias[static_cast<size_t>(k)]);
  for (int r = 0; r < d.r; ++r)
    for (int s = 0; s < d.s; ++s)
      for (int c = 0; c < d.c(); ++c)
        sum += input_at(d, t, n, p * d.stride + r - d.pad_top, q * d.stride + s - d.pad_left, c) *
               static_cast<double>(
                   t.filter[static_cast<size_t>(((int64_t{k} * d.r + r) * d.s + s) * d.c() + c)]);
  if (d.sample_bias_stride > 0)
    sum += static_cast<double>(t.sample_bias[static_cast<size_t>(n * d.sample_bias_stride + k)]);
  if (d.residual) sum += static_cast<double>(t.residual[static_cast<size_t>(index)]);
  if (d.shortcut_c > 0) sum += static_cast<double>(t.shortcut_bias[static_cast<size_t>(k)]);
  for (int c = 0; c < d.shortcut_c; ++c)
    sum += static_cast<double>(t.shortcut[static_cast<size_t>(pixel * d.shortcut_c + c)]) *
           static_cast<double>(t.shortcut_filter[static_cast<size_t>(k * d.shortcut_c + c)]);
  return sum;
}

double dgrad_at(const ConvDesc& d, const ConvData& t, int64_t index) {
  const int c = static_cast<int>(index % d.x.c);
  const int64_t pixel = index / d.x.c;
  const int x = static_cast<int>(pixel % d.x.w), y = static_cast<int>(pixel / d.x.w % d.x.h);
  const int64_t n = pixel / d.x.pixels();
  double sum = 0;
  for (int r = 0; r < d.r; ++r)
    for (int s = 0; s < d.s; ++s) {
      const int i = y + d.pad_top - r, j = x + d.pad_left - s;
      if (i < 0 || j < 0 || i % d.stride != 0 || j % d.stride != 0) continue;
      const int p = i / d.stride, q = j / d.stride;
      if (p >= d.p() || q >= d.q()) continue;
      for (int k = 0; k < d.k; ++k)
        sum += static_cast<double>(
                   t.dy[static_cast<size_t>(((n * d.p() + p) * d.q() + q) * d.k + k)]) *
               static_cast<double>(
                   t.filter[static_cast<size_t>(((int64_t{k} * d.r + r) * d.s + s) * d.x.c + c)]);
    }
  return sum;
}

double wgrad_at(const ConvDesc& d, const ConvData& t, int64_t index) {
  const int c = static_cast<int>(index % d.c()), s = static_cast<int>(index / d.c() % d.s);
  const int r = static_cast<int>(index / d.c() / d.s % d.r);
  const int64_t k = index / d.c() / d.s / d.r;
  double sum = 0;
  for (int n = 0; n < d.x.n; ++n)
    for (int p = 0; p < d.p(); ++p)
      for (int q = 0; q < d.q(); ++q)
        sum += input_at(d, t, n, p * d.stride + r - d.pad_top, q * d.stride + s - d.pad_left, c) *
               static_cast<double>(
                   t.dy[static_cast<size_t>(((int64_t{n} * d.p() + p) * d.q() + q) * d.k + k)]);
  return sum;
}

// Some of what was written, beside `expected(index)`; nothing written is a failure.
template <typename F>
double sampled_error(const std::vector<float>& is, int count, F expected) {
  std::vector<int64_t> written;
  for (size_t i = 0; i < is.size(); ++i)
    if (!std::isnan(is[i])) written.push_back(static_cast<int64_t>(i));
  if (written.empty()) return 1;
  std::vector<double> a, b;
  const RandomStream stream{.seed = 5, .purpose = Purpose::kShapes, .step = 9};
  for (int i = 0; i < count; ++i) {
    const uint32_t draw = stream.block(static_cast<uint32_t>(i))[0];
    const int64_t index =
        written[static_cast<size_t>(uniform_below(draw, static_cast<uint32_t>(written.size())))];
    a.push_back(static_cast<double>(is[static_cast<size_t>(index)]));
    b.push_back(expected(index));
  }
  return relative_error(a, b);
}

// bf16: roundings of the output and of each transformed input are within 2^-8 of an element; of a
// few dozen samples no more can be said.
double bound(const Backend& backend, bool narrow_output) {
  if (backend.compute_type() == DType::kF32) return 1e-5;
  return (narrow_output ? 0x1p-8 : 0) + 0x1p-8;
}

void check_layer(Backend& backend, const Layer& layer) {
  const ConvDesc d = block_desc(layer);
  const ConvData t(d, &backend);
  INFO(describe(d));
  simt::options().max_blocks = 2;
  const auto f = forward_all(backend, d, t);
  simt::options().max_blocks = 0;
  CHECK(sampled_error(f.y, 40, [&](int64_t i) { return forward_at(d, t, i); }) <=
        bound(backend, true));
  CHECK(std::count_if(f.statistics.begin(), f.statistics.end(),
                      [](float v) { return !std::isnan(v); }) >= 2 * std::min(d.k, 64));
}

void check_layer_dgrad(Backend& backend, const Layer& layer) {
  if (layer.c1 < 8) return;  // nobody wants the image's gradient
  ConvDesc d = block_desc(layer);
  d.x = {enough_images(d.in_h(), d.c()), d.in_h(), d.in_w(), d.c()};
  d.c2 = 0;
  d.upsample = false;
  d.transform = {};
  d.sample_bias_stride = d.shortcut_c = 0;
  d.residual = d.statistics = d.bias = false;
  const ConvData t(d, &backend);
  INFO("dgrad " << describe(d));
  simt::options().max_blocks = 2;
  const auto dx = dgrad(backend, d, t, Write::kOverwrite, {});
  simt::options().max_blocks = 0;
  CHECK(sampled_error(dx, 40, [&](int64_t i) { return dgrad_at(d, t, i); }) <=
        bound(backend, true));
}

// One image, or as many as fill a tile. A split over tiles needs every block, so all are run where
// that is so.
void check_layer_wgrad(Backend& backend, const Layer& layer, int images, bool sample) {
  ConvDesc d = block_desc(layer);
  d.x.n = images;
  d.sample_bias_stride = d.shortcut_c = 0;
  d.residual = d.statistics = d.bias = false;
  const ConvData t(d, &backend);
  INFO("wgrad " << describe(d));
  simt::options().max_blocks = sample ? 2 : 0;
  const auto df = wgrad(backend, d, t, Write::kOverwrite, {});
  simt::options().max_blocks = 0;
  CHECK(sampled_error(df, 24, [&](int64_t i) { return wgrad_at(d, t, i); }) <=
        bound(backend, false));
}

}  // namespace

TEST_CASE("simt.conv: cifar10's shapes", "[simt][conv]") {
  const Layer layer = kCifar10[static_cast<size_t>(GENERATE(range(0, 22)))];
  const auto backend = make_kernel_backend(DType::kBF16);
  check_layer(*backend, layer);
  check_layer_dgrad(*backend, layer);
}

TEST_CASE("simt.conv: the 256x256 networks' shapes", "[simt][conv]") {
  const Layer layer = kLarge[static_cast<size_t>(GENERATE(range(0, 23)))];
  const auto backend = make_kernel_backend(DType::kBF16);
  check_layer(*backend, layer);
  check_layer_dgrad(*backend, layer);
}

TEST_CASE("conv: the tables of docs/kernels.md are those of the plans", "[conv]") {
  const std::string path = std::string(DDPM_SOURCE_DIR) + "/docs/kernels.md";
  std::ifstream file(path);
  const std::string text{std::istreambuf_iterator<char>(file), {}};
  CHECK(text.find(conv_tables()) != std::string::npos);  // else: ddpm_tests --conv-tables
}

TEST_CASE("simt.conv_wgrad: shapes of the networks", "[simt][conv]") {
  struct Case {
    Layer layer;
    int images;
    bool sample;
  };
  const std::vector<Case> cases = {
      {{3, 0, 128, 32}, 1, false},
      {{128, 0, 128, 32}, 1, false},
      {{128, 0, 128, 16, false, 2}, 1, false},
      {{256, 0, 256, 16}, 1, false},
      {{256, 128, 256, 16}, 1, false},
      {{256, 0, 256, 8, false, 2}, 2, true},
      {{256, 256, 256, 8}, 2, true},
      {{256, 256, 256, 4}, 8, true},
      {{256, 0, 256, 8, true}, 2, true},
      {{256, 128, 128, 32, false, 1, 1}, 1, false},
      {{128, 0, 3, 32}, 1, false},
      {{512, 512, 512, 8}, 16, true},  // 128 blocks: not split, eight tiles in a row
      {{24, 8, 16, 64}, 1, false},     // the large images of the other networks, fewer channels
      {{8, 8, 8, 128}, 1, false},
      {{8, 0, 8, 128, true}, 1, false},
  };
  const Case c = cases[static_cast<size_t>(GENERATE(range(0, 15)))];
  check_layer_wgrad(*make_kernel_backend(DType::kBF16), c.layer, c.images, c.sample);
}
