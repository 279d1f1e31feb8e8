// The end of a training step: gradient norm, clip, Adam, EMA, and the state's advance.
#pragma once

#include "engine/graph.h"

namespace ddpm {

// Lists the update on `g`, after backward(); desc.count is set from the graph's parameters.
void add_optimizer(Graph& g, AdamDesc desc);

}  // namespace ddpm
