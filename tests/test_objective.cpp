// What a network is trained to put out, and by what, for each prediction type, variance and loss.
#include "model/objective.h"

#include <catch2/catch.hpp>
#include <cmath>

#include "engine/executor.h"
#include "engine/param_store.h"
#include "model/presets.h"
#include "model/schedule.h"
#include "tests/reference/diffusion_loss.h"
#include "tests/support.h"

using namespace ddpm;
using test::random_values;

namespace {

constexpr PredictionType kPredictions[] = {PredictionType::kEpsilon, PredictionType::kSample,
                                           PredictionType::kVPrediction,
                                           PredictionType::kPreviousMean};

// A fresh network puts out zeros: its loss is that of saying nothing.
void check_first_loss(Backend& backend, const SchedulerConfig& config, LossKind loss) {
  UNetConfig u = find_preset("tiny").unet;
  u.sample_height = u.sample_width = 8;
  u.block_out_channels = {8, 8, 8};
  if (is_learned(config.variance_type)) u.out_channels = 6;
  const Schedule schedule(config);
  const std::vector<int32_t> t{0, 17, 400, 999};
  const int n = static_cast<int>(t.size());
  const Shape s{n, u.sample_height, u.sample_width, u.in_channels};
  auto x0 = random_values(s.count(), 1);
  for (float& v : x0) v = std::round((v + 1) * 127.5f) / 127.5f - 1;
  const auto noise = random_values(s.count(), 2);

  Graph g(backend, Mode::kTraining);
  const TrainingBatch batch{.x0 = g.persistent(s, DType::kF32, "x0"),
                            .timestep = g.persistent({1, 1, 1, n}, DType::kI32, "timestep"),
                            .noise = g.persistent(s, DType::kF32, "noise")};
  const Objective objective = add_objective(g, u, config, {.loss = loss}, batch);
  CHECK_FALSE(objective.loss_history);
  ParamStore store(backend, g.params(), {Arena::kWeights, Arena::kGradients});
  store.initialize(0);
  Executor executor(std::move(g), store.arenas(), {.poison = true});
  executor.upload(batch.x0, x0.data());
  executor.upload(batch.noise, noise.data());
  executor.upload(batch.timestep, t.data());
  executor.step();

  double expected = 0;
  const auto size = static_cast<size_t>(s.count() / n);
  for (size_t i = 0; i < t.size(); ++i) {
    const auto part = [&](const std::vector<float>& v) {
      const auto begin = v.begin() + static_cast<std::ptrdiff_t>(i * size);
      return std::vector<double>(begin, begin + static_cast<std::ptrdiff_t>(size));
    };
    const ref::TrainedImage image{schedule, config, loss, part(x0), part(noise), t[i]};
    for (size_t k = 0; k < size; ++k)
      expected += static_cast<double>(ref::element_loss(image, k, 0, 0, 0)) /
                  static_cast<double>(size * t.size());
  }
  INFO(name_of(config.prediction_type)
       << " " << name_of(config.variance_type) << " loss " << static_cast<int>(loss));
  CHECK(executor.state().loss == Approx(expected).epsilon(2e-4));
  double norm = 0;
  for (const float d : store.read(Arena::kGradients)) norm += double{d} * d;
  CHECK(norm > 0);
  CHECK(std::isfinite(norm));
}

}  // namespace

TEST_CASE("objective: the first loss of each prediction, variance and loss", "[objective]") {
  auto backend = make_cpu_backend({.threads = 1});
  using V = VarianceType;
  const std::pair<V, LossKind> legal[] = {
      {V::kFixedLarge, LossKind::kSimple}, {V::kFixedSmall, LossKind::kSimple},
      {V::kFixedLarge, LossKind::kKl},     {V::kFixedSmall, LossKind::kKl},
      {V::kLearnedRange, LossKind::kKl},   {V::kLearnedRange, LossKind::kHybrid}};
  for (const PredictionType prediction : kPredictions)
    for (const auto& [variance, loss] : legal)
      check_first_loss(*backend, {.prediction_type = prediction, .variance_type = variance}, loss);
  // A log-variance of 0 is far from the true one: t = 0 is at the decoder's floor or near it.
  check_first_loss(*backend, {.variance_type = V::kLearned}, LossKind::kKl);
  CHECK(usual_loss(V::kFixedLarge) == LossKind::kSimple);
  CHECK(usual_loss(V::kLearned) == LossKind::kKl);
  CHECK(usual_loss(V::kLearnedRange) == LossKind::kHybrid);
}
