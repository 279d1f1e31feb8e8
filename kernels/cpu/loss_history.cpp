// Timesteps drawn by their losses, and the losses they are drawn by.
#include "kernels/loss_history.h"

#include <algorithm>

#include "kernels/cpu/cpu_backend.h"
#include "kernels/philox.h"

namespace ddpm::cpu {
namespace {

// cdf[t] = p(0) + ... + p(t)
void accumulate(const float* history, int timesteps, double* cdf) {
  double total = 0;
  bool full = true;
  for (int t = 0; t < timesteps; ++t) {
    cdf[t] = loss_root(history + int64_t{t} * kLossHistoryRow);
    total += cdf[t];
    full = full && cdf[t] >= 0;
  }
  double sum = 0;
  for (int t = 0; t < timesteps; ++t)
    cdf[t] = sum += timestep_probability(cdf[t], full ? total : 0, timesteps);
}

}  // namespace

Call CpuBackend::draw_timesteps_by_loss(int n, int timesteps, In history, In state, Out t,
                                        Out weight) {
  DDPM_CHECK(n > 0 && timesteps > 0, "draw_timesteps_by_loss: n %d, timesteps %d", n, timesteps);
  return {"draw_timesteps_by_loss",
          {history, state},
          {t, weight},
          sizeof(double) * static_cast<size_t>(timesteps),
          [=](const Run& r) {
            const StepState& s = *r.in<StepState>(state);
            double* cdf = static_cast<double*>(r.workspace);
            accumulate(r.in<float>(history), timesteps, cdf);
            for (int i = 0; i < n; ++i) {
              const RandomStream stream{.seed = s.seed,
                                        .purpose = Purpose::kTimestep,
                                        .sample = s.first_image + static_cast<uint64_t>(i),
                                        .step = static_cast<uint32_t>(s.step)};
              const double u = stream.block(0)[0] * 0x1p-32 * cdf[timesteps - 1];
              const int64_t drawn =
                  std::min<int64_t>(std::upper_bound(cdf, cdf + timesteps, u) - cdf, timesteps - 1);
              const double p = cdf[drawn] - (drawn > 0 ? cdf[drawn - 1] : 0);
              r.out<int32_t>(t)[i] = static_cast<int32_t>(drawn);
              r.out<float>(weight)[i] = static_cast<float>(1 / (timesteps * p));
            }
          }};
}

Call CpuBackend::loss_history(int n, int timesteps, In t, In sample_loss, In state, Out history) {
  DDPM_CHECK(n > 0 && timesteps > 0, "loss_history: n %d, timesteps %d", n, timesteps);
  return {"loss_history", {t, sample_loss, state}, {history}, 0, [=](const Run& r) {
            if (r.in<StepState>(state)->nonfinite != 0) return;
            for (int i = 0; i < n; ++i)
              if (const int32_t at = r.in<int32_t>(t)[i]; at >= 0 && at < timesteps)
                add_loss(r.out<float>(history) + int64_t{at} * kLossHistoryRow,
                         r.in<float>(sample_loss)[i]);
          }};
}

}  // namespace ddpm::cpu
