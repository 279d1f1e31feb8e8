// Timesteps and normal noise, drawn by address (kernels/philox.h).
#include <algorithm>

#include "kernels/cpu/cpu_backend.h"
#include "kernels/cpu/parallel.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/random.cpp"
#include <hwy/foreach_target.h>

#include "kernels/cpu/philox-inl.h"

HWY_BEFORE_NAMESPACE();
namespace ddpm::cpu::HWY_NAMESPACE {

void normals_loop(const RandomStream& stream, uint32_t first, int64_t count, float* out) {
  normals(stream, first, count, out);
}

}  // namespace ddpm::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace ddpm::cpu {

HWY_EXPORT(normals_loop);

Call CpuBackend::draw_timesteps(int n, int timesteps, In state, Out t) {
  DDPM_CHECK(n > 0 && timesteps > 0, "draw_timesteps: n %d, timesteps %d", n, timesteps);
  return {"draw_timesteps", {state}, {t}, 0, [=](const Run& r) {
            const StepState& s = *r.in<StepState>(state);
            for (int i = 0; i < n; ++i) {
              const RandomStream stream{.seed = s.seed,
                                        .purpose = Purpose::kTimestep,
                                        .sample = s.first_image + static_cast<uint64_t>(i),
                                        .step = static_cast<uint32_t>(s.step)};
              r.out<int32_t>(t)[i] = static_cast<int32_t>(
                  uniform_below(stream.block(0)[0], static_cast<uint32_t>(timesteps)));
            }
          }};
}

Call CpuBackend::draw_noise(const Shape& shape, In state, Out noise) {
  DDPM_CHECK(shape.positive(), "draw_noise: shape %s", to_string(shape).c_str());
  const int64_t size = shape.pixels() * shape.c, blocks = (size + 3) / 4;
  return {"draw_noise", {state}, {noise}, 0, [=, n = shape.n, threads = threads_](const Run& r) {
            const StepState& s = *r.in<StepState>(state);
            float* out = r.out<float>(noise);
            parallel_samples(threads, n, blocks, [&](int64_t slot, int64_t begin, int64_t end) {
              const RandomStream stream{.seed = s.seed,
                                        .purpose = Purpose::kNoise,
                                        .sample = s.first_image + static_cast<uint64_t>(slot),
                                        .step = static_cast<uint32_t>(s.step)};
              HWY_DYNAMIC_DISPATCH(normals_loop)
              (stream, static_cast<uint32_t>(begin), std::min(4 * end, size) - 4 * begin,
               out + slot * size + 4 * begin);
            });
          }};
}

Call CpuBackend::draw_start(const Shape& shape, In slots, In state, Out x) {
  DDPM_CHECK(shape.positive(), "draw_start: shape %s", to_string(shape).c_str());
  const int64_t size = shape.pixels() * shape.c, blocks = (size + 3) / 4;
  return {"draw_start", {slots, state}, {x}, 0, [=, n = shape.n, threads = threads_](const Run& r) {
            const auto step = static_cast<int64_t>(r.in<StepState>(state)->step);
            float* out = r.out<float>(x);
            parallel_samples(threads, n, blocks, [&](int64_t i, int64_t begin, int64_t end) {
              const ChainSlot& slot = r.in<ChainSlot>(slots)[i];
              if (slot.rows == 0 || slot.start != step) return;
              const RandomStream stream{
                  .seed = slot.seed, .purpose = Purpose::kSampleStart, .sample = slot.image};
              HWY_DYNAMIC_DISPATCH(normals_loop)
              (stream, static_cast<uint32_t>(begin), std::min(4 * end, size) - 4 * begin,
               out + i * size + 4 * begin);
            });
          }};
}

}  // namespace ddpm::cpu
#endif
