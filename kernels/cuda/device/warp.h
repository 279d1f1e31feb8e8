// What the 32 lanes of a warp do together. All lanes take part.
#pragma once

#include <cstdint>

namespace ddpm::cuda {

__device__ __forceinline__ int lane_id() { return static_cast<int>(threadIdx.x & 31u); }
__device__ __forceinline__ int warp_id() { return static_cast<int>(threadIdx.x >> 5); }

template <typename T>
__device__ __forceinline__ T shuffle_xor(T value, int mask) {
  return __shfl_xor_sync(0xFFFFFFFFu, value, mask);
}
template <typename T>
__device__ __forceinline__ T shuffle(T value, int lane) {
  return __shfl_sync(0xFFFFFFFFu, value, lane);
}
// Of lane + delta; the last `delta` lanes get their own.
template <typename T>
__device__ __forceinline__ T shuffle_down(T value, int delta) {
  return __shfl_down_sync(0xFFFFFFFFu, value, static_cast<unsigned>(delta));
}
__device__ __forceinline__ bool warp_any(bool predicate) {
  return __any_sync(0xFFFFFFFFu, predicate) != 0;
}
// What the lanes wrote to shared memory is visible to all of them.
__device__ __forceinline__ void warp_sync() { __syncwarp(); }

}  // namespace ddpm::cuda
