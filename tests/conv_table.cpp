#include "tests/conv_table.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "kernels/cuda/conv_plan.h"
#include "kernels/cuda/cuda_backend.h"
#include "kernels/error.h"
#include "tests/network_layers.h"

namespace ddpm::test {
namespace {

// An H100: multiprocessors, bytes a second, and the rates that docs/kernels.md predicts for blocks
// that fill it: forward with everything fused, by mma.sync and by wgmma.
constexpr double kProcessors = 132, kCopyRate = 3.0e12, kMmaRate = 423e12, kWgmmaRate = 650e12;
constexpr double kLaunch = 2e-6;
constexpr int kBlocksEach = 2;  // of mma.sync's, on a multiprocessor

// As a residual block asks for it, where the layer stands in one.
ConvDesc fused_desc(const Layer& l, int images) {
  ConvDesc d = desc_of(l, images);
  d.statistics = true;
  if (!l.up && l.stride == 1 && l.kernel == 3 && l.c1 >= 8)
    d.transform = {.affine = true, .silu = true, .dropout = {.p = 0.1f}};
  return d;
}

cuda::ConvPlan plan_of(const ConvDesc& d) {
  ConvSlots s;
  s.x = s.x2 = s.scale_shift = s.filter = s.bias = s.state = In{0};
  return cuda::tensor_forward(cuda::CudaBackend::kHopperShared, d, s, Out{1}, Out{2}, false);
}

double flop(const ConvDesc& d) { return 2.0 * d.y().count() * d.r * d.s * d.c(); }
double bytes(const ConvDesc& d) {
  const double in = static_cast<double>(d.x.n * d.x.pixels()) * d.c();
  return 2 * (in + static_cast<double>(d.y().count() + d.filter().count()));
}

// Of what the blocks compute, the part that is asked for.
double tile_use(const ConvDesc& d, const cuda::ConvGrid& g) {
  return static_cast<double>(d.y().count()) / (static_cast<double>(g.blocks) * 128 * g.columns);
}

// How many turns the blocks take, and the rate that is left of `full`.
double waves(double blocks, double at_once) { return blocks / at_once; }
double rate(const ConvDesc& d, const cuda::ConvGrid& g, double full, double at_once) {
  const double turns = waves(g.blocks * g.splits, at_once);
  const double fill = turns / std::ceil(turns) * tile_use(d, g);
  return flop(d) / (std::max(flop(d) / (full * fill), bytes(d) / kCopyRate) + kLaunch);
}

std::string cell(const ConvDesc& d) {
  const cuda::ConvGrid g = plan_of(d).grid;
  std::string text =
      format("%.2f: %.0f, %.0f", waves(g.blocks * g.splits, kBlocksEach * kProcessors),
             rate(d, g, kMmaRate, kBlocksEach * kProcessors) * 1e-12,
             rate(d, g, kWgmmaRate, kProcessors) * 1e-12);
  if (g.splits > 1) text += format(" (%d)", g.splits);
  return text;
}

std::string name(const Layer& l) {
  std::string text = format("%d", l.c1);
  if (l.c2 > 0) text += format("+%d", l.c2);
  text += format(" to %d at %dx%d", l.k, l.h, l.h);
  if (l.kernel == 1) text += ", 1x1";
  if (l.stride == 2) text += ", stride 2";
  if (l.up) text += ", upsampled";
  return text;
}

std::string table(const std::vector<Layer>& layers, const std::vector<int>& batches) {
  std::string text = "| layer | GFLOP | MB | shared KB | tile use |",
              rule = "|---|---|---|---|---|";
  for (const int n : batches) {
    text += format(" batch %d |", n);
    rule += "---|";
  }
  text += "\n" + rule + "\n";
  for (const Layer& l : layers) {
    const ConvDesc d = fused_desc(l, 128);
    const cuda::ConvGrid g = plan_of(d).grid;
    text += format("| %s | %.3f | %.2f | %.0f | %.0f %% |", name(l).c_str(), flop(d) / 128e9,
                   bytes(d) / 128e6, static_cast<double>(g.shared) / 1024, 100 * tile_use(d, g));
    for (const int n : batches) text += " " + cell(fused_desc(l, n)) + " |";
    text += "\n";
  }
  return text;
}

}  // namespace

std::string conv_tables() {
  return "cifar10:\n\n" + table(kCifar10, {1, 16, 128, 256}) + "\ncelebahq256:\n\n" +
         table(kLarge, {1, 16, 64});
}

}  // namespace ddpm::test
