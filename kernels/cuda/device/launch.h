// Starting a kernel. A kernel includes only headers of <device/...> and those built on them; the
// host's versions of these headers, in the tests, run the same kernels on the CPU.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

#include "kernels/error.h"

namespace ddpm::cuda {

// Blocks are whole warps. `shared` bytes are handed out by SharedMemory.
struct LaunchShape {
  unsigned grid_x = 1, grid_y = 1, grid_z = 1;
  unsigned block = 256;
  size_t shared = 0;
};

// Kernel<<<shape, stream>>>(args...), each argument converted to its parameter's type.
template <auto Kernel, typename... Args>
void launch(const LaunchShape& shape, void* stream, Args... args) {
  constexpr size_t kWithoutAsking = 48 * 1024;
  cudaError_t status = cudaSuccess;
  if (shape.shared > kWithoutAsking)
    status = cudaFuncSetAttribute(Kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                  static_cast<int>(shape.shared));
  if (status == cudaSuccess) {
    const dim3 grid(shape.grid_x, shape.grid_y, shape.grid_z);
    Kernel<<<grid, shape.block, shape.shared, static_cast<cudaStream_t>(stream)>>>(args...);
    status = cudaGetLastError();
  }
  if (status != cudaSuccess)
    fail(Status::kDevice, "launch of %u x %u x %u blocks of %u threads, %zu bytes shared: %s",
         shape.grid_x, shape.grid_y, shape.grid_z, shape.block, shape.shared,
         cudaGetErrorString(status));
}

}  // namespace ddpm::cuda
