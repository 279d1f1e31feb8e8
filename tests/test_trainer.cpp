// Training is a function of its configuration: repeated, resumed or poisoned it gives the same
// bits.
#include <catch2/catch.hpp>

#include <array>
#include <cmath>
#include <filesystem>
#include <limits>

#include "engine/shapes.h"
#include "model/pipeline.h"
#include "model/presets.h"
#include "model/trainer.h"
#include "tests/support.h"
#include "tests/temp_folder.h"

using namespace ddpm;

namespace {

UNetConfig small_unet() {
  UNetConfig u = find_preset("tiny").unet;
  u.sample_height = u.sample_width = 8;
  u.block_out_channels = {16, 32, 32};
  u.dropout = 0.1;
  u.num_class_embeds = 3;
  return u;
}

// For tests of many steps.
UNetConfig smaller_unet(int out_channels = 3) {
  UNetConfig u = small_unet();
  u.block_out_channels = {8, 8, 8};
  u.out_channels = out_channels;
  return u;
}

TrainerOptions small_options(bool poison = false) {
  TrainerOptions o;
  o.batch_size = 5;
  o.flip = true;
  o.adam.learning_rate = 1e-3f;
  o.adam.warmup_steps = 3;
  o.adam.ema_decay = 0.9f;
  o.executor.poison = poison;
  return o;
}

std::unique_ptr<Trainer> make(Backend& backend, bool poison = false) {
  auto trainer = std::make_unique<Trainer>(backend, small_unet(), SchedulerConfig{},
                                           small_options(poison), make_shapes(13, {1, 8, 8, 3}));
  trainer->initialize(42);
  return trainer;
}

// Everything a run is, as one list of values.
std::vector<float> contents(const Trainer& trainer) {
  std::vector<float> all, part;
  for (Arena a : {Arena::kWeights, Arena::kM, Arena::kV, Arena::kEma})
    for (const CheckpointTensor& t : checkpoint_tensors(trainer.store().params())) {
      trainer.store().read(a, t, part);
      all.insert(all.end(), part.begin(), part.end());
    }
  return all;
}

void steps(Trainer& trainer, int count) {
  for (int i = 0; i < count; ++i) trainer.step();
}

void save(const Trainer& trainer, const Backend& backend, const std::string& folder) {
  save_checkpoint(
      folder, small_unet(), {}, trainer.store(),
      {.step = trainer.state().step, .seed = 42, .batch_size = 5, .numerics = backend.numerics()});
}

}  // namespace

TEST_CASE("trainer: the loss falls, and two runs are the same bits", "[trainer]") {
  auto backend = make_cpu_backend({});
  auto a = make(*backend), b = make(*backend), poisoned = make(*backend, true);
  const std::vector<float> start = contents(*a);
  a->step();
  const float first_loss = a->state().loss;
  CHECK(first_loss == Approx(1).margin(0.15));
  CHECK(contents(*a) != start);
  steps(*a, 7);
  CHECK(a->state().step == 8);
  CHECK(a->state().nonfinite == 0);
  steps(*b, 8);
  CHECK(contents(*b) == contents(*a));
  // Memory that is not alive holds NaN: nothing reads what nobody wrote.
  steps(*poisoned, 8);
  CHECK(contents(*poisoned) == contents(*a));
  steps(*a, 150);
  const double before = a->state().loss_sum;
  steps(*a, 50);
  CHECK((a->state().loss_sum - before) / 50 < 0.7);
}

