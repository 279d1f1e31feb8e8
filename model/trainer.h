// Training: one prepared list of steps over a data set that the backend can reach.
#pragma once

#include <memory>
#include <vector>

#include "engine/dataset.h"
#include "engine/executor.h"
#include "engine/param_store.h"
#include "engine/parts.h"
#include "model/config.h"
#include "model/objective.h"

namespace ddpm {

inline constexpr int kLossBuckets = 10;  // of timesteps, see Trainer::take_loss_by_timestep()

struct TrainerOptions {
  int batch_size = 1;  // of all parts together; they must divide it
  Parts parts;
  bool flip = false;
  double label_dropout = 0;           // of a network with a null_class
  ObjectiveOptions objective;         // timesteps by losses only where the batch is not in parts
  AdamDesc adam;                      // count is set by the trainer
  bool activate_zero_layers = false;  // Params::activate_zero_layers(), for benchmarks
  ExecutorOptions executor;
};

class Trainer {
 public:
  // The data set's images must have the model's size. Weights are zero until initialize() or a
  // checkpoint's load.
  Trainer(Backend& backend, const UNetConfig& unet, const SchedulerConfig& scheduler,
          const TrainerOptions& options, Dataset data);

  // Fresh weights, step 0.
  void initialize(uint64_t seed);
  // Call it after writing weights into the store.
  void weights_changed() { executor_->run(Phase::kSetup); }
  // One update. What went wrong stands in the state, which is read when it is wanted.
  void step() {
    executor_->step();
    if (parts_.ranks != nullptr) parts_.ranks->step_asked();
  }

  StepState state() const { return executor_->state(); }
  // Its first_image is the trainer's to set.
  void set_state(const StepState& s);

  // All ranks: weights, moments and average of rank 0.
  void share_parameters();
  // All ranks: AgreedError(kNonFinite) naming the first rank whose weights are not rank 0's.
  void require_equal_weights() const;
  // All ranks: the mean loss of each bucket of timesteps since it was last asked for, over all
  // ranks; NaN where there was none.
  std::vector<double> take_loss_by_timestep();
  // What timesteps are drawn by: (timesteps, kLossHistoryRow), empty where they are drawn
  // uniformly. An empty one is none yet.
  std::vector<float> loss_history() const;
  void set_loss_history(const std::vector<float>& history);
  ParamStore& store() { return *store_; }
  const ParamStore& store() const { return *store_; }
  Executor& executor() { return *executor_; }
  // Whether the images did not fit into the device's memory and are read from the host's.
  bool data_on_host() const { return data_on_host_; }
  // Parameter arenas, activations, data set unless it is on the host.
  size_t bytes() const { return store_->bytes() + executor_->bytes(); }

 private:
  std::unique_ptr<ParamStore> store_;
  std::unique_ptr<Executor> executor_;
  Tensor loss_histogram_, loss_history_;
  size_t history_size_ = 0;
  Parts parts_;
  int part_images_ = 0;
  bool data_on_host_ = false;
};

// The graph of a training step, as Trainer runs it: images U8 (count,H,W,C) is a held tensor,
// labels I32 (count) a persistent one.
struct TrainingGraph {
  Graph graph;
  Tensor images, labels;
  Tensor loss_histogram;  // (kLossBuckets, 2): sum and count
  Tensor loss_history;    // as Objective's
};
TrainingGraph build_training_graph(Backend& backend, const UNetConfig& unet,
                                   const SchedulerConfig& scheduler, const TrainerOptions& options,
                                   int64_t image_count);

}  // namespace ddpm
