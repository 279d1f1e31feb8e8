// The network alone: images and timesteps in, its output out.
#pragma once

#include "engine/graph.h"
#include "model/config.h"

namespace ddpm {

// Persistent tensors: sample F32 (N,H,W,in_channels), timestep I32 (N), class_labels I32 (N) where
// the model has num_class_embeds, output F32 (N,H,W,out_channels).
struct ForwardGraph {
  Graph graph;
  Tensor sample, timestep, class_labels, output;
};
ForwardGraph build_forward_graph(Backend& backend, const UNetConfig& unet, int timesteps,
                                 int batch_size);

}  // namespace ddpm
