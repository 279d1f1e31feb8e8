// Whole networks against values made by PyTorch and diffusers in float64: output, gradients, twenty
// training steps, sampling chains. Three layouts: the paper's at a quarter of its width; a
// rectangle with two attention levels; class labels, several heads and groups that straddle a
// concatenation.
#include <catch2/catch.hpp>

#include <cmath>

#include "engine/executor.h"
#include "engine/optimizer.h"
#include "model/generator.h"
#include "model/objective.h"
#include "model/unet.h"
#include "tests/golden.h"

using namespace ddpm;
using test::Golden;
using test::relative_error;

namespace {

const std::vector<std::string> kCases{"cifar_small", "rectangle", "classes"};

Shape images(const UNetConfig& u, int n) {
  return {n, u.sample_height, u.sample_width, u.in_channels};
}

std::vector<int32_t> labels_of(const UNetConfig& u, int n, int shift) {
  std::vector<int32_t> labels(static_cast<size_t>(n));
  for (int i = 0; i < n; ++i) labels[static_cast<size_t>(i)] = (i + shift) % *u.num_class_embeds;
  return labels;
}

// A training graph on given batches.
struct Training {
  std::unique_ptr<ParamStore> store;
  std::unique_ptr<Executor> executor;
  TrainingBatch batch;

  Training(Backend& backend, const Golden& golden, int n, const AdamDesc* adam,
           ExecutorOptions options = {}) {
    Graph g(backend, Mode::kTraining);
    const Shape s = images(golden.unet, n);
    batch.x0 = g.persistent(s, DType::kF32, "x0");
    batch.noise = g.persistent(s, DType::kF32, "noise");
    batch.timestep = g.persistent({1, 1, 1, n}, DType::kI32, "timestep");
    if (golden.unet.num_class_embeds)
      batch.class_labels = g.persistent({1, 1, 1, n}, DType::kI32, "class_labels");
    add_objective(g, golden.unet, golden.scheduler, {}, batch);
    if (adam != nullptr) add_optimizer(g, *adam);
    store = std::make_unique<ParamStore>(
        backend, g.params(),
        std::vector{Arena::kWeights, Arena::kGradients, Arena::kM, Arena::kV, Arena::kEma});
    test::set_hash_weights(*store, {Arena::kWeights, Arena::kEma});
    executor = std::make_unique<Executor>(std::move(g), store->arenas(), options);
  }
};

Precision precision_of(bool fp32) { return fp32 ? Precision::kFp32 : Precision::kAuto; }

}  // namespace

TEST_CASE("unet: forward as diffusers", "[unet]") {
  for (const std::string& name : kCases) {
    const Golden golden(name);
    for (bool fp32 : {true, false}) {
      auto backend = make_cpu_backend({.precision = precision_of(fp32)});
      Graph g(*backend, Mode::kInference);
      const std::vector<int32_t> t = golden.indices("forward.timestep");
      const int n = static_cast<int>(t.size());
      const Shape s = images(golden.unet, n);
      UNetInputs in{.sample = g.persistent(s, DType::kF32, "sample"),
                    .timestep = g.persistent({1, 1, 1, n}, DType::kI32, "timestep")};
      if (golden.unet.num_class_embeds)
        in.class_labels = g.persistent({1, 1, 1, n}, DType::kI32, "class_labels");
      const Tensor y = build_unet(g, golden.unet, 1000, in);
      const Tensor kept = g.persistent(g.shape(y), DType::kF32, "y");
      g.add(backend->copy(g.shape(y).count(), DType::kF32, y, kept, Write::kOverwrite));
      ParamStore store(*backend, g.params(), {Arena::kWeights});
      test::set_hash_weights(store, {Arena::kWeights});
      Executor executor(std::move(g), store.arenas(), {.poison = true});
      executor.upload(in.sample, test::hash_input("forward.sample", s).data());
      executor.upload(in.timestep, t.data());
      if (in.class_labels)
        executor.upload(in.class_labels, golden.indices("forward.class_labels").data());
      executor.run(Phase::kSetup);
      executor.step();
      std::vector<float> out(static_cast<size_t>(s.count()));
      executor.download(out.data(), kept);
      // Direct convolution: fp32 rounding through some 60 layers. Winograd: its transforms too.
      INFO(name << (fp32 ? " fp32" : " auto"));
      CHECK(relative_error(out, golden.images("forward.model_output")) <= (fp32 ? 1e-5 : 5e-5));
    }
  }
}

