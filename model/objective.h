// The training objective: L_simple of DDPM (paper eq. 14, algorithm 1), as steps of a graph.
#pragma once

#include "engine/graph.h"
#include "model/config.h"
#include "model/schedule.h"

namespace ddpm {

// A batch that is given.
struct TrainingBatch {
  Tensor x0;            // (N,H,W,C) in [-1, 1]
  Tensor timestep;      // I32 (N)
  Tensor noise;         // (N,H,W,C)
  Tensor class_labels;  // I32 (N), where the model has num_class_embeds
};

// A data set that batches, timesteps and noise are drawn for: images U8 (count,H,W,C), labels I32
// (count) where the model has num_class_embeds.
struct TrainingData {
  GatherDesc gather;
  Tensor images, labels;
};

struct Objective {
  Tensor timestep;     // I32 (N)
  Tensor sample_loss;  // (N)
};

// Lists noising, the network, the loss and the whole backward pass; of a data set, the drawing too.
Objective add_objective(Graph& g, const UNetConfig&, PredictionType, const Schedule&,
                        const TrainingBatch&);
Objective add_objective(Graph& g, const UNetConfig&, PredictionType, const Schedule&,
                        const TrainingData&);

}  // namespace ddpm
