// What a network is trained to put out, for each prediction type.
#include "model/objective.h"

#include <catch2/catch.hpp>
#include <cmath>

#include "engine/executor.h"
#include "engine/param_store.h"
#include "model/presets.h"
#include "tests/support.h"

using namespace ddpm;
using test::random_values;

// A fresh network puts out zeros, so its loss is the mean square of the target alone.
TEST_CASE("objective: the target of each prediction type", "[objective]") {
  auto backend = make_cpu_backend({});
  const UNetConfig& u = find_preset("tiny").unet;
  const SchedulerConfig& c = find_preset("tiny").scheduler;
  const Schedule schedule(c);
  const std::vector<int32_t> t{0, 17, 400, 999};
  const int n = static_cast<int>(t.size());
  const Shape s{n, u.sample_height, u.sample_width, u.in_channels};
  const auto x0 = random_values(s.count(), 1), noise = random_values(s.count(), 2);

  for (const PredictionType type :
       {PredictionType::kEpsilon, PredictionType::kSample, PredictionType::kVPrediction}) {
    Graph g(*backend, Mode::kTraining);
    const TrainingBatch batch{.x0 = g.persistent(s, DType::kF32, "x0"),
                              .timestep = g.persistent({1, 1, 1, n}, DType::kI32, "timestep"),
                              .noise = g.persistent(s, DType::kF32, "noise")};
    add_objective(g, u, type, schedule, batch);
    ParamStore store(*backend, g.params(), {Arena::kWeights, Arena::kGradients});
    store.initialize(0);
    Executor executor(std::move(g), store.arenas(), {.poison = true});
    executor.upload(batch.x0, x0.data());
    executor.upload(batch.noise, noise.data());
    executor.upload(batch.timestep, t.data());
    executor.step();

    double sum = 0;
    for (size_t i = 0; i < x0.size(); ++i) {
      const double ab = schedule.alpha_bar(t[i / static_cast<size_t>(s.h * s.w * s.c)]);
      const double target = type == PredictionType::kEpsilon ? noise[i]
                            : type == PredictionType::kSample
                                ? x0[i]
                                : std::sqrt(ab) * noise[i] - std::sqrt(1 - ab) * x0[i];
      sum += target * target;
    }
    INFO(name_of(type));
    CHECK(executor.state().loss == Approx(sum / static_cast<double>(x0.size())).epsilon(1e-5));
  }
}
