// The C entry as a program that links libddpm.so sees it, against the classes behind it.
#include <catch2/catch.hpp>

#include <cmath>
#include <cstddef>
#include <cstdio>
#include <fstream>
#include <iterator>
#include <thread>

#include "engine/checkpoint.h"
#include "engine/shapes.h"
#include "model/ddpm.h"
#include "model/generator.h"
#include "model/pipeline.h"
#include "model/trainer.h"
#include "tests/c_api_support.h"
#include "tests/temp_folder.h"

using namespace ddpm;
using namespace test::c;
using test::Golden;

extern "C" int c99_forward(const char* folder, float* value);

namespace {

template <typename Open, typename... Arguments>
Session open(Open f, const Model& m, Arguments... arguments) {
  ddpm_session* s = nullptr;
  ok(f(m.get(), arguments..., &s));
  return Session(s);
}

ddpm_train_options train_options() {
  ddpm_train_options o{};
  o.struct_size = sizeof o;
  o.batch_size = 3;
  o.flip = 1;
  o.learning_rate = 1e-3f;
  o.warmup_steps = 2;
  o.grad_clip = 1;
  o.ema_decay = 0.9;
  o.seed = 7;
  return o;
}

Dataset images_of(const UNetConfig& u, int count) {
  return make_shapes(count, {1, u.sample_height, u.sample_width, u.in_channels});
}

Session open_training(const Model& m, const ddpm_train_options& o, const Dataset& data) {
  return open(ddpm_train_open, m, &o, data.images.data(), static_cast<const int32_t*>(nullptr),
              data.count);
}

std::vector<float> chain_by_generator(const std::string& folder, int steps, int batch,
                                      uint64_t seed, uint64_t first) {
  auto backend = make_cpu_backend({.threads = kThreads});
  const Pipeline p = open_pipeline(folder);
  std::unique_ptr<ParamStore> store;
  Generator generator(*backend, p.unet, p.scheduler, {.kind = SamplerKind::kDdpm, .steps = steps},
                      batch, [&](const Params& params) {
                        store = load_store(*backend, p, params);
                        return store->arenas();
                      });
  generator.weights_final();
  return generator.sample(seed, first, batch);
}

}  // namespace

TEST_CASE("c api: forward as diffusers", "[c_api]") {
  for (const char* name : {"cifar_small", "classes"}) {
    INFO(name);
    const Golden golden(name);
    const Model model = open_model(model_folder(name), "fp32");
    const std::vector<int32_t> t = golden.indices("forward.timestep");
    const int n = static_cast<int>(t.size());
    const Shape s{n, golden.unet.sample_height, golden.unet.sample_width, golden.unet.in_channels};
    const Session session = open(ddpm_forward_open, model, n);
    std::vector<int32_t> labels;
    if (golden.unet.num_class_embeds) labels = golden.indices("forward.class_labels");
    std::vector<float> sample = test::hash_input("forward.sample", s);
    sample.insert(sample.begin(), 0.0f);  // no alignment is asked for
    std::vector<float> output(sample.size(), -7.0f);
    ok(ddpm_forward(session.get(), sample.data() + 1, t.data(),
                    labels.empty() ? nullptr : labels.data(), output.data() + 1, nullptr));
    CHECK(output.front() == -7.0f);
    output.erase(output.begin());
    // Direct convolution: fp32 rounding through some 60 layers.
    CHECK(test::relative_error(output, golden.images("forward.model_output")) <= 1e-5);
    size_t bytes = 0;
    ok(ddpm_session_bytes(session.get(), &bytes));
    CHECK(bytes > output.size() * sizeof(float));
  }
}

