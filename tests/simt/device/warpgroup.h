// The host's version of kernels/cuda/device/warpgroup.h.
#pragma once

#include "tests/simt/machine.h"
#include "tests/simt/warpgroup.h"

namespace ddpm::cuda {

inline void named_barrier(unsigned id, unsigned threads) { simt::named_barrier(id, threads); }

template <int Count>
void give_up_registers() {
  simt::warp_meet("setmaxnreg.dec", nullptr, [](void* const*) {
    simt::warpgroups().set_registers(simt::current_warp(), Count);
  });
}
template <int Count>
void take_registers() {
  simt::warp_meet("setmaxnreg.inc", nullptr, [](void* const*) {
    simt::warpgroups().set_registers(simt::current_warp(), Count);
  });
}

inline void proxy_fence() { simt::proxy_fence(); }

}  // namespace ddpm::cuda
