// An image is a function of (weights, seed, its number), whatever batch it is drawn in.
#include <catch2/catch.hpp>

#include <algorithm>
#include <cmath>
#include <cstring>

#include "model/generator.h"
#include "model/presets.h"
#include "model/schedule.h"
#include "model/unet.h"
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

namespace {

// As build_sampling_graph(), but each step works the time projections out from each image's t.
SamplingGraph graph_without_table(Backend& backend, const UNetConfig& unet, int batch, int rows) {
  SamplingGraph s{Graph(backend, Mode::kInference), {}, {}, {}, {}, {}, {}};
  Graph& g = s.graph;
  const Shape shape{batch, unet.sample_height, unet.sample_width, unet.in_channels};
  s.x = g.persistent(shape, DType::kF32, "x");
  s.previous = g.persistent(shape, DType::kF32, "previous");
  s.rows = g.persistent_bytes(sizeof(SamplerRow) * static_cast<size_t>(rows), "rows");
  s.slots = g.persistent_bytes(sizeof(ChainSlot) * static_cast<size_t>(batch), "slots");
  g.add(backend.draw_start(shape, s.slots, g.state(), s.x), Phase::kStart);
  const Tensor t = g.tensor({1, 1, 1, batch}, DType::kI32);
  g.add(backend.sampler_timestep(batch, s.rows, s.slots, g.state(), t));
  const Tensor out = build_unet(g, unet, 1000, {.sample = s.x, .timestep = t});
  g.add(backend.sampler_update({shape}, s.rows, s.slots, out, s.x, s.previous, g.state()));
  g.add(backend.advance_state(g.state()));
  return s;
}

// A chain over the graph; memory that is not alive holds NaN.
std::vector<float> run_chain(Backend& backend, SamplingGraph s,
                             const std::vector<SamplerRow>& rows) {
  ParamStore store(backend, s.graph.params(), {Arena::kWeights});
  test::set_hash_weights(store, {Arena::kWeights});
  std::vector<float> images(static_cast<size_t>(s.graph.shape(s.x).count()));
  Executor executor(std::move(s.graph), store.arenas(), {.poison = true});
  executor.upload(s.rows, rows.data());
  std::vector<int32_t> timesteps;
  for (const SamplerRow& row : rows) timesteps.push_back(row.t);
  if (s.timesteps) executor.upload(s.timesteps, timesteps.data());
  std::vector<ChainSlot> slots;
  for (int i = 0; i < executor.graph().shape(s.x).n; ++i)
    slots.push_back(
        {.seed = 5, .image = static_cast<uint64_t>(i), .rows = static_cast<int32_t>(rows.size())});
  executor.upload(s.slots, slots.data());
  executor.run(Phase::kSetup);
  executor.run(Phase::kStart);
  for (size_t i = 0; i < rows.size(); ++i) executor.step();
  executor.download(images.data(), s.x);
  for (float& v : images) v = std::clamp(v, -1.0f, 1.0f);
  return images;
}

}  // namespace

TEST_CASE("generator: looking time projections up gives the images of working them out",
          "[generator]") {
  Preset p = find_preset("tiny");
  p.unet.sample_height = p.unet.sample_width = 8;
  auto backend = make_cpu_backend({.threads = 1});
  for (SamplerKind kind : {SamplerKind::kDdpm, SamplerKind::kDdim}) {
    const int steps = kind == SamplerKind::kDdpm ? 3 : 10;
    const std::vector<SamplerRow> rows =
        sampler_rows(Schedule(p.scheduler), p.scheduler, {.kind = kind, .steps = steps});
    for (int batch : {1, 8}) {
      const auto plain =
          run_chain(*backend, graph_without_table(*backend, p.unet, batch, steps), rows);
      const auto looked_up =
          run_chain(*backend, build_sampling_graph(*backend, p.unet, 1000, batch, steps), rows);
      double worst = 0;
      for (size_t i = 0; i < plain.size(); ++i)
        worst = std::max(worst, std::abs(double{plain[i]} - double{looked_up[i]}));
      INFO("batch " << batch << ", " << steps << " steps");
      CHECK(worst <= 1e-6);  // products of another number of rows are summed in another order
      if (kind == SamplerKind::kDdpm)
        CHECK(looked_up == draw(*backend, p.unet, p.scheduler, batch, batch, 5));
    }
  }
}

