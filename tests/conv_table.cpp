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
constexpr double kLaunch = 2e-6, kPacking = 3e-6;  // of the filter, before the kernel by wgmma
constexpr int kBlocksEach = 2;                     // of mma.sync's, on a multiprocessor

// As a residual block asks for it, where the layer stands in one.
ConvDesc fused_desc(const Layer& l, int images) {
  ConvDesc d = desc_of(l, images);
  d.statistics = true;
  if (!l.up && l.stride == 1 && l.kernel == 3 && l.c1 >= 8)
    d.transform = {.affine = true, .silu = true, .dropout = {.p = 0.1f}};
  return d;
}

ConvSlots slots() {
  ConvSlots s;
  s.x = s.x2 = s.scale_shift = s.filter = s.bias = s.state = In{0};
  return s;
}
cuda::ConvPlan plan_of(const ConvDesc& d) {
  return cuda::tensor_forward(cuda::CudaBackend::kHopperShared, d, slots(), Out{1}, Out{2}, false);
}
cuda::ConvPlan wgmma_plan_of(const ConvDesc& d) {
  return cuda::hopper_forward({cuda::CudaBackend::kHopperShared, static_cast<int>(kProcessors)}, d,
                              slots(), Out{1}, Out{2});
}

double flop(const ConvDesc& d) { return 2.0 * d.y().count() * d.r * d.s * d.c(); }
double bytes(const ConvDesc& d) {
  const double in = static_cast<double>(d.x.n * d.x.pixels()) * d.c();
  return 2 * (in + static_cast<double>(d.y().count() + d.filter().count()));
}

// Of what the blocks compute, the part that is asked for.
double tile_use(const ConvDesc& d, const cuda::ConvGrid& g, int rows) {
  return static_cast<double>(d.y().count()) / (static_cast<double>(g.blocks) * rows * g.columns);
}

// How many turns the blocks take, and the rate that is left of `full`.
double waves(double blocks, double at_once) { return blocks / at_once; }
double rate(const ConvDesc& d, double turns, double tile_use, double full, double before) {
  const double fill = turns / std::ceil(turns) * tile_use;
  return flop(d) / (std::max(flop(d) / (full * fill), bytes(d) / kCopyRate) + before);
}

std::string cell(const ConvDesc& d) {
  const cuda::ConvGrid g = plan_of(d).grid;
  const double turns = waves(g.blocks * g.splits, kBlocksEach * kProcessors);
  std::string text =
      format("%.2f: %.0f, ", turns, rate(d, turns, tile_use(d, g, 128), kMmaRate, kLaunch) * 1e-12);
  const cuda::ConvPlan wgmma = wgmma_plan_of(d);
  if (wgmma.run)
    text += format("%.0f", rate(d, waves(wgmma.grid.blocks, kProcessors),
                                tile_use(d, wgmma.grid, 256), kWgmmaRate, kLaunch + kPacking) *
                               1e-12);
  else
    text += "-";
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
    text +=
        format("| %s | %.3f | %.2f | %.0f | %.0f %% |", name(l).c_str(), flop(d) / 128e9,
               bytes(d) / 128e6, static_cast<double>(g.shared) / 1024, 100 * tile_use(d, g, 128));
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
