// Inception-v3 on uint8 images, batch by batch.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "model/inception.h"

namespace ddpm::tools {

// Grows when other features come out of equal images and weights.
inline constexpr const char* kFeatureCode = "1";

class FeatureNetwork {
 public:
  static constexpr int kBatch = 16;

  // `image`: (1,H,W,C) of those it will be given, C from 1 to 4; what is not RGB is made so.
  FeatureNetwork(Backend& backend, const SafetensorsReader& weights, const Shape& image,
                 int batch = kBatch);

  size_t features() const { return features_.size() / static_cast<size_t>(image_.n); }
  size_t classes() const { return logits_.size() / static_cast<size_t>(image_.n); }
  const Shape& image() const { return image_; }  // n: of a batch
  int64_t parameters() const { return store_->params().count(); }
  size_t bytes() const { return store_->bytes() + executor_->bytes(); }

  // Tells `add` the features (n,D) and logits (n,classes) of `count` images (H,W,C), some at a time
  // and in order. Error(kNonFinite) where one is not finite.
  using Add = std::function<void(const float* features, const float* logits, int64_t n)>;
  void run(const uint8_t* images, int64_t count, const Add& add);

 private:
  void run_batch(const uint8_t* images, int64_t count);

  Shape image_;
  Tensor images_tensor_, features_tensor_, logits_tensor_;
  std::vector<float> inputs_, features_, logits_;  // of a batch
  std::unique_ptr<ParamStore> store_;
  std::unique_ptr<Executor> executor_;
};

}  // namespace ddpm::tools
