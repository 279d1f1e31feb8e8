// Timesteps and noise, drawn by address. The noise writes its 4 bytes an element and reads nothing;
// in batches that fill the device it is limited by arithmetic, some 50 instructions an element.
#include "kernels/cuda/cuda_backend.h"
#include "kernels/cuda/image_run.h"
#include "kernels/cuda/normals.h"

namespace ddpm::cuda {
namespace {

constexpr unsigned kBlock = 128;

__global__ void draw_timesteps_kernel(int n, int timesteps, Global<const StepState> state,
                                      Global<int32_t> t) {
  const int slot = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (slot >= n) return;
  const StepState s = state[0];
  t[slot] = draw_timestep(s, slot, timesteps);
}

__global__ void draw_noise_kernel(int size, int parts, Global<const StepState> state,
                                  Global<float> noise) {
  const int slot = static_cast<int>(blockIdx.x) / parts;
  const ImageRun run = image_run(size, slot, static_cast<int>(blockIdx.x) % parts);
  if (run.count == 0) return;
  const StepState s = state[0];
  float z[kRun];
  draw_normals(training_stream(s, Purpose::kNoise, slot), run.begin, z);
  store_run<float>(noise, run, z);
}

__global__ void draw_start_kernel(int size, int parts, Global<const ChainSlot> slots,
                                  Global<const StepState> state, Global<float> x) {
  const int i = static_cast<int>(blockIdx.x) / parts;
  const ImageRun run = image_run(size, i, static_cast<int>(blockIdx.x) % parts);
  const StepState s = state[0];
  const ChainSlot slot = slots[i];
  if (run.count == 0 || slot.rows == 0 || slot.start != static_cast<int64_t>(s.step)) return;
  float z[kRun];
  draw_normals({.seed = slot.seed, .purpose = Purpose::kSampleStart, .sample = slot.image},
               run.begin, z);
  store_run<float>(x, run, z);
}

}  // namespace

Call CudaBackend::draw_timesteps(int n, int timesteps, In state, Out t) {
  DDPM_CHECK(n > 0 && timesteps > 0, "draw_timesteps: n %d, timesteps %d", n, timesteps);
  return {"draw_timesteps", {state}, {t}, 0, [=](const Run& r) {
            launch<draw_timesteps_kernel>({.grid_x = blocks_for(n, 1, kBlock), .block = kBlock},
                                          r.stream, n, timesteps, r.in<StepState>(state),
                                          r.out<int32_t>(t));
          }};
}

Call CudaBackend::draw_noise(const Shape& shape, In state, Out noise) {
  check_images("draw_noise", shape);
  const int size = static_cast<int>(shape.pixels()) * shape.c, parts = image_parts(shape, kBlock);
  const LaunchShape grid{.grid_x = static_cast<unsigned>(shape.n * parts), .block = kBlock};
  return {"draw_noise", {state}, {noise}, 0, [=](const Run& r) {
            launch<draw_noise_kernel>(grid, r.stream, size, parts, r.in<StepState>(state),
                                      r.out<float>(noise));
          }};
}

Call CudaBackend::draw_start(const Shape& shape, In slots, In state, Out x) {
  check_images("draw_start", shape);
  const int size = static_cast<int>(shape.pixels()) * shape.c, parts = image_parts(shape, kBlock);
  const LaunchShape grid{.grid_x = static_cast<unsigned>(shape.n * parts), .block = kBlock};
  return {"draw_start", {slots, state}, {x}, 0, [=](const Run& r) {
            launch<draw_start_kernel>(grid, r.stream, size, parts, r.in<ChainSlot>(slots),
                                      r.in<StepState>(state), r.out<float>(x));
          }};
}

}  // namespace ddpm::cuda
