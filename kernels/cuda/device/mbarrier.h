// Barriers in shared memory that threads arrive at and warps wait for, and the bulk copies that end
// on them (sm_90).
#pragma once

#include <cstdint>

namespace ddpm::cuda {

// A phase ends when `count` threads have arrived and all expected bytes have come; the next begins
// by itself. Phases have parities 0, 1, 0, ..
using Mbarrier = uint64_t;

// By one thread, then mbarrier_init_fence() by the same, then block_sync(), before any use.
__device__ __forceinline__ void mbarrier_init(Mbarrier* barrier, unsigned count) {
  const uint32_t at = static_cast<uint32_t>(__cvta_generic_to_shared(barrier));
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;\n" ::"r"(at), "r"(count) : "memory");
}
__device__ __forceinline__ void mbarrier_init_fence() {
  asm volatile("fence.mbarrier_init.release.cluster;\n" ::: "memory");
}

// By a thread. Who waits for the phase sees what this thread wrote, and what its warp wrote before
// a warp_sync().
__device__ __forceinline__ void mbarrier_arrive(Mbarrier* barrier) {
  const uint32_t at = static_cast<uint32_t>(__cvta_generic_to_shared(barrier));
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];\n" ::"r"(at) : "memory");
}
// And `bytes` of bulk copies, started after it, are to come before the phase ends.
__device__ __forceinline__ void mbarrier_arrive_expect(Mbarrier* barrier, unsigned bytes) {
  const uint32_t at = static_cast<uint32_t>(__cvta_generic_to_shared(barrier));
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;\n" ::"r"(at), "r"(bytes)
               : "memory");
}

// All lanes of a warp, until the phase of this parity has ended: 0 for the first; 1 returns at once
// while the first lasts.
__device__ __forceinline__ void mbarrier_wait(Mbarrier* barrier, unsigned parity) {
  const uint32_t at = static_cast<uint32_t>(__cvta_generic_to_shared(barrier));
  uint32_t passed = 0;
  do {
    asm volatile(
        "{\n"
        ".reg .pred p;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
        "selp.u32 %0, 1, 0, p;\n"
        "}\n"
        : "=r"(passed)
        : "r"(at), "r"(parity)
        : "memory");
  } while (passed == 0);
}

// By one thread: `bytes` consecutive ones from global to shared memory, a multiple of 16 at
// addresses aligned to that. They come to `barrier`.
template <typename T>
__device__ __forceinline__ void bulk_copy(T* to, const T* from, unsigned bytes, Mbarrier* barrier) {
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(to));
  const uint32_t at = static_cast<uint32_t>(__cvta_generic_to_shared(barrier));
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];\n" ::
          "r"(address),
      "l"(from), "r"(bytes), "r"(at)
      : "memory");
}

}  // namespace ddpm::cuda
