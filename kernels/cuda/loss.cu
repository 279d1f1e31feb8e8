// The training loss and its gradient. mse_loss reads prediction and target (fp32) and writes the
// gradient, 8 or 12 bytes an element in bf16 or fp32; noise_loss draws the target again and moves 4
// or 8. CIFAR's batches are limited by latency, large images by memory, with noise by arithmetic.
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

// One block: the loss of each image and of all.
__global__ void finish_loss_kernel(int n, int chunks, int size, int step_images,
                                   Global<const double> sums, Global<float> sample_loss,
                                   Global<StepState> state) {
  SharedMemory shared;
  const Smem<double> scratch = shared.take<double>(kLastBlock / 32);
  double total = 0;
  for (int slot = static_cast<int>(threadIdx.x); slot < n; slot += kLastBlock) {
    double sum = 0;
#pragma unroll 8
    for (int i = 0; i < chunks; ++i) sum += sums[int64_t{slot} * chunks + i];
    sum /= size;
    sample_loss[slot] = static_cast<float>(sum);
    total += sum;
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
  size_t workspace() const { return sizeof(double) * static_cast<size_t>(n) * chunks; }
};

template <typename T, bool Redraw>
void run_loss(const LossPlan& plan, const Run& r, In prediction, In target, Out sample_loss,
              Out d_prediction, Out state) {
  auto* sums = static_cast<double*>(r.workspace);
  launch<squared_error_kernel<T, Redraw>>({.grid_x = static_cast<unsigned>(plan.n * plan.chunks),
                                           .block = static_cast<unsigned>(plan.block),
                                           .shared = shared_bytes<double>(plan.block / 32)},
                                          r.stream, plan.size, plan.chunks, plan.scale,
                                          r.in<T>(prediction), r.in<float>(target),
                                          r.out<StepState>(state), r.out<T>(d_prediction), sums);
  launch<finish_loss_kernel>({.block = kLastBlock, .shared = shared_bytes<double>(kLastBlock / 32)},
                             r.stream, plan.n, plan.chunks, plan.size, plan.step_images, sums,
                             r.out<float>(sample_loss), r.out<StepState>(state));
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
