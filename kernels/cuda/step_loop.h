// Rounds of a loop of recorded steps, counted on the device: the kernels around each. One thread.
#pragma once

#include <device/graph.h>
#include <device/launch.h>
#include <device/memory.h>

namespace ddpm::cuda {

// In the device's memory, two numbers: rounds of all loops, rounds left of the last one.
inline constexpr int kCounterRuns = 0, kCounterLeft = 1;
// In the host's memory, for both, two numbers: rounds by now, which the device writes, and whether
// to stop, which the host writes. A read over the bus takes the device a microsecond of a step.
inline constexpr int kControlRuns = 0, kControlStop = 1;

__global__ void begin_loop_kernel(Global<int64_t> counter, int64_t times);
// Before the first round: whether there is one.
__global__ void enter_loop_kernel(GraphCondition again, Global<int64_t> counter,
                                  Global<int64_t> control);
// After each: counts it; whether there is another.
__global__ void end_round_kernel(GraphCondition again, Global<int64_t> counter,
                                 Global<int64_t> control);
// The same where no node asks for another.
__global__ void count_round_kernel(Global<int64_t> counter, Global<int64_t> control);

}  // namespace ddpm::cuda