// Gradients of the parts add up in another order: 5 roundings of values near each other's size. The
// first moment of the first step is a tenth of the clipped gradient.
TEST_CASE("trainer: a batch in parts is the batch, to rounding", "[trainer]") {
  auto backend = make_cpu_backend({});
  const auto trained = [&](int total, bool poison) {
    TrainerOptions o = small_options(poison);
    o.batch_size = 12;
    o.parts = {.total = total, .own = total};
    auto trainer = std::make_unique<Trainer>(*backend, small_unet(), SchedulerConfig{}, o,
                                             make_shapes(13, {1, 8, 8, 3}));
    trainer->initialize(42);
    steps(*trainer, 2);
    return trainer;
  };
  const auto whole = trained(1, false);
  const auto b = whole->take_loss_by_timestep();
  for (int total : {2, 3, 4, 6, 12}) {
    const auto parts = trained(total, false), poisoned = trained(total, true);
    INFO(total << " parts");
    CHECK(test::relative_error(parts->store().read(Arena::kM), whole->store().read(Arena::kM)) <
          2e-6);
    CHECK(parts->state().loss == Approx(whole->state().loss).epsilon(1e-6));
    CHECK(parts->state().grad_norm == Approx(whole->state().grad_norm).epsilon(1e-5));
    CHECK(parts->state().step == 2);
    CHECK(contents(*poisoned) == contents(*parts));
    const auto a = parts->take_loss_by_timestep();
    for (size_t i = 0; i < a.size(); ++i) {
      CHECK(std::isnan(a[i]) == std::isnan(b[i]));
      if (!std::isnan(a[i])) CHECK(a[i] == Approx(b[i]).epsilon(1e-6));
    }
  }
}

TEST_CASE("trainer: the loss by timestep is the loss, spread over its buckets", "[trainer]") {
  auto backend = make_cpu_backend({});
  auto trainer = make(*backend);
  steps(*trainer, 1);
  // Five images in ten buckets: some are empty, and the means of the others average to the loss.
  const std::vector<double> first = trainer->take_loss_by_timestep();
  REQUIRE(first.size() == 10);
  CHECK(std::count_if(first.begin(), first.end(), [](double m) { return std::isnan(m); }) >= 5);
  std::array<int, 10> images{};
  for (uint64_t i = 0; i < 5; ++i) {
    const RandomStream stream{.seed = 42, .purpose = Purpose::kTimestep, .sample = i};
    ++images[uniform_below(stream.block(0)[0], 1000) / 100];
  }
  double sum = 0;
  for (size_t b = 0; b < 10; ++b) {
    CHECK(std::isnan(first[b]) == (images[b] == 0));
    if (images[b] > 0) sum += first[b] * images[b];
  }
  CHECK(sum / 5 == Approx(trainer->state().loss).epsilon(1e-6));
  for (double mean : trainer->take_loss_by_timestep()) CHECK(std::isnan(mean));
  steps(*trainer, 40);
  for (double mean : trainer->take_loss_by_timestep()) CHECK(mean > 0);
}

TEST_CASE("trainer: saved and resumed at every step of an epoch it is the unbroken run",
          "[trainer]") {
  const test::TempFolder tmp;
  auto backend = make_cpu_backend({});
  auto unbroken = make(*backend);
  steps(*unbroken, 7);
  for (int at = 0; at < 7; at += 2) {
    const std::string folder = tmp / "step";
    auto first = make(*backend);
    steps(*first, at);
    save(*first, *backend, folder);
    auto second = make(*backend);
    steps(*second, 3);  // whatever it held before
    const Manifest m = load_checkpoint(folder, second->store());
    second->weights_changed();
    CHECK(m.step == static_cast<uint64_t>(at));
    CHECK(m.numerics == backend->numerics());
    StepState state;
    state.seed = m.seed;
    state.step = m.step;
    second->set_state(state);
    steps(*second, 7 - at);
    CHECK(contents(*second) == contents(*unbroken));
  }
}

namespace {

// Of few timesteps, so that their losses are soon known.
std::unique_ptr<Trainer> make_by_loss(Backend& backend, bool poison = false) {
  TrainerOptions o = small_options(poison);
  o.objective = {LossKind::kKl, Timesteps::kLossSecondMoment};
  auto trainer =
      std::make_unique<Trainer>(backend, small_unet(), SchedulerConfig{.num_train_timesteps = 4}, o,
                                make_shapes(13, {1, 8, 8, 3}));
  trainer->initialize(42);
  return trainer;
}

}  // namespace

