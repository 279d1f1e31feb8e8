// The U-Net of DDPM (Ho et al. 2020, appendix B) as diffusers' UNet2DModel spells it: module names
// are the checkpoint's.
#pragma once

#include "engine/graph.h"
#include "model/config.h"

namespace ddpm {

struct UNetInputs {
  Tensor sample;        // (N,H,W,in_channels)
  Tensor timestep;      // I32 (N), 0..timesteps-1
  Tensor class_labels;  // I32 (N), where the model has num_class_embeds
  // Without classes: I32, kept. What depends on the timestep alone is then worked out at setup for
  // each of these, and looked up: by `timestep` where that is present (they are 0, 1, ...), else by
  // the step (they are those of all images in step 0, 1, ... of a chain).
  Tensor known_timesteps;
};

// Lists the network's steps on `g` and returns its output (N,H,W,out_channels).
Tensor build_unet(Graph& g, const UNetConfig& config, int timesteps, const UNetInputs& inputs);

}  // namespace ddpm
