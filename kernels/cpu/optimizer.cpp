// The gradient's norm, Adam with the moving average of its weights, the end of a step.
#include <algorithm>
#include <cmath>

#include "kernels/adam.h"
#include "kernels/cpu/cpu_backend.h"
#include "kernels/cpu/parallel.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/optimizer.cpp"
#include <hwy/foreach_target.h>

#include "kernels/cpu/simd-inl.h"

HWY_BEFORE_NAMESPACE();
namespace ddpm::cpu::HWY_NAMESPACE {

double sum_of_squares(const float* x, int64_t count) {
  const DoubleTag dd;
  Double low = hn::Zero(dd), high = hn::Zero(dd);
  for (int64_t i = 0; i < count; i += lanes()) add_squares(load(x + i, count - i), low, high);
  return hn::GetLane(hn::SumOfLanes(dd, hn::Add(low, high)));
}

// One pass over the five arrays. Moments and average move by a part of their distance, so a value
// that has arrived stays where it is to the bit.
void adam_loop(const AdamFactors& f, const float* gradients, float* weights, float* m, float* v,
               float* ema, int64_t begin, int64_t end) {
  const FloatTag d;
  const Float step_size = hn::Set(d, f.step_size);
  for (int64_t i = begin; i < end; i += lanes()) {
    const int64_t left = end - i;
    const Float g = hn::Mul(load(gradients + i, left), hn::Set(d, f.clip));
    const Float old_m = load(m + i, left);
    const Float new_m = hn::MulAdd(hn::Set(d, f.rest1), hn::Sub(g, old_m), old_m);
    const Float new_v = hn::MulAdd(hn::Mul(hn::Set(d, f.rest2), g), g,
                                   hn::Mul(hn::Set(d, f.beta2), load(v + i, left)));
    const Float root =
        hn::MulAdd(hn::Sqrt(new_v), hn::Set(d, f.denominator), hn::Set(d, f.epsilon));
    const Float w = hn::NegMulAdd(step_size, hn::Div(new_m, root), load(weights + i, left));
    const Float average = load(ema + i, left);
    store(new_m, m + i, left);
    store(new_v, v + i, left);
    store(w, weights + i, left);
    store(hn::MulAdd(hn::Set(d, f.ema_rest), hn::Sub(w, average), average), ema + i, left);
  }
}

}  // namespace ddpm::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace ddpm::cpu {

HWY_EXPORT(sum_of_squares);
HWY_EXPORT(adam_loop);

// Chunks have a fixed size, so the norm is independent of the thread count.
Call CpuBackend::grad_norm(int64_t count, In gradients, Out state) {
  DDPM_CHECK(count > 0, "grad_norm: count %lld", static_cast<long long>(count));
  constexpr int64_t kChunk = 16384;
  const int64_t chunks = (count + kChunk - 1) / kChunk;
  return {"grad_norm",
          {gradients},
          {state},
          sizeof(double) * static_cast<size_t>(chunks),
          [=, threads = threads_](const Run& r) {
            double* sums = static_cast<double*>(r.workspace);
            parallel_for(threads, chunks, [&](int64_t begin, int64_t end) {
              for (int64_t i = begin; i < end; ++i)
                sums[i] = HWY_DYNAMIC_DISPATCH(sum_of_squares)(
                    r.in<float>(gradients) + i * kChunk, std::min(kChunk, count - i * kChunk));
            });
            double sum = 0;
            for (int64_t i = 0; i < chunks; ++i) sum += sums[i];
            StepState& s = *r.out<StepState>(state);
            s.grad_norm = static_cast<float>(std::sqrt(sum));
            if (!std::isfinite(s.grad_norm)) set_nonfinite(s, kGradientNonFinite);
          }};
}

Call CpuBackend::adam_ema(const AdamDesc& d, In gradients, Out weights, Out m, Out v, Out ema,
                          Out shadow, Out state) {
  DDPM_CHECK(!shadow, "adam_ema: fp32 needs no shadow of the weights");
  DDPM_CHECK(d.count > 0 && d.warmup_steps >= 0 && d.cooldown_steps >= 0 && d.steps >= 0,
             "adam_ema: count %lld, warmup_steps %lld, steps %lld, cooldown_steps %lld",
             static_cast<long long>(d.count), static_cast<long long>(d.warmup_steps),
             static_cast<long long>(d.steps), static_cast<long long>(d.cooldown_steps));
  DDPM_CHECK(d.beta1 >= 0 && d.beta1 < 1 && d.beta2 >= 0 && d.beta2 < 1 && d.epsilon >= 0,
             "adam_ema: beta1 %g, beta2 %g, epsilon %g", d.beta1, d.beta2, d.epsilon);
  DDPM_CHECK(d.learning_rate >= 0 && d.grad_clip >= 0 && d.ema_decay >= 0 && d.ema_decay <= 1,
             "adam_ema: learning_rate %g, grad_clip %g, ema_decay %g", d.learning_rate, d.grad_clip,
             d.ema_decay);
  return {"adam_ema",
          {gradients},
          {weights, m, v, ema, state},
          0,
          [=, threads = threads_](const Run& r) {
            StepState& s = *r.out<StepState>(state);
            if (s.nonfinite != 0) return;
            const double n = static_cast<double>(s.step);
            s.learning_rate = static_cast<float>(learning_rate(d, n));
            const AdamFactors f = adam_factors(d, s, std::pow(d.beta1, n + 1),
                                               std::sqrt(1 - std::pow(d.beta2, n + 1)));
            parallel_elements(threads, d.count, [&](int64_t begin, int64_t end) {
              HWY_DYNAMIC_DISPATCH(adam_loop)
              (f, r.in<float>(gradients), r.out<float>(weights), r.out<float>(m), r.out<float>(v),
               r.out<float>(ema), begin, end);
            });
          }};
}

Call CpuBackend::advance_state(Out state) {
  return {"advance_state", {}, {state}, 0, [=](const Run& r) {
            StepState& s = *r.out<StepState>(state);
            if (s.nonfinite != 0) return;
            ++s.step;
            s.loss_sum += s.loss;
          }};
}

}  // namespace ddpm::cpu
#endif