TEST_CASE("c api: what a model is", "[c_api]") {
  const Golden golden("cifar_small");
  const Model model = open_model(model_folder("cifar_small"));
  ddpm_info info{};
  info.struct_size = sizeof info;
  ok(ddpm_get_info(model.get(), &info));
  CHECK(info.height == golden.unet.sample_height);
  CHECK(info.width == golden.unet.sample_width);
  CHECK(info.channels == 3);
  CHECK(info.output_channels == 3);
  CHECK(info.timesteps == 1000);
  CHECK(info.classes == 0);
  auto backend = make_cpu_backend({});
  const TrainingGraph t = build_training_graph(*backend, golden.unet, golden.scheduler, {}, 1);
  CHECK(info.parameters == t.graph.params().count());
  CHECK(info.multiply_adds == t.graph.macs());
  CHECK(info.null_label == -1);
  info.struct_size = offsetof(ddpm_info, null_label);  // of a program of an older header
  info.parameters = info.null_label = 7;
  ok(ddpm_get_info(model.get(), &info));
  CHECK(info.struct_size == offsetof(ddpm_info, null_label));
  CHECK(info.parameters == t.graph.params().count());
  CHECK(info.null_label == 7);
  info.struct_size = sizeof info;
  ok(ddpm_get_info(open_model(model_folder("small_guided")).get(), &info));
  CHECK(info.classes == 9);
  CHECK(info.null_label == 9);
}

TEST_CASE("c api: training is the trainer's, to the bit", "[c_api]") {
  const test::TempFolder tmp;
  const Golden golden("cifar_small");
  const std::string folder = model_folder("cifar_small");
  const Dataset data = images_of(golden.unet, 5);
  const ddpm_train_options o = train_options();

  auto backend = make_cpu_backend({.threads = kThreads});
  TrainerOptions options;
  options.batch_size = o.batch_size;
  options.flip = true;
  options.adam.learning_rate = o.learning_rate;
  options.adam.warmup_steps = o.warmup_steps;
  options.adam.grad_clip = o.grad_clip;
  options.adam.ema_decay = o.ema_decay;
  Trainer trainer(*backend, golden.unet, golden.scheduler, options, data);
  const SafetensorsReader weights(open_pipeline(folder).weights);
  load_weights(weights, trainer.store(), Arena::kWeights);
  load_weights(weights, trainer.store(), Arena::kEma);
  trainer.weights_changed();
  StepState start;
  start.seed = o.seed;
  trainer.set_state(start);

  const Model model = open_model(folder);
  const Session session = open_training(model, o, data);
  for (int i = 0; i < 4; ++i) trainer.step();
  ok(ddpm_train_steps(session.get(), 1, nullptr));
  ok(ddpm_train_steps(session.get(), 3, nullptr));
  ok(ddpm_wait(session.get()));
  ddpm_train_state state{};
  state.struct_size = sizeof state;
  ok(ddpm_train_get_state(session.get(), &state));
  const StepState expected = trainer.state();
  CHECK(state.step == 4);
  CHECK(state.nonfinite == 0);
  CHECK(state.loss == expected.loss);
  CHECK(state.loss_sum == expected.loss_sum);
  CHECK(state.grad_norm == expected.grad_norm);
  CHECK(state.learning_rate == expected.learning_rate);

  ok(ddpm_train_save(session.get(), (tmp / "ours").c_str()));
  save_checkpoint(
      tmp / "theirs", golden.unet, golden.scheduler, trainer.store(),
      {.step = 4, .seed = o.seed, .batch_size = o.batch_size, .numerics = backend->numerics()});
  CHECK(test::tree_of(tmp / "ours") == test::tree_of(tmp / "theirs"));
  open_model(tmp / "ours");
}

