// The built-in data set: one coloured disc, square or triangle on a plain background. Image i is a
// pure function of i and the size, the same on every machine.
#pragma once

#include "engine/dataset.h"

namespace ddpm {

// 50,000, or as many as fit in 1 GiB.
int64_t shapes_count(const Shape& image);

// Images first, ..., first + count - 1. image.c is 1 (luma), 3 (RGB) or 4 (RGB and opaque alpha),
// else Error(kConfig).
Dataset make_shapes(int64_t count, const Shape& image, int64_t first = 0);

}  // namespace ddpm