TEST_CASE("unet: gradients as PyTorch", "[unet]") {
  for (const std::string& name : kCases) {
    const Golden golden(name);
    auto backend = make_cpu_backend({.precision = Precision::kFp32});
    const std::vector<int32_t> t = golden.indices("gradient.timestep");
    const int n = static_cast<int>(t.size());
    const Shape s = images(golden.unet, n);
    Training training(*backend, golden, n, nullptr, {.poison = true});
    Executor& executor = *training.executor;
    executor.upload(training.batch.x0, test::hash_input("gradient.x0", s).data());
    executor.upload(training.batch.noise, test::hash_input("gradient.noise", s).data());
    executor.upload(training.batch.timestep, t.data());
    if (training.batch.class_labels)
      executor.upload(training.batch.class_labels, golden.indices("gradient.class_labels").data());
    executor.step();
    INFO(name);
    CHECK(executor.state().loss == Approx(golden.values("gradient.loss")[0]).epsilon(1e-5));

    std::vector<CheckpointTensor> tensors = checkpoint_tensors(training.store->params());
    std::sort(tensors.begin(), tensors.end(),
              [](const auto& a, const auto& b) { return a.key < b.key; });
    const std::vector<float> norms = golden.values("gradient.norms");
    REQUIRE(norms.size() == tensors.size());
    double all = 0;
    for (float norm : norms) all += double{norm} * norm;
    all = std::sqrt(all);
    std::vector<float> whole;
    for (size_t k = 0; k < tensors.size(); ++k) {
      training.store->read(Arena::kGradients, tensors[k], whole);
      double norm = 0, difference = 0;
      for (float v : whole) norm += double{v} * v;
      norm = std::sqrt(norm);
      const std::vector<float> ours = golden.subsample(tensors[k].key, whole);
      const std::vector<float> theirs = golden.values("gradient.weight." + tensors[k].key);
      REQUIRE(ours.size() == theirs.size());
      for (size_t i = 0; i < ours.size(); ++i)
        difference += std::pow(double{ours[i]} - theirs[i], 2);
      difference = std::sqrt(difference * static_cast<double>(whole.size()) /
                             static_cast<double>(ours.size()));
      const double limit = 1e-4 * std::max<double>(norms[k], 0.01 * all);
      INFO(tensors[k].key);
      CHECK(difference <= limit);
      CHECK(std::abs(norm - norms[k]) <= limit);
    }
  }
}

TEST_CASE("unet: twenty steps of Adam, warm-up, clip and EMA as PyTorch", "[unet]") {
  for (const std::string& name : kCases) {
    const Golden golden(name);
    auto backend = make_cpu_backend({.precision = Precision::kFp32});
    const nlohmann::json& recipe = golden.train();
    AdamDesc adam;
    adam.learning_rate = recipe.at("learning_rate");
    adam.warmup_steps = recipe.at("warmup_steps");
    adam.grad_clip = recipe.at("grad_clip");
    adam.ema_decay = recipe.at("ema_decay");
    const int steps = recipe.at("steps"), n = recipe.at("batch_size");
    const Shape s = images(golden.unet, n);
    Training training(*backend, golden, n, &adam);
    Executor& executor = *training.executor;
    const std::vector<int32_t> t = golden.indices("train.timestep");
    const std::vector<float> losses = golden.values("train.loss");
    const std::vector<float> norms = golden.values("train.grad_norm");
    INFO(name);
    for (int step = 0; step < steps; ++step) {
      const std::string number = std::to_string(step);
      executor.upload(training.batch.x0, test::hash_input("train.x0." + number, s).data());
      executor.upload(training.batch.noise, test::hash_input("train.noise." + number, s).data());
      executor.upload(training.batch.timestep, t.data() + step * n);
      if (training.batch.class_labels)
        executor.upload(training.batch.class_labels, labels_of(golden.unet, n, step).data());
      executor.step();
      const StepState state = executor.state();
      CHECK(state.loss == Approx(losses[static_cast<size_t>(step)]).epsilon(1e-4));
      CHECK(state.grad_norm == Approx(norms[static_cast<size_t>(step)]).epsilon(1e-3));
    }
    const std::vector<CheckpointTensor> tensors = checkpoint_tensors(training.store->params());
    std::vector<float> whole;
    for (const auto& [arena, prefix] :
         {std::pair{Arena::kWeights, "train.weight."}, std::pair{Arena::kEma, "train.ema."}}) {
      std::vector<float> ours, theirs;
      for (const CheckpointTensor& c : tensors) {
        // A key's bias adds the same to all scores of a query: its gradient is rounding noise,
        // which Adam turns into steps of full size.
        if (c.key.ends_with("to_k.bias")) continue;
        training.store->read(arena, c, whole);
        const std::vector<float> a = golden.subsample(c.key, whole);
        const std::vector<float> b = golden.values(prefix + c.key);
        ours.insert(ours.end(), a.begin(), a.end());
        theirs.insert(theirs.end(), b.begin(), b.end());
      }
      INFO(prefix);
      CHECK(relative_error(ours, theirs) <= 1e-4);
    }
  }
}

TEST_CASE("unet: DDIM and DPM-Solver++ chains as diffusers", "[unet]") {
  const Golden golden("cifar_small");
  auto backend = make_cpu_backend({.precision = Precision::kFp32});
  SchedulerConfig short_schedule = golden.scheduler;
  short_schedule.beta_end = golden.short_beta_end();
  const std::vector<float> x_T = test::hash_input("sample.x_T", images(golden.unet, 2));
  const auto chain = [&](SamplerKind kind, const SchedulerConfig& scheduler) {
    std::unique_ptr<ParamStore> store;
    Generator generator(*backend, golden.unet, scheduler, {.kind = kind, .steps = 10}, 2,
                        [&](const Params& params) {
                          store = std::make_unique<ParamStore>(*backend, params,
                                                               std::vector{Arena::kWeights});
                          test::set_hash_weights(*store, {Arena::kWeights});
                          return store->arenas();
                        });
    generator.weights_changed();
    return generator.sample_from(x_T, 0, 0, 2);
  };
  // What is saved is clamped to [-1, 1]; so are the golden values here.
  const auto clamped = [&](const std::string& key) {
    std::vector<float> v = golden.images(key);
    for (float& x : v) x = std::clamp(x, -1.0f, 1.0f);
    return v;
  };
  CHECK(relative_error(chain(SamplerKind::kDdim, golden.scheduler), clamped("sample.ddim")) <=
        1e-4);
  CHECK(relative_error(chain(SamplerKind::kDpmpp2m, golden.scheduler), clamped("sample.dpmpp2m")) <=
        1e-4);
  CHECK(relative_error(chain(SamplerKind::kDpmpp2m, short_schedule),
                       clamped("sample.dpmpp2m_short")) <= 1e-4);
}
