// Timesteps drawn by their losses, and the losses they are drawn by: 44 bytes a timestep, read
// three times by one block and limited by latency.
#include "kernels/loss_history.h"

#include <algorithm>

#include "kernels/cuda/block.h"
#include "kernels/cuda/cuda_backend.h"
#include "kernels/cuda/normals.h"
#include "kernels/cuda/vec.h"

namespace ddpm::cuda {
namespace {

constexpr int kBlock = 256;

// One block, a thread a run of timesteps: cdf[t] = p(0) + ... + p(t).
__global__ void timestep_cdf_kernel(int timesteps, Global<const float> history,
                                    Global<double> cdf) {
  SharedMemory shared;
  const Smem<double> scratch = shared.take<double>(kBlock / 32);
  const Smem<int> missing = shared.take<int>(kBlock / 32);
  const Smem<double> parts = shared.take<double>(kBlock);
  const int run = (timesteps + kBlock - 1) / kBlock, thread = static_cast<int>(threadIdx.x);
  const int begin = std::min(thread * run, timesteps), end = std::min(begin + run, timesteps);
  double total = 0;
  int few = 0;
  for (int t = begin; t < end; ++t) {
    const double root = loss_root(history + int64_t{t} * kLossHistoryRow);
    total += root;
    few += root < 0 ? 1 : 0;
  }
  total = block_sum(total, scratch);
  if (block_sum(few, missing) > 0) total = 0;
  double part = 0;
  for (int t = begin; t < end; ++t)
    part +=
        timestep_probability(loss_root(history + int64_t{t} * kLossHistoryRow), total, timesteps);
  parts[thread] = part;
  block_sync();
  double sum = 0;
  for (int i = 0; i < thread; ++i) sum += parts[i];
  for (int t = begin; t < end; ++t) {
    sum +=
        timestep_probability(loss_root(history + int64_t{t} * kLossHistoryRow), total, timesteps);
    cdf[t] = sum;
  }
}

__global__ void search_timesteps_kernel(int n, int timesteps, Global<const double> cdf,
                                        Global<const StepState> state, Global<int32_t> t,
                                        Global<float> weight) {
  const int slot = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (slot >= n) return;
  const StepState s = state[0];
  const uint32_t bits = training_stream(s, Purpose::kTimestep, slot).block(0)[0];
  const double u = bits * 0x1p-32 * cdf[timesteps - 1];
  int low = 0, high = timesteps - 1;  // the first whose cdf is above u
  while (low < high) {
    const int middle = (low + high) / 2;
    if (cdf[middle] > u)
      high = middle;
    else
      low = middle + 1;
  }
  const double before = low > 0 ? double(cdf[low - 1]) : 0.0;
  t[slot] = low;
  weight[slot] = static_cast<float>(1 / (timesteps * (double(cdf[low]) - before)));
}

// A thread a timestep: the order of the images is kept.
__global__ void loss_history_kernel(int n, int timesteps, Global<const int32_t> t,
                                    Global<const float> sample_loss, Global<const StepState> state,
                                    Global<float> history) {
  const int own = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  const StepState s = state[0];
  if (own >= timesteps || s.nonfinite != 0) return;
  for (int i = 0; i < n; ++i)
    if (t[i] == own) add_loss(history + int64_t{own} * kLossHistoryRow, sample_loss[i]);
}

}  // namespace

Call CudaBackend::draw_timesteps_by_loss(int n, int timesteps, In history, In state, Out t,
                                         Out weight) {
  DDPM_CHECK(n > 0 && timesteps > 0, "draw_timesteps_by_loss: n %d, timesteps %d", n, timesteps);
  constexpr size_t kShared = shared_bytes<double>(kBlock / 32) + shared_bytes<int>(kBlock / 32) +
                             shared_bytes<double>(kBlock);
  return {"draw_timesteps_by_loss",
          {history, state},
          {t, weight},
          sizeof(double) * static_cast<size_t>(timesteps),
          [=](const Run& r) {
            auto* cdf = static_cast<double*>(r.workspace);
            launch<timestep_cdf_kernel>({.block = kBlock, .shared = kShared}, r.stream, timesteps,
                                        r.in<float>(history), cdf);
            launch<search_timesteps_kernel>({.grid_x = blocks_for(n, 1, kBlock), .block = kBlock},
                                            r.stream, n, timesteps, cdf, r.in<StepState>(state),
                                            r.out<int32_t>(t), r.out<float>(weight));
          }};
}

Call CudaBackend::loss_history(int n, int timesteps, In t, In sample_loss, In state, Out history) {
  DDPM_CHECK(n > 0 && timesteps > 0, "loss_history: n %d, timesteps %d", n, timesteps);
  return {"loss_history", {t, sample_loss, state}, {history}, 0, [=](const Run& r) {
            launch<loss_history_kernel>(
                {.grid_x = blocks_for(timesteps, 1, kBlock), .block = kBlock}, r.stream, n,
                timesteps, r.in<int32_t>(t), r.in<float>(sample_loss), r.in<StepState>(state),
                r.out<float>(history));
          }};
}

}  // namespace ddpm::cuda
