// Everything that changes from step to step, in the backend's memory. The backend advances it at
// the end of a step (Backend::advance_state), so that a step has no argument the host would change.
#pragma once

#include <cstdint>

namespace ddpm {

struct alignas(64) StepState {
  uint64_t seed = 0;         // training: Philox key of this run
  uint64_t step = 0;         // updates, or steps of sampling, made so far
  uint64_t first_image = 0;  // training: of batch slot 0, its position in the step's whole batch
  uint64_t bad_step = 0;     // the step at which `nonfinite` was first set
  double loss_sum = 0;       // of all finished steps since the state was set
  uint32_t nonfinite = 0;    // bits of NonFinite; sticky, the optimizer skips updates while set
  float loss = 0;            // of the last step
  float grad_norm = 0;       // of the last step, before clipping
  float learning_rate = 0;   // of the last step
  uint64_t unused = 0;       // no padding: nvcc would store such a struct byte by byte
};
static_assert(sizeof(StepState) == 64);

enum NonFinite : uint32_t { kLossNonFinite = 1, kGradientNonFinite = 2, kSampleNonFinite = 4 };

// The first flag that is set notes its step.
constexpr void set_nonfinite(StepState& state, NonFinite flag) {
  if (state.nonfinite == 0) state.bad_step = state.step;
  state.nonfinite |= flag;
}

}  // namespace ddpm
