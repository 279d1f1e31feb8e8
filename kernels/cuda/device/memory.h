// Global and shared memory as kernels see it.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/bf16.h"

namespace ddpm::cuda {

// A tensor argument of a kernel. Arguments do not alias unless the kernel says so.
template <typename T>
using Global = T* __restrict__;
// One that may be the same memory as another such argument.
template <typename T>
using GlobalAliased = T*;

// Part of the block's shared memory.
template <typename T>
using Smem = T*;

// Bytes that SharedMemory::take<T>(count) takes.
template <typename T>
constexpr size_t shared_bytes(size_t count) {
  return (count * sizeof(T) + 127) / 128 * 128;
}

// Hands out the block's dynamic shared memory, in order; each part is aligned to 128 bytes, the
// first to 1024.
class SharedMemory {
 public:
  template <typename T>
  __device__ Smem<T> take(int count) {
    extern __shared__ __align__(1024) unsigned char ddpm_shared_memory[];
    T* part = reinterpret_cast<T*>(ddpm_shared_memory + used_);
    used_ += static_cast<unsigned>(shared_bytes<T>(static_cast<size_t>(count)));
    return part;
  }

 private:
  unsigned used_ = 0;
};

// All threads of the block meet; what they wrote is visible to all.
__device__ __forceinline__ void block_sync() { __syncthreads(); }

// 4, 8 or 16 bytes moved at once; the address is aligned to their number.
template <int N>
struct alignas(4 * N) Words {
  uint32_t w[N];
};
template <int N, typename T>
__device__ __forceinline__ Words<N> load_words(const T* from) {
  return *reinterpret_cast<const Words<N>*>(from);
}
template <int N, typename T>
__device__ __forceinline__ void store_words(T* to, const Words<N>& words) {
  *reinterpret_cast<Words<N>*>(to) = words;
}

// *to |= bits, by any thread of any block.
__device__ __forceinline__ void atomic_or(uint32_t* to, uint32_t bits) { atomicOr(to, bits); }

}  // namespace ddpm::cuda
