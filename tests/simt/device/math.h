// The host's version of kernels/cuda/device/math.h.
#pragma once

#include <cmath>
#include <cstdint>
#include <numbers>

#include "kernels/bf16.h"

namespace ddpm::cuda {

inline float fast_exp(float x) { return std::exp(x); }
inline float fast_exp2(float x) { return std::exp2(x); }
inline float fast_divide(float a, float b) { return a / b; }
inline float reciprocal_sqrt(float x) { return 1.0f / std::sqrt(x); }
inline float fast_sigmoid(float x) { return 1.0f / (1.0f + std::exp(-x)); }

inline void sincos_pi(float x, float& sine, float& cosine) {
  const double angle = std::numbers::pi * double{x};
  sine = static_cast<float>(std::sin(angle));
  cosine = static_cast<float>(std::cos(angle));
}

inline uint32_t pack_bf16(float low, float high) {
  return uint32_t{to_bf16(high).bits} << 16 | to_bf16(low).bits;
}

}  // namespace ddpm::cuda
