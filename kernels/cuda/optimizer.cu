// The gradient's norm, Adam with the moving average of its weights, the end of a step. All are
// limited by memory: grad_norm reads the 4 bytes of a parameter's gradient, adam_ema reads
// gradient, weight, both moments and average and writes the last four and the bf16 shadow, 36 and 2
// bytes; nothing is moved twice.
#include <algorithm>
#include <cmath>
#include <type_traits>

#include "kernels/adam.h"
#include "kernels/cuda/block.h"
#include "kernels/cuda/cuda_backend.h"
#include "kernels/cuda/vec.h"

namespace ddpm::cuda {
namespace {

constexpr int kBlock = 256, kMaxLastBlock = 1024;
constexpr int kLoads = 8;                       // of 16 bytes under way in a thread
constexpr int kChunk = kBlock * kLoads * 4;     // gradients of a block
constexpr LaunchShape kOneThread{.block = 32};  // a block is whole warps

// sums[block]: squares in double, for gradients far from 1; the conversions take 10 us of an H100
// where reading takes 48.
__global__ void squares_kernel(int64_t count, Global<const float> x, Global<double> sums) {
  SharedMemory shared;
  const Smem<double> scratch = shared.take<double>(kBlock / 32);
  const int64_t first = int64_t{blockIdx.x} * kChunk;
  const int64_t begin = first + static_cast<int>(threadIdx.x) * 4;
  float v[kLoads][4];
  if (first + kChunk <= count) {
#pragma unroll
    for (int i = 0; i < kLoads; ++i) load_floats<float>(x + begin + i * kBlock * 4, v[i]);
  } else {
#pragma unroll
    for (int i = 0; i < kLoads * 4; ++i) {
      const int64_t at = begin + i / 4 * kBlock * 4 + i % 4;
      v[i / 4][i % 4] = at < count ? x[at] : 0.0f;
    }
  }
  double sum = 0;
#pragma unroll
  for (int i = 0; i < kLoads; ++i)
#pragma unroll
    for (int j = 0; j < 4; ++j)
      sum = fma(static_cast<double>(v[i][j]), static_cast<double>(v[i][j]), sum);
  sum = block_sum(sum, scratch);
  if (threadIdx.x == 0) sums[blockIdx.x] = sum;
}

__global__ void finish_norm_kernel(int chunks, Global<const double> sums, Global<StepState> state) {
  SharedMemory shared;
  const int threads = static_cast<int>(blockDim.x);
  const Smem<double> scratch = shared.take<double>(threads / 32);
  double sum = 0;
#pragma unroll 4
  for (int i = static_cast<int>(threadIdx.x); i < chunks; i += threads) sum += sums[i];
  sum = block_sum(sum, scratch);
  if (threadIdx.x != 0) return;
  StepState s = state[0];
  s.grad_norm = static_cast<float>(sqrt(sum));
  if (!std::isfinite(s.grad_norm)) set_nonfinite(s, kGradientNonFinite);
  state[0] = s;
}

struct Update {
  AdamFactors factors;
  uint32_t apply;  // 0: a non-finite flag is set
};

// What the state says of this update, once for all elements.
__global__ void prepare_update_kernel(AdamDesc d, Global<StepState> state, Global<Update> update) {
  if (threadIdx.x != 0) return;
  StepState s = state[0];
  const double n = static_cast<double>(s.step);
  update[0] = Update{adam_factors(d, s, pow(d.beta1, n + 1), sqrt(1 - pow(d.beta2, n + 1))),
                     s.nonfinite == 0};
  if (s.nonfinite != 0) return;
  s.learning_rate = static_cast<float>(learning_rate(d, n));
  state[0] = s;
}

// Moments and average move by a part of their distance, so a value that has arrived stays.
__device__ __forceinline__ void update_element(const AdamFactors& f, float gradient, float& weight,
                                               float& m, float& v, float& ema) {
  const float g = gradient * f.clip;
  m = fmaf(f.rest1, g - m, m);
  v = fmaf(f.rest2 * g, g, f.beta2 * v);
  weight = fmaf(-f.step_size, m / fmaf(sqrtf(v), f.denominator, f.epsilon), weight);
  ema = fmaf(f.ema_rest, weight - ema, ema);
}

// Shadow: bf16, or float for none.
template <typename Shadow>
__global__ void adam_ema_kernel(int64_t count, Global<const Update> update,
                                Global<const float> gradients, Global<float> weights,
                                Global<float> m, Global<float> v, Global<float> ema,
                                Global<Shadow> shadow) {
  const Update u = update[0];
  if (u.apply == 0) return;
  for_run<8>(count, [&]<int N>(int64_t i) {
    float gs[N], ws[N], ms[N], vs[N], es[N];
    load_floats<float>(gradients + i, gs);
    load_floats<float>(weights + i, ws);
    load_floats<float>(m + i, ms);
    load_floats<float>(v + i, vs);
    load_floats<float>(ema + i, es);
#pragma unroll
    for (int j = 0; j < N; ++j) update_element(u.factors, gs[j], ws[j], ms[j], vs[j], es[j]);
    store_floats<float>(weights + i, ws);
    store_floats<float>(m + i, ms);
    store_floats<float>(v + i, vs);
    store_floats<float>(ema + i, es);
    if constexpr (std::is_same_v<Shadow, bf16>) store_floats<bf16>(shadow + i, ws);
  });
}

__global__ void advance_state_kernel(Global<StepState> state) {
  if (threadIdx.x != 0) return;
  StepState s = state[0];
  if (s.nonfinite != 0) return;
  ++s.step;
  s.loss_sum += s.loss;
  state[0] = s;
}

void check_desc(const AdamDesc& d) {
  DDPM_CHECK(d.count > 0 && d.count < int64_t{1} << 40 && d.warmup_steps >= 0 &&
                 d.cooldown_steps >= 0 && d.steps >= 0,
             "adam_ema: count %lld, warmup_steps %lld, steps %lld, cooldown_steps %lld",
             static_cast<long long>(d.count), static_cast<long long>(d.warmup_steps),
             static_cast<long long>(d.steps), static_cast<long long>(d.cooldown_steps));
  DDPM_CHECK(d.beta1 >= 0 && d.beta1 < 1 && d.beta2 >= 0 && d.beta2 < 1 && d.epsilon >= 0,
             "adam_ema: beta1 %g, beta2 %g, epsilon %g", d.beta1, d.beta2, d.epsilon);
  DDPM_CHECK(d.learning_rate >= 0 && d.grad_clip >= 0 && d.ema_decay >= 0 && d.ema_decay <= 1,
             "adam_ema: learning_rate %g, grad_clip %g, ema_decay %g", d.learning_rate, d.grad_clip,
             d.ema_decay);
}

}  // namespace

Call CudaBackend::grad_norm(int64_t count, In gradients, Out state) {
  DDPM_CHECK(count > 0 && count < int64_t{1} << 40, "grad_norm: count %lld",
             static_cast<long long>(count));
  const int chunks = static_cast<int>((count + kChunk - 1) / kChunk);
  const int last = std::min(kMaxLastBlock, (chunks + 31) / 32 * 32);
  return {"grad_norm",
          {gradients},
          {state},
          sizeof(double) * static_cast<size_t>(chunks),
          [=](const Run& r) {
            auto* sums = static_cast<double*>(r.workspace);
            launch<squares_kernel>({.grid_x = static_cast<unsigned>(chunks),
                                    .block = kBlock,
                                    .shared = shared_bytes<double>(kBlock / 32)},
                                   r.stream, count, r.in<float>(gradients), sums);
            launch<finish_norm_kernel>(
                {.block = static_cast<unsigned>(last), .shared = shared_bytes<double>(last / 32)},
                r.stream, chunks, sums, r.out<StepState>(state));
          }};
}

Call CudaBackend::adam_ema(const AdamDesc& d, In gradients, Out weights, Out m, Out v, Out ema,
                           Out shadow, Out state) {
  check_desc(d);
  DDPM_CHECK(static_cast<bool>(shadow) == (type_ == DType::kBF16),
             "adam_ema: %s and %s shadow of %lld weights", name_of(type_), shadow ? "a" : "no",
             static_cast<long long>(d.count));
  return dispatch(type_, [&]<typename T>(T) {
    Call call{
        "adam_ema", {gradients}, {weights, m, v, ema, state}, sizeof(Update), [=](const Run& r) {
          auto* update = static_cast<Update*>(r.workspace);
          launch<prepare_update_kernel>(kOneThread, r.stream, d, r.out<StepState>(state), update);
          launch<adam_ema_kernel<T>>({.grid_x = blocks_for(d.count, 8)}, r.stream, d.count, update,
                                     r.in<float>(gradients), r.out<float>(weights), r.out<float>(m),
                                     r.out<float>(v), r.out<float>(ema), r.out<T>(shadow));
        }};
    if (shadow) call.writes.push_back(shadow);
    return call;
  });
}

Call CudaBackend::advance_state(Out state) {
  return {"advance_state", {}, {state}, 0, [=](const Run& r) {
            launch<advance_state_kernel>(kOneThread, r.stream, r.out<StepState>(state));
          }};
}

}  // namespace ddpm::cuda