TEST_CASE("c api: sampling is the generator's, to the bit", "[c_api]") {
  const std::string folder = model_folder("cifar_small");
  constexpr int kSteps = 5, kBatch = 2;
  const std::vector<float> expected = chain_by_generator(folder, kSteps, kBatch, 11, 40);
  Model model = open_model(folder);
  const Session session = open(ddpm_sample_open, model, kBatch, "ddpm", kSteps, 0.0);
  model.reset();  // its sessions keep what they need
  int steps = 0;
  ok(ddpm_sample_chain(session.get(), &steps));
  CHECK(steps == kSteps);
  std::vector<float> x(expected.size());
  for (bool own : {false, true}) {
    ok(ddpm_sample_start(session.get(), 11, 40, own ? nullptr : x.data(), nullptr));
    if (own) {
      ok(ddpm_sample_steps(session.get(), kSteps, nullptr, nullptr));
      ok(ddpm_sample_steps(session.get(), 0, x.data(), nullptr));  // x goes in, and comes out again
      ok(ddpm_sample_start(session.get(), 11, 40, nullptr, nullptr));
      ok(ddpm_sample_steps(session.get(), kSteps - 1, nullptr, nullptr));
      std::vector<float> stale = x;
      CHECK(ddpm_sample_steps(session.get(), 2, x.data(), nullptr) == DDPM_USAGE);
      CHECK(x == stale);
      continue;
    }
    ok(ddpm_sample_steps(session.get(), 2, x.data(), nullptr));
    ok(ddpm_sample_steps(session.get(), kSteps - 2, x.data(), nullptr));
    ok(ddpm_wait(session.get()));
    for (float& v : x) v = std::min(std::max(v, -1.0f), 1.0f);
    CHECK(x == expected);
  }
}

TEST_CASE("c api: a value that is not finite is told by wait", "[c_api]") {
  const Golden golden("cifar_small");
  const Model model = open_model(model_folder("cifar_small"));
  const Session sampling = open(ddpm_sample_open, model, 1, "ddim", 3, 0.0);
  std::vector<float> x(static_cast<size_t>(golden.unet.sample_height) * golden.unet.sample_width *
                       3);
  ok(ddpm_sample_start(sampling.get(), 0, 0, x.data(), nullptr));
  x[5] = std::nanf("");
  ok(ddpm_sample_steps(sampling.get(), 1, x.data(), nullptr));
  CHECK(ddpm_wait(sampling.get()) == DDPM_NONFINITE);
  CHECK(std::string(ddpm_last_error()).find("step 0") != std::string::npos);

  ddpm_train_options o = train_options();
  o.learning_rate = 1e30f;
  o.warmup_steps = 0;
  const Session training = open_training(model, o, images_of(golden.unet, 3));
  ok(ddpm_train_steps(training.get(), 5, nullptr));
  CHECK(ddpm_wait(training.get()) == DDPM_NONFINITE);
  ddpm_train_state state{};
  state.struct_size = sizeof state;
  ok(ddpm_train_get_state(training.get(), &state));
  CHECK(state.nonfinite != 0);
  CHECK(state.step < 5);
}

