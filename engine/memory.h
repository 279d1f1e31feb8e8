// What a graph takes of a backend's memory, known before any is taken.
#pragma once

#include <cstddef>
#include <functional>

#include "engine/graph.h"

namespace ddpm {

// Bytes an Executor of this graph allocates: the planned arena, persistent tensors, the shadow of
// the weights; without the parameter arenas.
size_t planned_bytes(const Graph& g);

// Error(kMemory) unless the backend has that much and `fixed` bytes (parameter arenas, the data
// set) beside: what is needed, what is free, and the batch that would fit. `batch` is the graph's;
// planned_at(b) are the planned bytes of the same graph for another batch. The user's batch is
// `parts` times the graph's.
void require_memory(const Graph& g, size_t fixed, int batch,
                    const std::function<size_t(int)>& planned_at, int parts = 1);

}  // namespace ddpm
