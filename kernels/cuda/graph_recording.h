// Calls captured as a CUDA graph.
#pragma once

#include <functional>
#include <memory>

#include "kernels/backend.h"

namespace ddpm::cuda {

// Captures what `calls` enqueues on the stream. A loop is a WHILE node around the captured graph,
// which the device leaves when it has gone round often enough or the host has asked it to.
std::unique_ptr<Recording> record_graph(void* stream, const std::function<void()>& calls);

}  // namespace ddpm::cuda