TEST_CASE("trainer: timesteps by their losses, saved and resumed, are the unbroken run",
          "[trainer]") {
  const test::TempFolder tmp;
  auto backend = make_cpu_backend({.threads = 1});
  auto unbroken = make_by_loss(*backend), poisoned = make_by_loss(*backend, true);
  constexpr int kSteps = 24;
  steps(*poisoned, kSteps);
  for (const int at : {0, 3, 20}) {
    steps(*unbroken, at - static_cast<int>(unbroken->state().step));
    const std::string folder = tmp / "step";
    Manifest m{.step = static_cast<uint64_t>(at), .seed = 42, .batch_size = 5};
    m.loss_history = unbroken->loss_history();
    REQUIRE(m.loss_history.size() == 4 * kLossHistoryRow);
    save_checkpoint(folder, smaller_unet(), {}, unbroken->store(), m);
    auto second = make_by_loss(*backend);
    steps(*second, 2);
    m = load_checkpoint(folder, second->store());
    CHECK(m.loss_history == unbroken->loss_history());
    second->weights_changed();
    second->set_loss_history(m.loss_history);
    second->set_state({.seed = m.seed, .step = m.step});
    steps(*second, kSteps - at);
    CHECK(contents(*second) == contents(*poisoned));
    CHECK(second->loss_history() == poisoned->loss_history());
  }
  // By then all are known: the least count is that of losses kept.
  const std::vector<float> history = unbroken->loss_history();
  for (size_t t = 0; t < 4; ++t) CHECK(history[t * kLossHistoryRow + kLossHistory] >= kLossHistory);
  // Another number of timesteps, a file that is none, and a run that draws uniformly.
  CHECK_THROWS_AS(unbroken->set_loss_history(std::vector<float>(5 * kLossHistoryRow)), Error);
  CHECK(make(*backend)->loss_history().empty());
  for (const float bad : {-1.0f, 20.0f, 2.5f, std::numeric_limits<float>::quiet_NaN()}) {
    Manifest m{.step = 1, .seed = 42, .batch_size = 5};
    m.loss_history = history;
    m.loss_history[kLossHistory] = bad;
    save_checkpoint(tmp / "bad", smaller_unet(), {}, unbroken->store(), m);
    CHECK_THROWS_WITH(load_checkpoint(tmp / "bad", unbroken->store()),
                      Catch::Contains("loss_history"));
  }
}

// Over the same images, timesteps and noise as a run that learns nothing. Few timesteps with much
// noise: the terms of a long chain differ by orders of magnitude.
TEST_CASE("trainer: every loss falls", "[trainer]") {
  auto backend = make_cpu_backend({.threads = 1});
  using P = PredictionType;
  using V = VarianceType;
  const std::pair<V, LossKind> kinds[] = {{V::kFixedLarge, LossKind::kKl},
                                          {V::kLearned, LossKind::kKl},
                                          {V::kLearnedRange, LossKind::kKl},
                                          {V::kLearnedRange, LossKind::kHybrid},
                                          {V::kFixedSmall, LossKind::kSimple}};
  for (const P prediction : {P::kEpsilon, P::kSample, P::kVPrediction, P::kPreviousMean})
    for (const auto& [variance, loss] : kinds) {
      const auto late_loss = [&, variance = variance, loss = loss](float rate) {
        TrainerOptions o = small_options();
        o.objective.loss = loss;
        o.adam.learning_rate = rate;
        Trainer trainer(*backend, smaller_unet(is_learned(variance) ? 6 : 3),
                        {.num_train_timesteps = 4,
                         .beta_start = 0.1,
                         .beta_end = 0.5,
                         .prediction_type = prediction,
                         .variance_type = variance},
                        o, make_shapes(13, {1, 8, 8, 3}));
        trainer.initialize(42);
        steps(trainer, 30);
        const double before = trainer.state().loss_sum;
        steps(trainer, 15);
        CHECK(trainer.state().nonfinite == 0);
        return trainer.state().loss_sum - before;
      };
      INFO(name_of(prediction) << " " << name_of(variance) << " " << static_cast<int>(loss));
      CHECK(late_loss(5e-3f) < 0.97 * late_loss(0));
    }
}

