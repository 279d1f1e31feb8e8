// What a kernel says to the graph it runs in.
#pragma once

#include <cuda_runtime.h>

namespace ddpm::cuda {

// The condition of a WHILE node.
using GraphCondition = cudaGraphConditionalHandle;
__device__ __forceinline__ void set_condition(GraphCondition condition, bool value) {
  cudaGraphSetConditional(condition, value ? 1 : 0);
}

// What was written before it is seen by the host before what is written after it.
__device__ __forceinline__ void system_fence() { __threadfence_system(); }

}  // namespace ddpm::cuda