TEST_CASE("c api: every bad argument is refused with its status", "[c_api]") {
  const test::TempFolder tmp;
  const Golden golden("cifar_small");
  const std::string folder = model_folder("cifar_small");
  const auto fails = [](ddpm_status status, ddpm_status expected, const char* part) {
    INFO(ddpm_last_error() << " / " << part);
    CHECK(status == expected);
    CHECK(std::string(ddpm_last_error()).find(part) != std::string::npos);
  };
  ddpm_model* none = nullptr;
  const auto opened = [&](const char* at, const char* device, const char* precision, int threads) {
    ddpm_model_options o{};
    o.struct_size = sizeof o;
    o.threads = threads;
    o.device = device;
    o.precision = precision;
    const ddpm_status status = ddpm_model_load(at, &o, &none);
    CHECK(none == nullptr);
    return status;
  };
  const char* f = folder.c_str();
  fails(opened(nullptr, "cpu", nullptr, 0), DDPM_USAGE, "folder is NULL");
  fails(ddpm_model_load(f, nullptr, nullptr), DDPM_USAGE, "model is NULL");
  fails(opened(f, "cup", nullptr, 0), DDPM_USAGE, "cup");
  fails(opened(f, "cpu", "fp8", 0), DDPM_USAGE, "fp8");
  fails(opened(f, "cpu", "bf16", 0), DDPM_USAGE, "bf16");
  fails(opened(f, "cpu", nullptr, -1), DDPM_USAGE, "threads");
  if (cuda_device_count() == 0) fails(opened(f, "cuda", nullptr, 0), DDPM_DEVICE, "");
  fails(opened((tmp / "nowhere").c_str(), "cpu", nullptr, 0), DDPM_CONFIG, "does not exist");
  fails(opened(tmp.path().c_str(), "cpu", nullptr, 0), DDPM_CONFIG, "no model");

  // A damaged header is found at once.
  std::filesystem::copy(folder, tmp / "damaged", std::filesystem::copy_options::recursive);
  test::put_bytes(tmp / "damaged/unet/diffusion_pytorch_model.safetensors", "not safetensors");
  fails(opened((tmp / "damaged").c_str(), "cpu", nullptr, 0), DDPM_FILE, "safetensors");
  ddpm_session* s = nullptr;

  const Model model = open_model(folder);
  ddpm_info info{};
  fails(ddpm_get_info(nullptr, &info), DDPM_USAGE, "model");
  fails(ddpm_get_info(model.get(), nullptr), DDPM_USAGE, "info");
  fails(ddpm_get_info(model.get(), &info), DDPM_USAGE, "struct_size");

  fails(ddpm_forward_open(nullptr, 1, &s), DDPM_USAGE, "model");
  fails(ddpm_forward_open(model.get(), 1, nullptr), DDPM_USAGE, "session");
  for (int batch : {0, -1, 65537})
    fails(ddpm_forward_open(model.get(), batch, &s), DDPM_USAGE, "batch_size");
  const Session forward = open(ddpm_forward_open, model, 1);
  std::vector<float> x(static_cast<size_t>(golden.unet.sample_height) * golden.unet.sample_width *
                       3);
  std::vector<float> y = x;
  int32_t t = 0;
  const auto call = [&](const float* sample, const int32_t* timestep, const int32_t* labels,
                        float* output, void* stream) {
    const ddpm_status status =
        ddpm_forward(forward.get(), sample, timestep, labels, output, stream);
    CHECK(y == std::vector<float>(y.size()));
    return status;
  };
  fails(ddpm_forward(nullptr, x.data(), &t, nullptr, y.data(), nullptr), DDPM_USAGE, "session");
  fails(call(nullptr, &t, nullptr, y.data(), nullptr), DDPM_USAGE, "sample");
  fails(call(x.data(), nullptr, nullptr, y.data(), nullptr), DDPM_USAGE, "timestep");
  fails(call(x.data(), &t, nullptr, nullptr, nullptr), DDPM_USAGE, "output");
  fails(call(x.data(), &t, &t, y.data(), nullptr), DDPM_USAGE, "no classes");
  fails(call(x.data(), &t, nullptr, y.data(), &t), DDPM_USAGE, "stream");
  for (int32_t bad : {-1, 1000}) {
    t = bad;
    fails(call(x.data(), &t, nullptr, y.data(), nullptr), DDPM_USAGE, "timestep");
  }
  fails(ddpm_train_steps(forward.get(), 1, nullptr), DDPM_USAGE, "ddpm_train_open");
  fails(ddpm_sample_steps(forward.get(), 1, nullptr, nullptr), DDPM_USAGE, "ddpm_sample_open");
  fails(ddpm_session_bytes(nullptr, nullptr), DDPM_USAGE, "session");
  fails(ddpm_session_bytes(forward.get(), nullptr), DDPM_USAGE, "bytes");
  fails(ddpm_wait(nullptr), DDPM_USAGE, "session");
  const Model classes = open_model(model_folder("classes"));
  const Session with_classes = open(ddpm_forward_open, classes, 1);
  t = 0;
  fails(ddpm_forward(with_classes.get(), x.data(), &t, nullptr, y.data(), nullptr), DDPM_USAGE,
        "has classes");
  int32_t label = 1000;
  fails(ddpm_forward(with_classes.get(), x.data(), &t, &label, y.data(), nullptr), DDPM_USAGE,
        "labels");

  const Dataset data = images_of(golden.unet, 2);
  const auto train = [&](const ddpm_train_options& o, int64_t count = 2) {
    return ddpm_train_open(model.get(), &o, data.images.data(), nullptr, count, &s);
  };
  const ddpm_train_options good = train_options();
  const auto with = [&](auto change) {
    ddpm_train_options o = good;
    change(o);
    return train(o);
  };
  fails(with([](auto& o) { o.struct_size = 4; }), DDPM_USAGE, "struct_size");
  fails(with([](auto& o) { o.batch_size = 0; }), DDPM_USAGE, "batch_size");
  fails(with([](auto& o) { o.flip = 2; }), DDPM_USAGE, "flip");
  fails(with([](auto& o) { o.learning_rate = 0; }), DDPM_USAGE, "learning_rate");
  fails(with([](auto& o) { o.learning_rate = std::nanf(""); }), DDPM_USAGE, "learning_rate");
  fails(with([](auto& o) { o.warmup_steps = -1; }), DDPM_USAGE, "warmup_steps");
  fails(with([](auto& o) { o.grad_clip = -1; }), DDPM_USAGE, "grad_clip");
  fails(with([](auto& o) { o.ema_decay = 1; }), DDPM_USAGE, "ema_decay");
  fails(train(good, 0), DDPM_USAGE, "count");
  fails(train(good, int64_t{1} << 31), DDPM_USAGE, "count");
  fails(ddpm_train_open(model.get(), nullptr, data.images.data(), nullptr, 2, &s), DDPM_USAGE,
        "options");
  fails(ddpm_train_open(model.get(), &good, nullptr, nullptr, 2, &s), DDPM_USAGE, "images");
  fails(ddpm_train_open(model.get(), &good, data.images.data(), &label, 2, &s), DDPM_USAGE,
        "labels");
  const int32_t beyond[2] = {0, 1000};
  const Golden other("classes");
  const Dataset labelled = images_of(other.unet, 2);
  fails(ddpm_train_open(classes.get(), &good, labelled.images.data(), nullptr, 2, &s), DDPM_USAGE,
        "labels");
  fails(ddpm_train_open(classes.get(), &good, labelled.images.data(), beyond, 2, &s), DDPM_USAGE,
        "labels: 1000");
  const Session training = open_training(model, good, data);
  ddpm_train_state state{};
  fails(ddpm_train_steps(training.get(), -1, nullptr), DDPM_USAGE, "steps");
  fails(ddpm_train_get_state(training.get(), nullptr), DDPM_USAGE, "state");
  fails(ddpm_train_get_state(training.get(), &state), DDPM_USAGE, "struct_size");
  fails(ddpm_train_save(training.get(), nullptr), DDPM_USAGE, "folder");
  fails(ddpm_train_save(training.get(), "/proc/nowhere/model"), DDPM_FILE, "/proc");

  fails(ddpm_sample_open(model.get(), 1, "euler", 3, 0, &s), DDPM_USAGE, "euler");
  fails(ddpm_sample_open(model.get(), 1, nullptr, 3, 0, &s), DDPM_USAGE, "sampler");
  fails(ddpm_sample_open(model.get(), 1, "ddpm", -3, 0, &s), DDPM_USAGE, "steps");
  fails(ddpm_sample_open(model.get(), 1, "ddpm", 1001, 0, &s), DDPM_USAGE, "steps");
  fails(ddpm_sample_open(model.get(), 1, "ddpm", 3, 0.5, &s), DDPM_USAGE, "eta");
  CHECK(s == nullptr);
  const Session sampling = open(ddpm_sample_open, model, 1, "ddpm", 3, 0.0);
  fails(ddpm_sample_steps(sampling.get(), 1, nullptr, nullptr), DDPM_USAGE, "ddpm_sample_start");
  fails(ddpm_sample_chain(sampling.get(), nullptr), DDPM_USAGE, "steps");
  ok(ddpm_sample_start(sampling.get(), 0, 0, nullptr, nullptr));
  fails(ddpm_sample_steps(sampling.get(), 4, nullptr, nullptr), DDPM_USAGE, "3 are left");
  fails(ddpm_sample_steps(sampling.get(), -1, nullptr, nullptr), DDPM_USAGE, "left");
  ddpm_model_destroy(nullptr);
  ddpm_session_destroy(nullptr);
}

