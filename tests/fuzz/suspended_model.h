// The model that suspended files of the fuzzer are of: no weights, images of 2x2, three classes and
// a fourth embedding for none.
#pragma once

#include "model/pipeline.h"
#include "model/presets.h"
#include "tests/fuzz/fuzz.h"

namespace ddpm::fuzz {

class SuspendedModel {
 public:
  SuspendedModel() : weights_(kNoTensors, sizeof kNoTensors) {
    const Preset& tiny = find_preset("tiny");
    pipeline_.folder = "model";
    pipeline_.unet = tiny.unet;
    pipeline_.unet.sample_height = pipeline_.unet.sample_width = 2;
    pipeline_.unet.in_channels = 1;
    pipeline_.unet.num_class_embeds = 4;
    pipeline_.unet.null_class = true;
    pipeline_.scheduler = tiny.scheduler;
    pipeline_.weights = weights_.path();
  }
  const Pipeline& pipeline() const { return pipeline_; }

 private:
  static constexpr uint8_t kNoTensors[10] = {2, 0, 0, 0, 0, 0, 0, 0, '{', '}'};
  MemoryFile weights_;
  Pipeline pipeline_;
};

}  // namespace ddpm::fuzz
