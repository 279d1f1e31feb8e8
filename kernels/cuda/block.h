// Sums over a warp and over a block, in a fixed order.
#pragma once

#include <device/launch.h>
#include <device/memory.h>
#include <device/warp.h>

namespace ddpm::cuda {

// The sum of all lanes' values, in every lane.
template <typename T>
__device__ __forceinline__ T warp_sum(T value) {
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) value += shuffle_xor(value, mask);
  return value;
}

__device__ __forceinline__ float warp_max(float value) {
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) {
    const float other = shuffle_xor(value, mask);
    value = other > value ? other : value;
  }
  return value;
}

// The sum of all threads' values, in every thread. scratch: an element per warp, which may be used
// again after the next block_sync().
template <typename T>
__device__ __forceinline__ T block_sum(T value, const Smem<T>& scratch) {
  value = warp_sum(value);
  if (lane_id() == 0) scratch[warp_id()] = value;
  block_sync();
  T sum = 0;
  for (int i = 0; i < static_cast<int>(blockDim.x / 32); ++i) sum += scratch[i];
  return sum;
}

}  // namespace ddpm::cuda
