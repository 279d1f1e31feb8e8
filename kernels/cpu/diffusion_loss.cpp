// Every training loss and its gradient, an element at a time in double: next to the network it
// takes no time.
#include "kernels/diffusion_loss.h"

#include <algorithm>
#include <cmath>

#include "kernels/cpu/cpu_backend.h"
#include "kernels/cpu/parallel.h"

namespace ddpm::cpu {
namespace {

constexpr int64_t kChunk = 4096;

// A chunk of an image, and what its elements are multiplied by.
struct Chunk {
  int64_t begin, end;  // in the batch
  int32_t t;
  double scale;  // of the gradient
};

// Returns the sum of the elements' losses.
double loss_chunk(const DiffusionLossDesc& d, const LossFactors& factors, const Chunk& chunk,
                  const float* prediction, const float* target, const float* x0,
                  float* d_prediction) {
  const int64_t c = d.x.c;
  double sum = 0;
  for (int64_t i = chunk.begin; i < chunk.end; ++i) {
    const int64_t mean = d.variance ? i + i / c * c : i, variance = mean + c;
    const ElementLoss<double> e =
        element_loss<double>(d, factors, chunk.t == 0, double{prediction[mean]},
                             d.variance ? double{prediction[variance]} : 0.0, double{target[i]},
                             x0 != nullptr ? double{x0[i]} : 0.0);
    sum += e.value;
    d_prediction[mean] = static_cast<float>(e.by_mean * chunk.scale);
    if (d.variance) d_prediction[variance] = static_cast<float>(e.by_variance * chunk.scale);
  }
  return sum;
}

}  // namespace

Call CpuBackend::diffusion_loss(const DiffusionLossDesc& d, In prediction, In target, In x0, In t,
                                In factors, In weight, Out sample_loss, Out d_prediction,
                                Out state) {
  const bool bound = d.loss != LossKind::kSimple;
  DDPM_CHECK(d.x.positive() && d.step_images >= d.x.n && d.timesteps > 0,
             "diffusion_loss: shape %s of %d images, %d timesteps", to_string(d.x).c_str(),
             d.step_images, d.timesteps);
  DDPM_CHECK(!bound || (x0 && t && factors), "diffusion_loss: the bound without x0, t or factors");
  const int64_t size = d.x.pixels() * d.x.c, chunks = (size + kChunk - 1) / kChunk;
  Call call{"diffusion_loss",
            {prediction, target},
            {sample_loss, d_prediction, state},
            sizeof(double) * static_cast<size_t>(d.x.n * chunks),
            {}};
  for (const In in : {x0, t, factors, weight})
    if (in) call.reads.push_back(in);
  call.run = [=, threads = threads_](const Run& r) {
    const auto weight_of = [&](int64_t n) { return weight ? double{r.in<float>(weight)[n]} : 1.0; };
    const auto* const steps = bound ? r.in<int32_t>(t) : nullptr;
    for (int i = 0; bound && i < d.x.n; ++i)
      if (steps[i] < 0 || steps[i] >= d.timesteps)
        fail(Status::kBug, "diffusion_loss: timestep %d of %d", steps[i], d.timesteps);
    double* const sums = static_cast<double*>(r.workspace);
    parallel_for(threads_for(threads, d.x.n * size), d.x.n * chunks, [&](int64_t b, int64_t e) {
      for (int64_t i = b; i < e; ++i) {
        const int64_t n = i / chunks, start = i % chunks * kChunk;
        const Chunk chunk{n * size + start, n * size + std::min(start + kChunk, size),
                          bound ? steps[n] : 0,
                          weight_of(n) / (static_cast<double>(size) * d.step_images)};
        const LossFactors f = bound ? r.in<LossFactors>(factors)[chunk.t] : LossFactors();
        sums[i] = loss_chunk(d, f, chunk, r.in<float>(prediction), r.in<float>(target),
                             r.in<float>(x0), r.out<float>(d_prediction));
      }
    });
    double total = 0;
    for (int64_t n = 0; n < d.x.n; ++n) {
      double sum = 0;
      for (int64_t j = 0; j < chunks; ++j) sum += sums[n * chunks + j];
      sum /= static_cast<double>(size);
      total += weight_of(n) * sum;
      r.out<float>(sample_loss)[n] = static_cast<float>(sum);
    }
    StepState& s = *r.out<StepState>(state);
    s.loss = static_cast<float>(total / d.step_images);
    if (!std::isfinite(s.loss)) set_nonfinite(s, kLossNonFinite);
  };
  return call;
}

}  // namespace ddpm::cpu
