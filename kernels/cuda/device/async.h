// cp.async: copies from global to shared memory that run beside the computation.
#pragma once

#include <cstdint>

namespace ddpm::cuda {

// 16 bytes, both addresses aligned to 16; zeros where not `valid` (`from` is not read then).
template <typename T>
__device__ __forceinline__ void copy_async(T* to, const T* from, bool valid = true) {
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(to));
  const int bytes = valid ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(address), "l"(from),
               "r"(bytes)
               : "memory");
}
// Closes a group of this thread's copies.
__device__ __forceinline__ void copy_async_commit() {
  asm volatile("cp.async.commit_group;\n" ::: "memory");
}
// Waits until at most `Newest` of this thread's groups are under way. Other threads see the copies
// after the next block_sync().
template <int Newest>
__device__ __forceinline__ void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;\n" ::"n"(Newest) : "memory");
}

}  // namespace ddpm::cuda
