// The two rates of a device that bound every operation.
#pragma once

#include <algorithm>

#include "kernels/backend.h"

namespace ddpm::tools {

struct Ceilings {
  size_t copied = 0;            // bytes of the copy that was timed: more than any cache holds
  int size = 0;                 // of the square product, in the compute type
  double bytes_per_second = 0;  // read and written
  double macs_per_second = 0;   // multiply-adds
  // The least seconds of a step that moves so many bytes and is a product of so many multiply-adds.
  double floor(double bytes, double macs) const {
    return std::max(bytes / bytes_per_second, macs / macs_per_second);
  }
};
Ceilings measure_ceilings(Backend&);
// Multiply-adds per second of a product of matrices size x size: the median of so many.
double product_rate(Backend&, int size, int rounds);

}  // namespace ddpm::tools