TEST_CASE("checkpoint: equal state gives equal bytes, and a flipped bit is found", "[trainer]") {
  const test::TempFolder tmp;
  auto backend = make_cpu_backend({});
  auto trainer = make(*backend);
  steps(*trainer, 2);
  save(*trainer, *backend, tmp / "a");
  save(*trainer, *backend, tmp / "b");
  for (const char* file : {"unet/diffusion_pytorch_model.safetensors", "unet/config.json",
                           "training_state.safetensors", "manifest.json", "model_index.json",
                           "scheduler/scheduler_config.json"}) {
    INFO(file);
    CHECK(test::get_bytes(tmp / "a/" + file) == test::get_bytes(tmp / "b/" + file));
  }
  for (const char* file :
       {"unet/diffusion_pytorch_model.safetensors", "training_state.safetensors"}) {
    const std::string path = tmp / "b/" + file;
    std::string bytes = test::get_bytes(path);
    const std::string good = bytes;
    bytes[bytes.size() - 1000] = static_cast<char>(bytes[bytes.size() - 1000] ^ 4);
    test::put_bytes(path, bytes);
    CHECK_THROWS_WITH(load_checkpoint(tmp / "b", trainer->store()), Catch::Contains("checksum"));
    test::put_bytes(path, good);
  }
  CHECK_NOTHROW(load_checkpoint(tmp / "b", trainer->store()));
}

TEST_CASE("trainer: a step that is not finite changes nothing and is named", "[trainer]") {
  auto backend = make_cpu_backend({});
  auto trainer = make(*backend);
  steps(*trainer, 2);
  const std::vector<CheckpointTensor> tensors = checkpoint_tensors(trainer->store().params());
  const auto conv = std::find_if(tensors.begin(), tensors.end(), [](const CheckpointTensor& t) {
    return t.key == "mid_block.resnets.1.conv2.weight";
  });
  REQUIRE(conv != tensors.end());
  std::vector<float> values;
  trainer->store().read(Arena::kWeights, *conv, values);
  const std::vector<float> good = values;
  values[7] = std::numeric_limits<float>::infinity();
  trainer->store().write(Arena::kWeights, *conv, values);
  const std::vector<float> before = contents(*trainer);
  steps(*trainer, 3);
  const StepState state = trainer->state();
  CHECK(state.nonfinite != 0);
  CHECK(state.bad_step == 2);
  CHECK(state.step == 2);
  CHECK(contents(*trainer) == before);
  StepState again = state;
  again.nonfinite = 0;
  trainer->set_state(again);
  CHECK(trainer->executor().step_checked().starts_with("mid_block.resnets.1.conv2:conv_"));
}

TEST_CASE("trainer: every image once per epoch", "[trainer]") {
  // 13 images in batches of 5: positions 0..64 are five epochs, whatever step they fall in.
  for (uint32_t epoch = 0; epoch < 5; ++epoch) {
    std::vector<int> seen(13, 0);
    for (uint64_t p = 0; p < 13; ++p) ++seen[permute(p, 13, 42, epoch)];
    CHECK(std::all_of(seen.begin(), seen.end(), [](int count) { return count == 1; }));
  }
}

TEST_CASE("trainer: too little memory says what is needed, what is free and what would fit",
          "[trainer]") {
  TrainerOptions o = small_options();
  o.batch_size = 64;
  const auto make_with = [&](size_t budget) {
    auto backend = make_cpu_backend({.memory_budget = budget});
    return Trainer(*backend, small_unet(), SchedulerConfig{}, o, make_shapes(70, {1, 8, 8, 3}))
        .bytes();
  };
  // What a batch of 8 takes is too little for 64; it depends on the machine's vectors.
  o.batch_size = 8;
  const size_t budget = make_with(size_t{64} << 20);
  o.batch_size = 64;
  CHECK_NOTHROW(make_with(size_t{64} << 20));
  try {
    make_with(budget);
    FAIL("it fitted");
  } catch (const Error& e) {
    CHECK(e.status() == Status::kMemory);
    const std::string text = e.what();
    INFO(text);
    const size_t at = text.find("--batch-size ");
    REQUIRE(at != std::string::npos);
    o.batch_size = std::stoi(text.substr(at + 13));
    CHECK(o.batch_size < 64);
    CHECK(o.batch_size > 0);
    CHECK_NOTHROW(make_with(budget));  // the advice holds
  }
  CHECK_THROWS_WITH(make_with(size_t{1} << 20), Catch::Contains("no batch fits"));
}