TEST_CASE("c api: threads take turns and have their own errors", "[c_api]") {
  const std::string folder = model_folder("cifar_small");
  const std::vector<float> expected = chain_by_generator(folder, 3, 1, 3, 0);
  const Model model = open_model(folder);
  std::vector<std::vector<float>> images(2, std::vector<float>(expected.size()));
  std::vector<std::string> errors(2);
  std::vector<std::thread> threads;
  CHECK(ddpm_wait(nullptr) == DDPM_USAGE);
  for (size_t i = 0; i < 2; ++i)
    threads.emplace_back([&, i] {
      errors[i] = ddpm_last_error();
      ddpm_session* s = nullptr;
      if (ddpm_sample_open(model.get(), 1, "ddpm", 3, 0, &s) != DDPM_OK) return;
      ddpm_sample_start(s, 3, 0, images[i].data(), nullptr);
      for (int k = 0; k < 3; ++k) ddpm_sample_steps(s, 1, images[i].data(), nullptr);
      ddpm_session_destroy(s);
    });
  for (std::thread& t : threads) t.join();
  for (size_t i = 0; i < 2; ++i) {
    CHECK(errors[i].empty());
    for (float& v : images[i]) v = std::min(std::max(v, -1.0f), 1.0f);
    CHECK(images[i] == expected);
  }
}

