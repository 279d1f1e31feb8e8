// SiLU(x) = x sigmoid(x) and its slope, on the device.
#pragma once

#include <device/launch.h>
#include <device/math.h>

namespace ddpm::cuda {

__device__ __forceinline__ float sigmoid(float x) { return fast_divide(1.0f, 1.0f + fast_exp(-x)); }
__device__ __forceinline__ float silu_value(float x) { return x * sigmoid(x); }
// d silu(x) / dx = s (1 + x (1 - s))
__device__ __forceinline__ float silu_slope(float x) {
  const float s = sigmoid(x);
  return s * (1.0f + x * (1.0f - s));
}

}  // namespace ddpm::cuda
