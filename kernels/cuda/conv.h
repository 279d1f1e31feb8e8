// Hand-written convolutions: implicit GEMMs whose input is transformed on the way in and whose
// output is finished on the way out. bf16 runs on the tensor cores (conv_forward.cu,
// conv_wgrad.cu, and conv_hopper.cu where that is asked for); fp32, and the few shapes that do not
// fit there, on plain arithmetic (conv_direct.cu).
#pragma once

#include <optional>

#include "kernels/backend.h"

namespace ddpm::cuda {

struct ConvChip {
  size_t shared_bytes = 0;  // that a block may have
  int wgmma_blocks = 0;     // of conv_hopper.cu that run at once; 0: that kernel is not used
};

// Everything a ConvDesc can say. statistics: present as the desc says. batch_invariant: sums are
// cut as for one image, however many there are, so that an image's bits do not depend on the batch.
std::optional<Call> conv_forward(DType, const ConvChip&, const ConvDesc&, const ConvSlots&, Out y,
                                 Out statistics, bool batch_invariant = false);
// nullopt unless the convolution reads its input as it is; what is added behind it may be anything.
std::optional<Call> conv_dgrad(DType, const ConvChip&, const ConvDesc&, const ConvSlots&, In dy,
                               Out dx, Write);
// nullopt where the input is upsampled on its way in.
std::optional<Call> conv_dgrad_norm(DType, const ConvChip&, const ConvDesc&, const ConvSlots&,
                                    const GroupNormDesc&, In mean_rstd, In dy, Out dz, Out sums);
// With concatenation, transform and upsampling of the input recomputed.
std::optional<Call> conv_wgrad(DType, const ConvChip&, const ConvDesc&, const ConvSlots&, In dy,
                               Out dfilter, Write);
// With sums[n * stride + offset + k] = sum over pixels of dy; nullopt where sums would not be cut
// at images, and without tensor cores.
std::optional<Call> conv_wgrad_sums(DType, const ConvChip&, const ConvDesc&, const ConvSlots&,
                                    In dy, Out dfilter, Write, Out sums, int stride, int offset);

}  // namespace ddpm::cuda
