// The training loss and its gradient. mse_loss reads prediction and target (fp32) and writes the
// gradient, 8 or 12 bytes an element in bf16 or fp32; noise_loss draws the target again and moves 4
// or 8; diffusion_loss reads x0 (fp32) as well, and moves 4 or 8 more where there is a variance.
// CIFAR's batches are limited by latency, large images by memory, with noise by arithmetic.
//
// Sums: squares of fp32 differences in double, a thread's run, a block's chunk of 4096 elements,
// an image's chunks, the batch; each in a fixed order, and an image's from its own elements alone.
// The doubles are hidden: an H100's multiprocessor converts 16 elements a cycle, and the memory
// brings it two.
#include <algorithm>
#include <cmath>

#include "kernels/cuda/block.h"
#include "kernels/cuda/cuda_backend.h"
#include "kernels/cuda/image_run.h"
#include "kernels/cuda/normals.h"
#include "kernels/diffusion_loss.h"

namespace ddpm::cuda {
namespace {

constexpr int kMaxBlock = 512, kLastBlock = 256;
constexpr int kMaxBuckets = 32;

// sums[block]: of the squares of a chunk. The target is `target`, or drawn again.
template <typename T, bool Redraw>
__global__ void squared_error_kernel(int size, int chunks, float scale, Global<const T> prediction,
                                     Global<const float> target, Global<const StepState> state,
                                     Global<T> d_prediction, Global<double> sums) {
  SharedMemory shared;
  const Smem<double> scratch = shared.take<double>(static_cast<int>(blockDim.x) / 32);
  const int slot = static_cast<int>(blockIdx.x) / chunks;
  const ImageRun run = image_run(size, slot, static_cast<int>(blockIdx.x) % chunks);
  double sum = 0;
  if (run.count > 0) {
    float p[kRun], z[kRun];
    load_run<T>(prediction, run, p);
    if constexpr (Redraw)
      draw_normals(training_stream(state[0], Purpose::kNoise, slot), run.begin, z);
    else
      load_run<float>(target, run, z);
#pragma unroll
    for (int i = 0; i < kRun; ++i) {
      const float difference = i < run.count ? p[i] - z[i] : 0.0f;
      sum = fma(static_cast<double>(difference), static_cast<double>(difference), sum);
      p[i] = difference * scale;
    }
    store_run<T>(d_prediction, run, p);
  }
  sum = block_sum(sum, scratch);
  if (threadIdx.x == 0) sums[blockIdx.x] = sum;
}

// The same for every loss. Where the desc has no variance, there is none in the prediction.
template <typename T>
__global__ void diffusion_loss_kernel(DiffusionLossDesc d, int size, int chunks, float scale,
                                      Global<const T> prediction, Global<const float> target,
                                      Global<const float> x0, Global<const int32_t> t,
                                      Global<const float> factors, Global<const float> weight,
                                      Global<T> d_prediction, Global<double> sums) {
  SharedMemory shared;
  const Smem<double> scratch = shared.take<double>(static_cast<int>(blockDim.x) / 32);
  const int slot = static_cast<int>(blockIdx.x) / chunks;
  const ImageRun run = image_run(size, slot, static_cast<int>(blockIdx.x) % chunks);
  double sum = 0;
  if (run.count > 0) {
    float mean[kRun], variance[kRun] = {}, goal[kRun], image[kRun] = {};
    if (d.variance) {
      load_half<T>(prediction, run, d.x.c, 0, mean);
      load_half<T>(prediction, run, d.x.c, 1, variance);
    } else {
      load_run<T>(prediction, run, mean);
    }
    load_run<float>(target, run, goal);
    float f[4] = {};
    int own = -1;
    if (d.loss != LossKind::kSimple) {
      load_run<float>(x0, run, image);
      own = t[slot];
      f[0] = f[1] = f[2] = f[3] = std::bit_cast<float>(0x7FC00000u);
      if (own >= 0 && own < d.timesteps) load_floats<float>(factors + 4 * own, f);
    }
    const float weighted = weight != nullptr ? scale * weight[slot] : scale;
#pragma unroll
    for (int i = 0; i < kRun; ++i) {
      const ElementLoss<float> e = element_loss<float>(d, {f[0], f[1], f[2], f[3]}, own == 0,
                                                       mean[i], variance[i], goal[i], image[i]);
      if (i < run.count) sum += static_cast<double>(e.value);
      mean[i] = e.by_mean * weighted;
      variance[i] = e.by_variance * weighted;
    }
    if (d.variance) {
      store_half<T>(d_prediction, run, d.x.c, 0, mean);
      store_half<T>(d_prediction, run, d.x.c, 1, variance);
    } else {
      store_run<T>(d_prediction, run, mean);
    }
  }
  sum = block_sum(sum, scratch);
  if (threadIdx.x == 0) sums[blockIdx.x] = sum;
}

// One block: the loss of each image and of all, by their weights where there are any.
__global__ void finish_loss_kernel(int n, int chunks, int size, int step_images,
                                   Global<const double> sums, Global<const float> weight,
                                   Global<float> sample_loss, Global<StepState> state) {
  SharedMemory shared;
  const Smem<double> scratch = shared.take<double>(kLastBlock / 32);
  double total = 0;
  for (int slot = static_cast<int>(threadIdx.x); slot < n; slot += kLastBlock) {
    double sum = 0;
#pragma unroll 8
    for (int i = 0; i < chunks; ++i) sum += sums[int64_t{slot} * chunks + i];
    sum /= size;
    sample_loss[slot] = static_cast<float>(sum);
    total += weight != nullptr ? sum * static_cast<double>(weight[slot]) : sum;
  }
  total = block_sum(total, scratch);
  if (threadIdx.x != 0) return;
  StepState s = state[0];
  s.loss = static_cast<float>(total / step_images);
  if (!std::isfinite(s.loss)) set_nonfinite(s, kLossNonFinite);
  state[0] = s;
}

// One thread.
__global__ void end_part_kernel(int part, int next_first_image, Global<float> losses,
                                Global<StepState> state) {
  if (threadIdx.x != 0) return;
  StepState s = state[0];
  losses[part] = s.loss;
  s.first_image = static_cast<uint64_t>(next_first_image);
  state[0] = s;
}

// One thread: the order is fixed, and the parts are few.
__global__ void sum_losses_kernel(int parts, Global<const float> losses, Global<StepState> state) {
  if (threadIdx.x != 0) return;
  double sum = 0;
  for (int i = 0; i < parts; ++i) sum += losses[i];
  StepState s = state[0];
  s.loss = static_cast<float>(sum);
  if (!std::isfinite(s.loss)) set_nonfinite(s, kLossNonFinite);
  state[0] = s;
}

// One warp a bucket.
__global__ void loss_histogram_kernel(int n, int timesteps, int buckets, Global<const int32_t> t,
                                      Global<const float> sample_loss,
                                      Global<const StepState> state, Global<float> histogram) {
  const StepState s = state[0];
  if (s.nonfinite != 0) return;
  float sum = 0, count = 0;
  for (int i = lane_id(); i < n; i += 32) {
    if (int64_t{t[i]} * buckets / timesteps != warp_id()) continue;
    sum += sample_loss[i];
    count += 1;
  }
  sum = warp_sum(sum);
  count = warp_sum(count);
  if (lane_id() != 0) return;
  const Global<float> to = histogram + 2 * warp_id();
  to[0] += sum;
  to[1] += count;
}

struct LossPlan {
  int n, size, step_images;
  int block;  // threads, no more than an image keeps busy
  int chunks;
  float scale;  // d loss / d prediction = scale * difference

