// The host's version of kernels/cuda/device/graph.h: a condition is the address of a word.
#pragma once

#include <cstdint>

namespace ddpm::cuda {

using GraphCondition = uint64_t;
inline void set_condition(GraphCondition condition, bool value) {
  *reinterpret_cast<uint32_t*>(condition) = value ? 1 : 0;
}

inline void system_fence() {}  // one memory, one thread at a time

}  // namespace ddpm::cuda