// A row without noise and clipping is affine in the network's output, so that guided images stand
// on the line through those of the class and those of none.
TEST_CASE("generator: guided images go on from those of no class through their own",
          "[generator]") {
  Preset p = find_preset("tiny");
  p.unet.sample_height = p.unet.sample_width = 8;
  p.unet.num_class_embeds = 4;
  p.unet.null_class = true;
  p.unet.out_channels = 6;
  p.scheduler.variance_type = VarianceType::kLearnedRange;
  auto backend = make_cpu_backend({.threads = 1});
  const std::vector<SamplerRow> rows =
      sampler_rows(Schedule(p.scheduler), p.scheduler,
                   {.kind = SamplerKind::kDdim, .timesteps = {700}, .clip = false});
  const auto drawn = [&](std::optional<float> guidance, std::vector<int32_t> labels,
                         float from_here = 0) {
    std::unique_ptr<ParamStore> store;
    Generator g(
        *backend, p.unet, 1000, rows, 3,
        [&](const Params& params) {
          store = std::make_unique<ParamStore>(*backend, params, std::vector{Arena::kWeights});
          test::set_hash_weights(*store, {Arena::kWeights});
          return store->arenas();
        },
        guidance);
    g.weights_changed();
    CHECK(g.shape().n == 3);
    CHECK(g.label_of(5) == 2);  // never none
    if (from_here != 0) g.set_guidance(from_here);
    g.begin(7, 1, labels.empty() ? nullptr : labels.data());
    g.executor().run(Phase::kStart);
    g.executor().steps(1, {});
    return g.latents(3);
  };
  const auto own = drawn({}, {2, 0, 1}), none = drawn({}, {3, 3, 3});
  CHECK(own != none);
  for (const float guidance : {0.0f, 0.5f, 1.0f, 4.0f}) {
    std::vector<float> line;
    for (size_t i = 0; i < own.size(); ++i) line.push_back(none[i] + guidance * (own[i] - none[i]));
    CHECK(test::relative_error(drawn(guidance, {2, 0, 1}), line) < 1e-5);
  }
  CHECK(drawn(4, {}) == drawn(4, {1, 2, 0}));  // by the images' numbers
  CHECK(drawn(2, {}, 4) == drawn(4, {}));
  p.unet.null_class = false;
  CHECK_THROWS_AS(drawn(2, {}), Error);
}

TEST_CASE("generator: new weights give new time projections", "[generator]") {
  const Preset& p = find_preset("tiny");
  auto backend = make_cpu_backend({.threads = 1});
  std::unique_ptr<ParamStore> store;
  Generator generator(*backend, p.unet, p.scheduler, {.kind = SamplerKind::kDdim, .steps = 2}, 2,
                      [&](const Params& params) {
                        store = std::make_unique<ParamStore>(*backend, params,
                                                             std::vector{Arena::kWeights});
                        test::set_hash_weights(*store, {Arena::kWeights});
                        return store->arenas();
                      });
  generator.weights_changed();
  const std::vector<float> first = generator.sample(1, 0, 2);
  std::vector<float> whole;
  for (const CheckpointTensor& t : checkpoint_tensors(store->params())) {
    if (t.key != "time_embedding.linear_2.weight") continue;
    store->read(Arena::kWeights, t, whole);
    for (float& v : whole) v = -v;
    store->write(Arena::kWeights, t, whole);
  }
  REQUIRE(!whole.empty());
  generator.weights_changed();
  CHECK(generator.sample(1, 0, 2) != first);
  for (const CheckpointTensor& t : checkpoint_tensors(store->params())) {
    if (t.key != "time_embedding.linear_2.weight") continue;
    for (float& v : whole) v = -v;
    store->write(Arena::kWeights, t, whole);
  }
  generator.weights_changed();
  CHECK(generator.sample(1, 0, 2) == first);
}
