#include "tools/feature_network.h"

#include <algorithm>
#include <cmath>

#include "engine/memory.h"
#include "tools/image.h"

namespace ddpm::tools {

FeatureNetwork::FeatureNetwork(Backend& backend, const SafetensorsReader& weights,
                               const Shape& image, int batch)
    : image_{batch, image.h, image.w, image.c} {
  const auto build = [&](int n) {
    return build_inception_graph(backend, weights, {n, image.h, image.w, 3});
  };
  InceptionGraph f = build(batch);
  require_memory(f.graph, sizeof(float) * static_cast<size_t>(f.graph.params().arena_size()), batch,
                 [&](int n) { return planned_bytes(build(n).graph); });
  images_tensor_ = f.images;
  features_tensor_ = f.features;
  logits_tensor_ = f.logits;
  inputs_.resize(static_cast<size_t>(f.graph.shape(f.images).count()));
  features_.resize(static_cast<size_t>(f.graph.shape(f.features).count()));
  logits_.resize(static_cast<size_t>(f.graph.shape(f.logits).count()));
  store_ = load_inception(backend, weights, f.graph.params());
  executor_ = std::make_unique<Executor>(std::move(f.graph), store_->arenas());
  executor_->setup_for_good();
}

void FeatureNetwork::run(const uint8_t* images, int64_t count, const Add& add) {
  const int64_t bytes = image_.pixels() * image_.c;
  while (count > 0) {
    const int64_t n = std::min<int64_t>(count, image_.n);
    run_batch(images, n);
    const auto finite = [](float v) { return std::isfinite(v); };
    for (const std::vector<float>* values : {&features_, &logits_})
      if (!std::all_of(values->begin(), values->end(), finite))
        fail(Status::kNonFinite,
             "the inception network puts out values that are not finite; its "
             "weights are not those of an Inception-v3");
    add(features_.data(), logits_.data(), n);
    images += n * bytes;
    count -= n;
  }
}

// The slots without an image run along with what is in them.
void FeatureNetwork::run_batch(const uint8_t* images, int64_t count) {
  const auto bytes = static_cast<size_t>(image_.pixels() * image_.c);
  float* to = inputs_.data();
  for (int64_t i = 0; i < count; ++i, images += bytes) {
    const Image rgb = convert_channels(
        {image_.h, image_.w, image_.c, std::vector<uint8_t>(images, images + bytes)}, 3);
    for (const uint8_t v : rgb.pixels) *to++ = static_cast<float>(v) / 127.5f - 1.0f;
  }
  executor_->upload(images_tensor_, inputs_.data());
  executor_->step();
  executor_->download(features_.data(), features_tensor_);
  executor_->download(logits_.data(), logits_tensor_);
}

}  // namespace ddpm::tools
