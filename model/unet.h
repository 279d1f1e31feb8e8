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
  // In place of `timestep`, without classes: I32 (steps), kept; that of all images in step 0, 1,
  // ... of a chain. What depends on the timestep alone is then worked out at setup, for all steps.
  Tensor step_timesteps;
};

// Lists the network's steps on `g` and returns its output (N,H,W,out_channels).
Tensor build_unet(Graph& g, const UNetConfig& config, int timesteps, const UNetInputs& inputs);

}  // namespace ddpm
