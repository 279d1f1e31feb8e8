// Errors of the CUDA runtime and of cuBLASLt as this program's.
#pragma once

#include <cublasLt.h>
#include <cuda_runtime.h>

#include "kernels/error.h"

namespace ddpm::cuda {

// `what` says what was being done: "copy of 12 bytes".
inline void check(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  fail(status == cudaErrorMemoryAllocation ? Status::kMemory : Status::kDevice, "CUDA: %s: %s",
       what, cudaGetErrorString(status));
}

inline void check(cublasStatus_t status, const char* what) {
  if (status != CUBLAS_STATUS_SUCCESS)
    fail(Status::kDevice, "cuBLASLt: %s: %s", what, cublasGetStatusString(status));
}

}  // namespace ddpm::cuda
