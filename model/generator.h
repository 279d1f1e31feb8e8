// Sampling: a whole chain for a batch of images, each a function of (weights, seed, its number).
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <vector>

#include "engine/executor.h"
#include "model/config.h"
#include "model/sampler.h"

namespace ddpm {

class Generator {
 public:
  // Called with the steps of a chain that are done; may throw to stop it.
  using Progress = Executor::Progress;

  // Gives the arenas of a network's parameters; kWeights is what is sampled from.
  using Weights = std::function<ParamArenas(const Params&)>;

  Generator(Backend& backend, const UNetConfig& unet, const SchedulerConfig& scheduler,
            const SamplerOptions& sampler, int batch_size, const Weights& weights);
  // A chain of these rows, of a model of `timesteps` timesteps. guidance: see SamplerDesc; given
  // only where the network has a null_class, and then each step runs it on 2 batch_size images.
  Generator(Backend& backend, const UNetConfig& unet, int timesteps, std::vector<SamplerRow> rows,
            int batch_size, const Weights& weights, std::optional<float> guidance = {});

  // Call one of these before the first chain. The second is for weights that are this generator's
  // alone and final: it gives back what it has packed.
  void weights_changed() { executor_->run(Phase::kSetup); }
  void weights_final() { executor_->setup_for_good(); }

  // Of the chains that begin from here on, where a guidance was given.
  void set_guidance(float guidance) { guidance_ = guidance; }

  // Images `first` .. `first + count - 1` of `seed`, count <= batch_size, as (count,H,W,C) in
  // [-1, 1]. A class-conditional model draws class (image number mod classes).
  // Throws Error(kNonFinite) rather than return values that are not finite.
  std::vector<float> sample(uint64_t seed, uint64_t first, int count, const Progress& = {});
  // The same from a given x_T (count,H,W,C).
  std::vector<float> sample_from(const std::vector<float>& x_T, uint64_t seed, uint64_t first,
                                 int count, const Progress& = {});

  // A chain by hand: begin(); x() drawn by run(Phase::kStart) of the executor, or written; then the
  // executor's step(), steps() times. x() is then the images, not yet clamped to [-1, 1].
  // `labels`: a class for each image of the batch, absent: (image number mod classes). `seeds`: one
  // for each image of the batch, which then all have the number `first`; absent: all have `seed`.
  void begin(uint64_t seed, uint64_t first, const int32_t* labels = nullptr,
             const uint64_t* seeds = nullptr);
  // The class of an image where begin() is given none: set_label()'s, or else number mod classes.
  int32_t label_of(uint64_t image) const {
    if (classes_ == 0) return 0;
    return label_.value_or(static_cast<int32_t>(image % static_cast<uint64_t>(classes_)));
  }
  void set_label(std::optional<int32_t> label) { label_ = label; }
  Tensor x() const { return x_; }
  Tensor x0() const { return x0_; }  // what the last step took for the image
  const std::vector<SamplerRow>& rows() const { return rows_; }

  // The noise (batch,H,W,C) that begin() and run(Phase::kStart) give images `first`, ...
  std::vector<float> start_noise(uint64_t seed, uint64_t first);
  // Of a chain by hand, both (count,H,W,C): x as it is, and as images, clamped to [-1, 1].
  // Throw Error(kNonFinite) where a step put out values that are not finite.
  std::vector<float> latents(int count) const;
  std::vector<float> images(int count) const;
  // What a chain is after some of its steps: resume() in place of begin(), and the same bits come
  // out of the rest, from the same rows, weights, plan, seed, first and labels.
  struct Suspended {
    int done = 0;                    // steps
    std::vector<float> x, previous;  // (batch,H,W,C); previous empty where the next row has none
  };
  Suspended suspend() const;
  void resume(uint64_t seed, uint64_t first, const int32_t* labels, const Suspended&);

  int batch_size() const { return shape_.n; }
  int steps() const { return static_cast<int>(rows_.size()); }
  const Shape& shape() const { return shape_; }  // of a batch
  Executor& executor() { return *executor_; }
  size_t bytes() const { return executor_->bytes(); }

 private:
  std::vector<float> run_chain(int count, const Progress& progress);
  std::vector<float> batch_of(Tensor t) const;

  Shape shape_;
  int classes_ = 0;
  std::optional<int32_t> label_;
  float guidance_;
  std::vector<SamplerRow> rows_;
  // Of the batch, and of a guided one once more.
  std::vector<ChainSlot> slots_;
  std::vector<int32_t> labels_;
  Tensor x_, x0_, slots_tensor_, class_labels_;
  std::unique_ptr<Executor> executor_;
};

// How the images of a batch go through their chains.
enum class Pace {
  kTogether,  // all are in the same row; a value that is not finite in one ends all
  kOwn,       // each is in a row of its own
};

// The graph of a denoising step, for a generator or to look at. Persistent tensors as named: slots
// are ChainSlots (N). Without classes also `timesteps`, I32, which the setup reads: those of the
// rows (kTogether), or 0, ..., timesteps - 1 (kOwn). Of a guided batch slots and class_labels are
// (2 N), the second half the same images without their class.
struct SamplingGraph {
  Graph graph;
  Tensor x, previous, rows, slots, timesteps, class_labels;
};
SamplingGraph build_sampling_graph(Backend& backend, const UNetConfig& unet, int timesteps,
                                   int batch_size, int row_count, Pace pace = Pace::kTogether,
                                   bool guided = false);

}  // namespace ddpm
