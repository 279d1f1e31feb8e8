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
};

// Lists the network's steps on `g` and returns its output (N,H,W,out_channels).
Tensor build_unet(Graph& g, const UNetConfig& config, int timesteps, const UNetInputs& inputs);

}  // namespace ddpm
