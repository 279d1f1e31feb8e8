// What four consecutive warps, the first a multiple of four, do together (sm_90a), and barriers of
// some of a block's warps.
#pragma once

#include <cstdint>

namespace ddpm::cuda {

// `threads` of the block, whole warps, meet; what they wrote is visible to them all. id 1 to 15.
__device__ __forceinline__ void named_barrier(unsigned id, unsigned threads) {
  asm volatile("bar.sync %0, %1;\n" ::"r"(id), "r"(threads) : "memory");
}

// Registers that each thread of the warpgroup has from here on: fewer, or more, for which it waits
// until others have given theirs up. A multiple of 8, 24 to 256.
template <int Count>
__device__ __forceinline__ void give_up_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;\n" ::"n"(Count));
}
template <int Count>
__device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;\n" ::"n"(Count));
}

// What this thread wrote to shared memory may be read by products after the next barrier.
__device__ __forceinline__ void proxy_fence() {
  asm volatile("fence.proxy.async.shared::cta;\n" ::: "memory");
}

}  // namespace ddpm::cuda
