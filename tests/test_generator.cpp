// An image is a function of (weights, seed, its number), whatever batch it is drawn in.
#include <catch2/catch.hpp>

#include <cmath>
#include <cstring>

#include "model/generator.h"
#include "model/presets.h"
#include "tests/golden.h"

using namespace ddpm;

namespace {

// Images 0..63 of a small network, drawn `batch` at a time.
std::vector<float> draw(Backend& backend, const UNetConfig& unet, const SchedulerConfig& scheduler,
                        int batch, int total, uint64_t seed, uint64_t first = 0,
                        bool final_weights = false) {
  std::unique_ptr<ParamStore> store;
  Generator generator(backend, unet, scheduler, {.kind = SamplerKind::kDdpm, .steps = 3}, batch,
                      [&](const Params& params) {
                        store = std::make_unique<ParamStore>(backend, params,
                                                             std::vector{Arena::kWeights});
                        test::set_hash_weights(*store, {Arena::kWeights});
                        return store->arenas();
                      });
  if (final_weights)
    generator.weights_final();
  else
    generator.weights_changed();
  std::vector<float> all;
  for (int done = 0; done < total; done += batch) {
    const std::vector<float> part =
        generator.sample(seed, first + static_cast<uint64_t>(done), std::min(batch, total - done));
    all.insert(all.end(), part.begin(), part.end());
  }
  return all;
}

}  // namespace

TEST_CASE("generator: batch-invariant images are the same bits in batches of 1, 7 and 64",
          "[generator]") {
  const Preset& p = find_preset("tiny");
  auto backend = make_cpu_backend({.batch_invariant = true});
  const std::vector<float> one = draw(*backend, p.unet, p.scheduler, 1, 9, 5);
  const std::vector<float> seven = draw(*backend, p.unet, p.scheduler, 7, 9, 5);
  const std::vector<float> many = draw(*backend, p.unet, p.scheduler, 64, 64, 5);
  CHECK(one == seven);
  CHECK(std::equal(one.begin(), one.end(), many.begin()));
  // And wherever a batch starts.
  const std::vector<float> tail = draw(*backend, p.unet, p.scheduler, 4, 4, 5, 5);
  CHECK(std::equal(tail.begin(), tail.end(), one.begin() + 5 * 16 * 16 * 3));
}

TEST_CASE("generator: otherwise pixels agree within 1/255", "[generator]") {
  const Preset& p = find_preset("tiny");
  auto backend = make_cpu_backend({});
  const std::vector<float> one = draw(*backend, p.unet, p.scheduler, 1, 9, 5);
  for (int batch : {7, 64}) {
    const std::vector<float> other = draw(*backend, p.unet, p.scheduler, batch, 64, 5);
    for (size_t i = 0; i < one.size(); ++i) REQUIRE(std::abs(one[i] - other[i]) <= 2.0f / 255);
  }
}

TEST_CASE("generator: a slot's bits do not depend on its neighbours or on the run", "[generator]") {
  const Preset& p = find_preset("tiny");
  auto backend = make_cpu_backend({});
  const std::vector<float> a = draw(*backend, p.unet, p.scheduler, 8, 8, 5);
  // Giving packed weights back changes nothing.
  CHECK(a == draw(*backend, p.unet, p.scheduler, 8, 8, 5, 0, /*final_weights=*/true));
  CHECK(a == draw(*backend, p.unet, p.scheduler, 8, 8, 5));
  // Image 3 in another slot of an equal plan.
  const std::vector<float> shifted = draw(*backend, p.unet, p.scheduler, 8, 8, 5, 3);
  const ptrdiff_t image = 16 * 16 * 3;
  CHECK(std::equal(a.begin() + 3 * image, a.end(), shifted.begin()));
  CHECK(a != draw(*backend, p.unet, p.scheduler, 8, 8, 6));
}

TEST_CASE("generator: values that are not finite are an error, not an image", "[generator]") {
  const Preset& p = find_preset("tiny");
  auto backend = make_cpu_backend({});
  std::unique_ptr<ParamStore> store;
  Generator generator(*backend, p.unet, p.scheduler, {.kind = SamplerKind::kDdim, .steps = 2}, 1,
                      [&](const Params& params) {
                        store = std::make_unique<ParamStore>(*backend, params,
                                                             std::vector{Arena::kWeights});
                        return store->arenas();
                      });
  for (const CheckpointTensor& t : checkpoint_tensors(store->params()))
    store->write(Arena::kWeights, t,
                 std::vector<float>(static_cast<size_t>(t.count()), std::nanf("")));
  generator.weights_changed();
  CHECK_THROWS_WITH(generator.sample(0, 0, 1), Catch::Contains("not finite"));
}
