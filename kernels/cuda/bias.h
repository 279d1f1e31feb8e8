// Passes of our own around a library's convolution: what is added to its result, and where that
// has another type or must be added to something.
#pragma once

#include "kernels/call.h"
#include "kernels/desc.h"
#include "kernels/dtype.h"

namespace ddpm::cuda {

// y (N,P,Q,K) of `type` += bias[k] + sample_bias[n * stride + offset + k] + residual; what is null
// is left out. Sums in fp32, rounded once.
struct BiasPass {
  Shape y;
  DType type = DType::kF32;
  int64_t sample_bias_stride = 0, sample_bias_offset = 0;
};
void check(const BiasPass&);
void add_bias(const BiasPass&, void* stream, void* y, const float* bias, const float* sample_bias,
              const void* residual);

// y (+)= x, each kF32 or kBF16, rounded once. A copy that adds nothing and changes no type, and
// fp32 added into bf16, are refused.
void convert(void* stream, int64_t count, DType from, const void* x, DType to, void* y, Write);

}  // namespace ddpm::cuda
