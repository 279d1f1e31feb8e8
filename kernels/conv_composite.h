// A fused convolution as plain calls, for a backend that declines it whole: an op lists them, and a
// backend that has both ways times them against its own.
#pragma once

#include <functional>

#include "kernels/backend.h"

namespace ddpm {

// Where the calls of a composite go, in order, and what they need.
struct ConvLister {
  std::function<Out(const Shape&)> activation;  // one more tensor of the compute type
  std::function<void(Call)> add;
  // The filter as the forward pass of a plain desc reads it; list_input() asks for none.
  std::function<In(const ConvDesc&, In filter)> filter{};
};

// The desc of what is left to convolve once the input has been written out and the shortcut is a
// residual.
ConvDesc without_prologue(ConvDesc);

// The input with concatenation, transform and upsampling written out; x itself where there is
// nothing to write. A transform must have scale and shift.
In list_input(Backend&, const ConvDesc&, const ConvSlots&, const ConvLister&);

// y of the whole desc but its statistics: the shortcut is a convolution of its own, which the main
// one adds. Filters in the slots are those that ConvLister::filter takes.
void list_forward(Backend&, const ConvDesc&, ConvSlots, Out y, const ConvLister&);

}  // namespace ddpm