TEST_CASE("c api: a C program can use it", "[c_api]") {
  float value = 1e9f;
  CHECK(c99_forward(model_folder("cifar_small").c_str(), &value) == DDPM_OK);
  CHECK(std::abs(value) < 100);
  CHECK(c99_forward("/nowhere", &value) == DDPM_CONFIG);
}

// Added to at the end, never changed, until the SONAME changes.
TEST_CASE("c api: functions and structs are those that are written down", "[c_api]") {
  FILE* pipe = popen("nm -D --defined-only " DDPM_C_LIBRARY, "r");
  REQUIRE(pipe != nullptr);
  std::string found;
  char line[4096], name[2048];
  while (std::fgets(line, sizeof line, pipe) != nullptr) {
    REQUIRE(std::sscanf(line, "%*s %*s %2047s", name) == 1);
    found += std::string(name) + "\n";
  }
  CHECK(pclose(pipe) == 0);
  const auto size = [&](const char* type, size_t bytes, size_t last) {
    found += format("%s %zu, last field at %zu\n", type, bytes, last);
  };
#define SIZE(type, last) size(#type, sizeof(type), offsetof(type, last))
  SIZE(ddpm_model_options, release);
  SIZE(ddpm_model_files, weights_size);
  SIZE(ddpm_info, null_label);
  SIZE(ddpm_sampler_options, guidance);
  SIZE(ddpm_sampler_info, device_bytes);
  SIZE(ddpm_sample_task, guidance);
  SIZE(ddpm_pool_options, guidance);
  SIZE(ddpm_pool_request, on_device);
  SIZE(ddpm_pool_info, device_bytes);
  SIZE(ddpm_train_options, seed);
  SIZE(ddpm_train_state, learning_rate);
#undef SIZE
  std::ifstream file(DDPM_SOURCE_DIR "/tests/c_abi.txt");
  const std::string expected{std::istreambuf_iterator<char>(file), {}};
  CHECK(found == expected);
}
