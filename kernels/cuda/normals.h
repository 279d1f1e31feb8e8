// Normal numbers on the device, addressed as kernels/philox.h has it: element i of an image is
// component i % 4 of block i / 4 of the image's stream.
#pragma once

#include <device/launch.h>
#include <device/math.h>

#include "kernels/philox.h"
#include "kernels/step_state.h"

namespace ddpm::cuda {

// Box-Muller: two normal numbers from two words. u and 2 u are exact, logarithm, root, sine and
// cosine within a unit or two in the last place.
__device__ __forceinline__ void box_muller(uint32_t w0, uint32_t w1, float& z0, float& z1) {
  const float radius = sqrtf(-2.0f * logf(uniform_open(w0)));
  float sine, cosine;
  sincos_pi(2.0f * uniform_open(w1), sine, cosine);
  z0 = radius * cosine;
  z1 = radius * sine;
}

// The N elements from `begin` on; N and begin are multiples of 4.
template <int N>
__device__ __forceinline__ void draw_normals(const RandomStream& stream, int begin, float (&z)[N]) {
#pragma unroll
  for (int i = 0; i < N; i += 4) {
    const Philox4 words = stream.block(static_cast<uint32_t>(begin + i) / 4);
    box_muller(words[0], words[1], z[i], z[i + 1]);
    box_muller(words[2], words[3], z[i + 2], z[i + 3]);
  }
}

// Of the image in a slot: in training addressed by its position in the step's batch, and the step.
__device__ __forceinline__ RandomStream training_stream(const StepState& s, Purpose purpose,
                                                        int slot) {
  return {.seed = s.seed,
          .purpose = purpose,
          .sample = s.first_image + static_cast<uint64_t>(slot),
          .step = static_cast<uint32_t>(s.step)};
}

__device__ __forceinline__ int32_t draw_timestep(const StepState& s, int slot, int timesteps) {
  const uint32_t bits = training_stream(s, Purpose::kTimestep, slot).block(0)[0];
  return static_cast<int32_t>(uniform_below(bits, static_cast<uint32_t>(timesteps)));
}

}  // namespace ddpm::cuda
