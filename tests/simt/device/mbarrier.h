// The host's version of kernels/cuda/device/mbarrier.h.
#pragma once

#include "device/memory.h"
#include "tests/simt/machine.h"

namespace ddpm::cuda {

using Mbarrier = uint64_t;

inline const void* mbarrier_address(const Smem<Mbarrier>& barrier) {
  check_alignment(barrier.raw(), sizeof(Mbarrier));
  barrier.check_bounds(barrier.raw(), sizeof(Mbarrier));
  return barrier.raw();
}

inline void mbarrier_init(const Smem<Mbarrier>& barrier, unsigned count) {
  simt::mbarrier_init(mbarrier_address(barrier), count);
}
inline void mbarrier_init_fence() { simt::mbarrier_init_fence(); }
inline void mbarrier_arrive(const Smem<Mbarrier>& barrier) {
  simt::mbarrier_arrive(mbarrier_address(barrier), 0);
}
inline void mbarrier_arrive_expect(const Smem<Mbarrier>& barrier, unsigned bytes) {
  simt::mbarrier_arrive(mbarrier_address(barrier), bytes);
}
inline void mbarrier_wait(const Smem<Mbarrier>& barrier, unsigned parity) {
  simt::mbarrier_wait(mbarrier_address(barrier), parity);
}

template <typename T, typename U>
void bulk_copy(const Smem<T>& to, const Global<U>& from, unsigned bytes,
               const Smem<Mbarrier>& barrier) {
  if (bytes % 16 != 0) simt::fail_thread("copies a number of bytes that is no multiple of 16");
  check_alignment(to.raw(), 16);
  check_alignment(from.raw(), 16);
  to.check_bounds(to.raw(), bytes);
  from.check(from.raw(), bytes, simt::Access::kRead);
  simt::bulk_copy(to.raw(), from.raw(), bytes, mbarrier_address(barrier));
}

}  // namespace ddpm::cuda
