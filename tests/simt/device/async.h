// The host's version of kernels/cuda/device/async.h.
#pragma once

#include "device/memory.h"
#include "tests/simt/machine.h"

namespace ddpm::cuda {

template <typename T, typename U>
void copy_async(const Smem<T>& to, const Global<U>& from, bool valid = true) {
  check_alignment(to.raw(), 16);
  to.check_bounds(to.raw(), 16);
  if (valid) {
    check_alignment(from.raw(), 16);
    from.check(from.raw(), 16, simt::Access::kRead);
  }
  simt::copy_async(to.raw(), from.raw(), valid);
}
inline void copy_async_commit() { simt::copy_async_commit(); }
template <int Newest>
void copy_async_wait() {
  simt::copy_async_wait(Newest);
}

}  // namespace ddpm::cuda
