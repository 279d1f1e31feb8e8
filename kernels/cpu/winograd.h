// Winograd convolution F(4x4, 3x3) (Lavin & Gray 2016) over NHWC, for 3x3 filters, stride 1, pads
// 1: 36 products per 4x4 outputs instead of 144. Forward, dgrad (the same with the filter rotated
// and transposed) and wgrad (the adjoint by the filter). Relative error 8e-7, direct 3e-7. Forward
// and dgrad give an image the same bits at any batch size and thread count, but whether they are
// used depends on the batch size.
#pragma once

#include <cstddef>

#include "kernels/desc.h"

namespace ddpm::cpu::winograd {

// Whether this pass of a convolution goes this way: possible and, by measurement, faster. A
// function of the desc alone.
bool takes(const ConvDesc&, ConvPass);

// The transformed filter of forward or dgrad, from (K,3,3,C).
size_t filter_bytes(const ConvDesc&);
void pack(const ConvDesc&, ConvPass, int threads, const float* filter, float* packed);

// What forward and dgrad add to their result; null = nothing.
struct Epilogue {
  const float* bias = nullptr;         // (K)
  const float* sample_bias = nullptr;  // one row of sample_bias_stride per image
  int64_t sample_bias_stride = 0;
  const float* residual = nullptr;  // as the result; may be the result itself
};

// kForward: in x, out y. kDgrad: in dy, out dx.
size_t workspace_bytes(const ConvDesc&, ConvPass, int threads);
void run(const ConvDesc&, ConvPass, int threads, const float* in, const float* packed,
         const Epilogue&, float* out, void* workspace);
// dfilter (K,3,3,C) (+)= the gradient.
void run_wgrad(const ConvDesc&, int threads, const float* x, const float* dy, bool accumulate,
               float* dfilter, void* workspace);

}  // namespace ddpm::cpu::winograd
