// Arithmetic that differs between device and host, or between ways of doing it on the device.
#pragma once

#include <cuda_bf16.h>

#include <cstdint>

#include "kernels/bf16.h"

namespace ddpm::cuda {

// e^x and 2^x by the special function unit: relative error about 2^-21 for |x| <= 80.
__device__ __forceinline__ float fast_exp(float x) { return __expf(x); }
__device__ __forceinline__ float fast_exp2(float x) { return exp2f(x); }
// a / b with relative error 2^-22.
__device__ __forceinline__ float fast_divide(float a, float b) { return __fdividef(a, b); }
__device__ __forceinline__ float reciprocal_sqrt(float x) { return rsqrtf(x); }

// 1 / (1 + e^-x) in four instructions: relative error about 2^-21, 0 below -87.
__device__ __forceinline__ float fast_sigmoid(float x) {
  float e, y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(e) : "f"(-1.4426950408889634f * x));
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(1.0f + e));
  return y;
}
// sin(pi x) and cos(pi x) within 2^-23; the reduction of x is exact.
__device__ __forceinline__ void sincos_pi(float x, float& sine, float& cosine) {
  sincospif(x, &sine, &cosine);
}

// Two rounded values, `low` in the lower half.
__device__ __forceinline__ uint32_t pack_bf16(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&pair);
}

}  // namespace ddpm::cuda
