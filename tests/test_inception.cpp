// Inception-v3 against PyTorch's values in float64 (golden/make_inception.py), and files that hold
// none.
#include <catch2/catch.hpp>

#include "model/inception.h"
#include "tests/inception_weights.h"
#include "tests/kernel_backend.h"
#include "tests/support.h"
#include "tests/temp_folder.h"
#include "tools/feature_network.h"

using namespace ddpm;
using namespace ddpm::test;
using Catch::Contains;

namespace {

struct Outputs {
  std::vector<float> features, logits;
};

Outputs run(tools::FeatureNetwork& network, const std::vector<uint8_t>& images) {
  Outputs all;
  const auto count =
      static_cast<int64_t>(images.size()) / network.image().pixels() / network.image().c;
  network.run(images.data(), count, [&](const float* f, const float* logits, int64_t n) {
    all.features.insert(all.features.end(), f, f + n * static_cast<int64_t>(network.features()));
    all.logits.insert(all.logits.end(), logits,
                      logits + n * static_cast<int64_t>(network.classes()));
  });
  return all;
}

// The weights with one tensor changed.
void write_changed(const std::string& path, const std::string& name,
                   const std::function<void(HashTensor&)>& change) {
  std::vector<HashTensor> tensors = inception_tensors();
  for (HashTensor& t : tensors)
    if (t.name == name) change(t);
  std::erase_if(tensors, [](const HashTensor& t) { return t.name.empty(); });
  write_tensors(path, tensors);
}

}  // namespace

TEST_CASE("inception: features and logits as PyTorch", "[inception]") {
  const TempFolder tmp;
  write_tensors(tmp / "weights", inception_tensors());
  const SafetensorsReader weights(tmp / "weights");
  const auto images = inception_images("a", 24);
  for (const Precision precision : {Precision::kFp32, Precision::kAuto}) {
    const auto backend = make_cpu_backend({.precision = precision});
    tools::FeatureNetwork network(*backend, weights, {1, 32, 32, 3}, 10);
    const Outputs o = run(network, images);
    // Some 20 layers of fp32 sums, and Winograd's 2e-6; the images' features differ by a tenth of
    // their size. PyTorch's own float32 is 4e-7 away.
    CHECK(relative_error(o.features, golden_inception_values("a.features")) < 3e-6);
    CHECK(relative_error(o.logits, golden_inception_values("a.logits")) < 3e-6);
  }
}

TEST_CASE("simt.inception: a small image's features as PyTorch", "[inception]") {
  const TempFolder tmp;
  write_tensors(tmp / "weights", inception_tensors());
  const SafetensorsReader weights(tmp / "weights");
  const auto backend = make_kernel_backend(DType::kF32);
  InceptionGraph f = build_inception_graph(*backend, weights, {2, 32, 32, 3}, 75);
  const auto store = load_inception(*backend, weights, f.graph.params());
  Executor executor(std::move(f.graph), store->arenas(), {.poison = true});
  std::vector<float> images, features(2 * 128);
  for (const uint8_t v : inception_images("a", 2))
    images.push_back(static_cast<float>(v) / 127.5f - 1.0f);
  executor.upload(f.images, images.data());
  executor.run(Phase::kSetup);
  executor.run(Phase::kStep);
  executor.download(features.data(), f.features);
  CHECK(relative_error(features, golden_inception_values("small.features")) < 3e-6);
}

TEST_CASE("inception: an image's features hang on no other and on no batch", "[inception]") {
  const TempFolder tmp;
  write_tensors(tmp / "weights", inception_tensors());
  const SafetensorsReader weights(tmp / "weights");
  const auto backend = make_cpu_backend({.threads = 1});
  const auto images = inception_images("b", 3);
  tools::FeatureNetwork network(*backend, weights, {1, 32, 32, 3}, 2);
  const Outputs all = run(network, images);
  const Outputs last = run(network, {images.begin() + 2 * 3072, images.end()});
  CHECK((std::vector<float>(all.features.begin() + 2 * 128, all.features.end()) == last.features));

  // Gray images are what RGB ones of three equal channels are.
  const std::vector<uint8_t> gray(images.begin(), images.begin() + 1024);
  std::vector<uint8_t> rgb;
  for (const uint8_t v : gray) rgb.insert(rgb.end(), 3, v);
  tools::FeatureNetwork of_gray(*backend, weights, {1, 32, 32, 1}, 2);
  CHECK((run(of_gray, gray).features == run(network, rgb).features));
}

TEST_CASE("inception: files that are none", "[inception]") {
  const TempFolder tmp;
  const auto backend = make_cpu_backend({.threads = 1});
  const std::string path = tmp / "weights";
  const auto build = [&] {
    const SafetensorsReader weights(path);
    const InceptionGraph f = build_inception_graph(*backend, weights, {1, 32, 32, 3});
    load_inception(*backend, weights, f.graph.params());
  };
  write_changed(path, "Mixed_6b.branch7x7_2.bn.running_var", [](HashTensor& t) { t.name = ""; });
  CHECK_THROWS_WITH(build(), Contains("Mixed_6b.branch7x7_2.bn.running_var") &&
                                 Contains("tools/convert_inception.py"));
  write_changed(path, "Mixed_7b.branch3x3_2b.conv.weight",
                [](HashTensor& t) { std::swap(t.shape[2], t.shape[3]); });
  CHECK_THROWS_WITH(build(), Contains("Mixed_7b.branch3x3_2b.conv.weight") && Contains("1,3]"));
  write_changed(path, "fc.weight", [](HashTensor& t) { std::swap(t.shape[0], t.shape[1]); });
  CHECK_THROWS_WITH(build(), Contains("fc.weight"));
  write_changed(path, "Conv2d_1a_3x3.conv.weight", [](HashTensor& t) { t.shape = {54}; });
  CHECK_THROWS_WITH(build(), Contains("Conv2d_1a_3x3.conv.weight"));
  write_changed(path, "Mixed_5c.branch_pool.bn.running_var",
                [](HashTensor& t) { t.values[0] = -1; });
  try {
    build();
    FAIL("a negative variance is taken");
  } catch (const Error& e) {
    CHECK(e.status() == Status::kFile);
    CHECK_THAT(e.what(), Contains("Mixed_5c.branch_pool"));
  }
}
