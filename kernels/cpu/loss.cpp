// The training loss and its gradient.
#include <cmath>

#include "kernels/cpu/cpu_backend.h"
#include "kernels/cpu/parallel.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/loss.cpp"
#include <hwy/foreach_target.h>

#include "kernels/cpu/simd-inl.h"

HWY_BEFORE_NAMESPACE();
namespace ddpm::cpu::HWY_NAMESPACE {

// Returns the sum of squared differences; d_prediction = difference * scale.
double mse_chunk(const float* prediction, const float* target, float scale, int64_t count,
                 float* d_prediction) {
  const DoubleTag dd;
  Double low = hn::Zero(dd), high = hn::Zero(dd);
  for (int64_t i = 0; i < count; i += lanes()) {
    const Float diff = hn::Sub(load(prediction + i, count - i), load(target + i, count - i));
    store(hn::Mul(diff, hn::Set(FloatTag(), scale)), d_prediction + i, count - i);
    add_squares(diff, low, high);
  }
  return hn::GetLane(hn::SumOfLanes(dd, hn::Add(low, high)));
}

}  // namespace ddpm::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace ddpm::cpu {

HWY_EXPORT(mse_chunk);

// Sums go by chunks of fixed size within an image, so the loss is independent of the thread count
// and an image's loss of its slot.
Call CpuBackend::mse_loss(const Shape& shape, int step_images, In prediction, In target,
                          Out sample_loss, Out d_prediction, Out state) {
  DDPM_CHECK(shape.positive() && step_images >= shape.n, "mse_loss: shape %s of %d images",
             to_string(shape).c_str(), step_images);
  constexpr int64_t kChunk = 4096;
  const int64_t size = shape.pixels() * shape.c, chunks = (size + kChunk - 1) / kChunk;
  const float scale = static_cast<float>(2.0 / (static_cast<double>(size) * step_images));
  return {"mse_loss",
          {prediction, target},
          {sample_loss, d_prediction, state},
          sizeof(double) * static_cast<size_t>(shape.n * chunks),
          [=, n = shape.n, threads = threads_](const Run& r) {
            double* sums = static_cast<double*>(r.workspace);
            parallel_for(
                threads_for(threads, n * size), n * chunks, [&](int64_t begin, int64_t end) {
                  for (int64_t i = begin; i < end; ++i) {
                    const int64_t start = i % chunks * kChunk, at = i / chunks * size + start;
                    sums[i] = HWY_DYNAMIC_DISPATCH(mse_chunk)(
                        r.in<float>(prediction) + at, r.in<float>(target) + at, scale,
                        std::min(kChunk, size - start), r.out<float>(d_prediction) + at);
                  }
                });
            double total = 0;
            for (int i = 0; i < n; ++i) {
              double sum = 0;
              for (int64_t j = 0; j < chunks; ++j) sum += sums[i * chunks + j];
              total += sum / static_cast<double>(size);
              r.out<float>(sample_loss)[i] = static_cast<float>(sum / static_cast<double>(size));
            }
            StepState& s = *r.out<StepState>(state);
            s.loss = static_cast<float>(total / step_images);
            if (!std::isfinite(s.loss)) set_nonfinite(s, kLossNonFinite);
          }};
}

Call CpuBackend::end_part(int part, int next_first_image, Out losses, Out state) {
  DDPM_CHECK(part >= 0 && next_first_image >= 0, "end_part: part %d, next from %d", part,
             next_first_image);
  return {"end_part", {}, {losses, state}, 0, [=](const Run& r) {
            StepState& s = *r.out<StepState>(state);
            r.out<float>(losses)[part] = s.loss;
            s.first_image = static_cast<uint64_t>(next_first_image);
          }};
}

Call CpuBackend::sum_losses(int parts, In losses, Out state) {
  DDPM_CHECK(parts > 0, "sum_losses: %d parts", parts);
  return {"sum_losses", {losses}, {state}, 0, [=](const Run& r) {
            double sum = 0;
            for (int i = 0; i < parts; ++i) sum += r.in<float>(losses)[i];
            StepState& s = *r.out<StepState>(state);
            s.loss = static_cast<float>(sum);
            if (!std::isfinite(s.loss)) set_nonfinite(s, kLossNonFinite);
          }};
}

Call CpuBackend::loss_histogram(int n, int timesteps, int buckets, In t, In sample_loss, In state,
                                Out histogram) {
  DDPM_CHECK(n > 0 && timesteps > 0 && buckets > 0 && buckets <= 32,
             "loss_histogram: n %d, %d timesteps, %d buckets", n, timesteps, buckets);
  return {"loss_histogram", {t, sample_loss, state}, {histogram}, 0, [=](const Run& r) {
            if (r.in<StepState>(state)->nonfinite != 0) return;
            for (int i = 0; i < n; ++i) {
              const int64_t bucket = int64_t{r.in<int32_t>(t)[i]} * buckets / timesteps;
              float* to = r.out<float>(histogram) + 2 * bucket;
              to[0] += r.in<float>(sample_loss)[i];
              to[1] += 1;
            }
          }};
}

}  // namespace ddpm::cpu
#endif
