// The training objective (Ho et al. 2020, algorithm 1 and section 3) as steps of a graph.
#pragma once

#include "engine/graph.h"
#include "model/config.h"
#include "model/schedule.h"

namespace ddpm {

// How the timesteps of a batch are drawn: uniformly, or in proportion to the root of their mean
// squared loss, each image weighted by the inverse (Nichol & Dhariwal 2021, section 3.3).
enum class Timesteps { kUniform, kLossSecondMoment };

struct ObjectiveOptions {
  LossKind loss = LossKind::kSimple;
  Timesteps timesteps = Timesteps::kUniform;
};

// What trains such a variance, where nothing else is asked for.
LossKind usual_loss(VarianceType);

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
  Tensor timestep;      // I32 (N)
  Tensor sample_loss;   // (N), without weights
  Tensor loss_history;  // persistent (timesteps, kLossHistoryRow), where timesteps are drawn by it
};

// Lists noising, the network, the loss and the whole backward pass; of a data set, the drawing too.
// Throws Error(kConfig) for a bound that is infinite, see loss_factors().
Objective add_objective(Graph& g, const UNetConfig&, const SchedulerConfig&,
                        const ObjectiveOptions&, const TrainingBatch&);
Objective add_objective(Graph& g, const UNetConfig&, const SchedulerConfig&,
                        const ObjectiveOptions&, const TrainingData&);

}  // namespace ddpm
