// The training objective: L_simple of DDPM (paper eq. 14, algorithm 1), as steps of a graph.
#pragma once

#include "engine/graph.h"
#include "model/config.h"
#include "model/schedule.h"

namespace ddpm {

struct TrainingBatch {
  Tensor x0;            // (N,H,W,C) in [-1, 1]
  Tensor timestep;      // I32 (N)
  Tensor noise;         // (N,H,W,C)
  Tensor class_labels;  // I32 (N), where the model has num_class_embeds
};

// Lists noising, the network, the loss and the whole backward pass. Returns the loss of each image.
Tensor add_objective(Graph& g, const UNetConfig&, PredictionType, const Schedule&,
                     const TrainingBatch&);

}  // namespace ddpm
