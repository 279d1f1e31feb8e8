// A batch whose images run chains of their own, with other samplers, steps and seeds: each joins
// and leaves between two steps. On a batch-invariant backend an image has the bits that a Generator
// gives it; on the CPU also on others, where the batch size is the same.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "model/generator.h"

namespace ddpm {

class MixedBatch {
 public:
  // Its weights are final, as after Generator::weights_final(). guided: see SamplerDesc; only where
  // the network has a null_class, which then runs on 2 batch_size images.
  MixedBatch(Backend& backend, const UNetConfig& unet, const SchedulerConfig& scheduler,
             int batch_size, const Generator::Weights& weights, bool guided = false);

  struct Chain {
    const std::vector<SamplerRow>* rows = nullptr;  // from sampler_rows()
    uint64_t seed = 0, image = 0;
    int32_t label = 0;           // not read where the model has no classes
    float guidance = 1;          // not read where the batch is not guided
    const float* x_T = nullptr;  // (H,W,C), read in the next step(); null: drawn
  };
  // Both hold from the next step on.
  void join(int slot, const Chain& chain);
  void leave(int slot);

  // One step of every chain. If it throws, no chain is left: as after leave() of all.
  void step();
  bool finished(int slot) const;
  // The image in a slot: bytes (H,W,C), or floats (H,W,C) clamped to [-1, 1], or both. On the
  // device floats are as they are, and both are there when this returns. Returns whether it is
  // finite.
  bool read(int slot, uint8_t* bytes, float* floats, bool on_device = false);

  int size() const { return static_cast<int>(x_T_.size()); }
  size_t image_size() const { return image_.size(); }  // values of an image
  uint64_t steps() const { return step_; }             // made so far
  size_t bytes() const;

 private:
  void set_slot(int slot, const ChainSlot& to);
  void start_chains();
  void* address(Tensor t, size_t offset) const;

  Backend& backend_;
  int timesteps_;        // a chain has no more rows
  uint64_t step_ = 0;    // the state's
  bool changed_ = true;  // slots_ and labels_ are not what the backend has
  // Of the batch, and of a guided one once more.
  std::vector<ChainSlot> slots_;
  std::vector<int32_t> labels_;
  std::vector<const float*> x_T_;  // of slots whose chains begin in this step
  std::vector<float> image_;
  Tensor x_, rows_, slots_tensor_, class_labels_;
  std::unique_ptr<Executor> executor_;
  std::unique_ptr<Memory> floats_, bytes_;  // of an image, aligned as a batch is
  Call to_bytes_;
};

}  // namespace ddpm
