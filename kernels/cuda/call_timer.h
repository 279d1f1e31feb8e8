// How long a Call takes, on buffers of its own.
#pragma once

#include <cstddef>
#include <vector>

#include "kernels/call.h"

namespace ddpm::cuda {

// Seconds of one run on the current device. bytes[i] is the size of slot i.
double time_call(const Call& call, const std::vector<size_t>& bytes);

}  // namespace ddpm::cuda