  LossPlan(const char* op, const Shape& s, int images)
      : n(s.n),
        size(static_cast<int>(s.pixels()) * s.c),
        step_images(images),
        block(std::min(kMaxBlock, (size + 32 * kRun - 1) / (32 * kRun) * 32)),
        chunks(image_parts(s, block)),
        scale(static_cast<float>(2.0 / (static_cast<double>(size) * images))) {
    DDPM_CHECK(images >= n, "%s: %d of %d images", op, n, images);
  }
  LaunchShape grid() const {
    return {.grid_x = static_cast<unsigned>(n * chunks),
            .block = static_cast<unsigned>(block),
            .shared = shared_bytes<double>(block / 32)};
  }
  size_t workspace() const { return sizeof(double) * static_cast<size_t>(n) * chunks; }
};

void finish_loss(const LossPlan& plan, const Run& r, In weight, Out sample_loss, Out state) {
  launch<finish_loss_kernel>({.block = kLastBlock, .shared = shared_bytes<double>(kLastBlock / 32)},
                             r.stream, plan.n, plan.chunks, plan.size, plan.step_images,
                             static_cast<const double*>(r.workspace), r.in<float>(weight),
                             r.out<float>(sample_loss), r.out<StepState>(state));
}

template <typename T, bool Redraw>
void run_loss(const LossPlan& plan, const Run& r, In prediction, In target, Out sample_loss,
              Out d_prediction, Out state) {
  launch<squared_error_kernel<T, Redraw>>(plan.grid(), r.stream, plan.size, plan.chunks, plan.scale,
                                          r.in<T>(prediction), r.in<float>(target),
                                          r.out<StepState>(state), r.out<T>(d_prediction),
                                          static_cast<double*>(r.workspace));
  finish_loss(plan, r, {}, sample_loss, state);
}

}  // namespace

Call CudaBackend::mse_loss(const Shape& shape, int step_images, In prediction, In target,
                           Out sample_loss, Out d_prediction, Out state) {
  check_images("mse_loss", shape);
  const LossPlan plan("mse_loss", shape, step_images);
  return dispatch(type_, [&]<typename T>(T) -> Call {
    return {"mse_loss",
            {prediction, target},
            {sample_loss, d_prediction, state},
            plan.workspace(),
            [=](const Run& r) {
              run_loss<T, false>(plan, r, prediction, target, sample_loss, d_prediction, state);
            }};
  });
}

std::optional<Call> CudaBackend::noise_loss(const Shape& shape, int step_images, In prediction,
                                            Out sample_loss, Out d_prediction, Out state) {
  check_images("noise_loss", shape);
  const LossPlan plan("noise_loss", shape, step_images);
  return dispatch(type_, [&]<typename T>(T) -> Call {
    return {"noise_loss",
            {prediction},
            {sample_loss, d_prediction, state},
            plan.workspace(),
            [=](const Run& r) {
              run_loss<T, true>(plan, r, prediction, {}, sample_loss, d_prediction, state);
            }};
  });
}

Call CudaBackend::diffusion_loss(const DiffusionLossDesc& d, In prediction, In target, In x0, In t,
                                 In factors, In weight, Out sample_loss, Out d_prediction,
                                 Out state) {
  check_images("diffusion_loss", d.x);
  const bool bound = d.loss != LossKind::kSimple;
  DDPM_CHECK(d.timesteps > 0, "diffusion_loss: %d timesteps", d.timesteps);
  DDPM_CHECK(!bound || (x0 && t && factors), "diffusion_loss: the bound without x0, t or factors");
  const LossPlan plan("diffusion_loss", d.x, d.step_images);
  Call call = dispatch(type_, [&]<typename T>(T) -> Call {
    return {"diffusion_loss",
            {prediction, target},
            {sample_loss, d_prediction, state},
            plan.workspace(),
            [=](const Run& r) {
              launch<diffusion_loss_kernel<T>>(
                  plan.grid(), r.stream, d, plan.size, plan.chunks, 0.5f * plan.scale,
                  r.in<T>(prediction), r.in<float>(target), r.in<float>(x0), r.in<int32_t>(t),
                  r.in<float>(factors), r.in<float>(weight), r.out<T>(d_prediction),
                  static_cast<double*>(r.workspace));
              finish_loss(plan, r, weight, sample_loss, state);
            }};
  });
  for (const In in : {x0, t, factors, weight})
    if (in) call.reads.push_back(in);
  return call;
}

Call CudaBackend::end_part(int part, int next_first_image, Out losses, Out state) {
  DDPM_CHECK(part >= 0 && next_first_image >= 0, "end_part: part %d, next from %d", part,
             next_first_image);
  return {"end_part", {}, {losses, state}, 0, [=](const Run& r) {
            launch<end_part_kernel>({.block = 32}, r.stream, part, next_first_image,
                                    r.out<float>(losses), r.out<StepState>(state));
          }};
}

Call CudaBackend::sum_losses(int parts, In losses, Out state) {
  DDPM_CHECK(parts > 0, "sum_losses: %d parts", parts);
  return {"sum_losses", {losses}, {state}, 0, [=](const Run& r) {
            launch<sum_losses_kernel>({.block = 32}, r.stream, parts, r.in<float>(losses),
                                      r.out<StepState>(state));
          }};
}

Call CudaBackend::loss_histogram(int n, int timesteps, int buckets, In t, In sample_loss, In state,
                                 Out histogram) {
  DDPM_CHECK(n > 0 && timesteps > 0 && buckets > 0 && buckets <= kMaxBuckets,
             "loss_histogram: n %d, %d timesteps, %d buckets", n, timesteps, buckets);
  return {"loss_histogram", {t, sample_loss, state}, {histogram}, 0, [=](const Run& r) {
            launch<loss_histogram_kernel>({.block = static_cast<unsigned>(buckets * 32)}, r.stream,
                                          n, timesteps, buckets, r.in<int32_t>(t),
                                          r.in<float>(sample_loss), r.in<StepState>(state),
                                          r.out<float>(histogram));
          }};
}

}  // namespace ddpm::cuda
