// A stream for messages beside the stream that computes.
#pragma once

#include <memory>

#include "kernels/backend.h"

namespace ddpm::cuda {

// Beside `stream`, on the current device.
std::unique_ptr<Lane> make_cuda_lane(void* stream);

}  // namespace ddpm::cuda
