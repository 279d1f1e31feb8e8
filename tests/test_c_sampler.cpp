// Samplers of the C entry against the generator behind them.
#include <catch2/catch.hpp>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstddef>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iterator>
#include <limits>
#include <thread>

#include "model/generator.h"
#include "tests/c_api_support.h"

using namespace ddpm;
using namespace test::c;

namespace {

constexpr size_t kImage = 8 * 8 * 3;
constexpr int kSteps = 5;
using Bytes = std::vector<uint8_t>;
using Floats = std::vector<float>;

ddpm_sampler_options options(int batch = 2, const char* sampler = nullptr) {
  ddpm_sampler_options o{};
  o.struct_size = sizeof o;
  o.batch_size = batch;
  o.steps = kSteps;
  o.sampler = sampler;
  return o;
}

Sampler create(const Model& m, const ddpm_sampler_options& o) {
  ddpm_sampler* s = nullptr;
  ok(ddpm_sampler_create(m.get(), &o, &s));
  return Sampler(s);
}

ddpm_sample_task task(size_t n) {
  ddpm_sample_task t{};
  t.struct_size = sizeof t;
  t.seed = 3;
  t.n = n;
  return t;
}

// In batches as a sampler makes them: bits depend on the batch.
Floats by_generator(const std::string& folder, SamplerOptions o, uint64_t first, int n, int batch,
                    const Floats* x_T = nullptr, std::optional<float> guidance = {}) {
  auto backend = make_cpu_backend({.threads = kThreads});
  const Pipeline p = open_pipeline(folder);
  std::unique_ptr<ParamStore> store;
  const auto load = [&](const Params& params) {
    store = load_store(*backend, p, params);
    return store->arenas();
  };
  Generator generator(*backend, p.unet, p.scheduler.num_train_timesteps,
                      sampler_rows(Schedule(p.scheduler), p.scheduler, o), batch, load, guidance);
  generator.weights_final();
  if (x_T != nullptr) return generator.sample_from(*x_T, 3, first, n);
  Floats all;
  for (int done = 0; done < n; done += batch) {
    const Floats part =
        generator.sample(3, first + static_cast<uint64_t>(done), std::min(batch, n - done));
    all.insert(all.end(), part.begin(), part.end());
  }
  return all;
}

Bytes to_bytes(const Floats& images) {
  Bytes out;
  for (float x : images)
    out.push_back(
        static_cast<uint8_t>(std::floor(std::clamp((x + 1.0f) * 127.5f, 0.0f, 255.0f) + 0.5f)));
  return out;
}

std::string contents(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), {}};
}

// What stops a chain, and where; user pointer of the callbacks.
struct Watch {
  ddpm_sampler* cancel = nullptr;
  int at = -1;                    // the step to stop at
  ddpm_sampler* again = nullptr;  // a call within a call
  ddpm_status refused = DDPM_OK;
  std::vector<int> seen;
  std::vector<Floats> previews;
};

int on_progress(void* user, size_t, size_t, int32_t step, int32_t) {
  auto& w = *static_cast<Watch*>(user);
  w.seen.push_back(step);
  if (w.again != nullptr) w.refused = ddpm_sampler_wait(w.again);
  if (step == w.at && w.cancel != nullptr) ddpm_cancel(w.cancel);
  return step == w.at && w.cancel == nullptr;
}

int on_preview(void* user, size_t, size_t images, int32_t, int32_t, const float* x0) {
  static_cast<Watch*>(user)->previews.emplace_back(x0, x0 + images * kImage);
  return 0;
}

}  // namespace

TEST_CASE("c sampler: images are the generator's, to the bit", "[c_sampler]") {
  const std::string folder = model_folder("small");
  const Model model = open_model(folder);
  const struct {
    const char* name;
    SamplerKind kind;
  } kinds[] = {{"ddpm", SamplerKind::kDdpm},
               {"ddim", SamplerKind::kDdim},
               {"dpmpp2m", SamplerKind::kDpmpp2m}};
  for (const auto& k : kinds) {
    INFO(k.name);
    const Floats expected = by_generator(folder, {.kind = k.kind, .steps = kSteps}, 40, 5, 2);
    const Sampler s = create(model, options(2, k.name));  // five images in batches of 2, 2, 1
    Floats floats(5 * kImage + 1, -7.0f), device = floats;
    Bytes bytes(5 * kImage + 1, 7);
    ok(ddpm_sample_float(s.get(), 3, 40, 5, floats.data()));
    ok(ddpm_sample(s.get(), 3, 40, 5, bytes.data()));
    ok(ddpm_sample_device(s.get(), 3, 40, 5, device.data(), nullptr));
    CHECK(floats.back() == -7.0f);
    CHECK(bytes.back() == 7);
    CHECK(device.back() == -7.0f);
    for (Floats* f : {&floats, &device}) f->pop_back();
    bytes.pop_back();
    CHECK((floats == expected));
    CHECK((bytes == to_bytes(expected)));
    for (float& v : device) v = std::clamp(v, -1.0f, 1.0f);
    CHECK((device == expected));
  }
}

TEST_CASE("c sampler: labels, latents, eta and spacing", "[c_sampler]") {
  const std::string folder = model_folder("small_classes");
  const Model model = open_model(folder);
  ddpm_sampler_options o = options(3, "ddim");
  o.eta = 0.5;
  o.spacing = "trailing";
  const Sampler s = create(model, o);
  const SamplerOptions same{
      .kind = SamplerKind::kDdim, .steps = kSteps, .spacing = Spacing::kTrailing, .eta = 0.5};
  const Floats drawn = by_generator(folder, same, 4, 2, 3);
  Floats images(2 * kImage);
  ddpm_sample_task t = task(2);
  t.first = 4;
  t.floats = images.data();
  ok(ddpm_sample_run(s.get(), &t));
  CHECK((images == drawn));  // classes 4 and 5
  const int32_t usual[] = {4, 5}, swapped[] = {5, 4};
  t.labels = usual;
  ok(ddpm_sample_run(s.get(), &t));
  CHECK((images == drawn));
  t.labels = swapped;
  ok(ddpm_sample_run(s.get(), &t));
  CHECK((images != drawn));
  t.labels = nullptr;

  Floats start(2 * kImage);
  for (size_t i = 0; i < start.size(); ++i) start[i] = static_cast<float>(i % 17) / 8 - 1;
  const Floats from_start = by_generator(folder, same, 4, 2, 3, &start);
  t.x_T = start.data();
  for (int on_device : {0, 1}) {  // the CPU's device memory is the host's
    t.on_device = on_device;
    ok(ddpm_sample_run(s.get(), &t));
    CHECK((images == from_start));
  }
}

TEST_CASE("c sampler: guidance, of a sampler and of a task", "[c_sampler]") {
  const std::string folder = model_folder("small_guided");
  const Model model = open_model(folder);
  const SamplerOptions same{.kind = SamplerKind::kDdim, .steps = kSteps};
  const auto by = [&](std::optional<float> guidance) {
    return by_generator(folder, same, 4, 5, 2, nullptr, guidance);
  };
  ddpm_sampler_options o = options(2, "ddim");
  o.guidance = 3;
  const Sampler s = create(model, o);
  Floats images(5 * kImage);
  ok(ddpm_sample_float(s.get(), 3, 4, 5, images.data()));
  CHECK((images == by(3)));
  ddpm_sample_task t = task(5);
  t.first = 4;
  t.floats = images.data();
  for (const float guidance : {0.5f, 1000.0f, 1.0f}) {
    t.guidance = guidance;
    ok(ddpm_sample_run(s.get(), &t));
    CHECK((images == by(guidance)));
  }
  ok(ddpm_sample_float(s.get(), 3, 4, 5, images.data()));  // a task's is the task's alone
  CHECK((images == by(3)));
  t.struct_size = offsetof(ddpm_sample_task, guidance);  // a program of an older header
  ok(ddpm_sample_run(s.get(), &t));
  CHECK((images == by(3)));
  o.struct_size = offsetof(ddpm_sampler_options, guidance);
  const Sampler plain = create(model, o);
  ok(ddpm_sample_float(plain.get(), 3, 4, 5, images.data()));
  CHECK((images == by({})));
}

TEST_CASE("c sampler: guidance 1 and the label of no class are plain chains", "[c_sampler]") {
  ddpm_model_options mo{};
  mo.struct_size = sizeof mo;
  mo.device = "cpu";
  mo.threads = kThreads;
  mo.batch_invariant = 1;  // the network's batch is twice as large
  ddpm_model* raw = nullptr;
  ok(ddpm_model_load(model_folder("small_guided").c_str(), &mo, &raw));
  const Model model(raw);
  ddpm_sampler_options o = options(2, "ddpm");
  const Sampler plain = create(model, o);
  o.guidance = 1;
  const Sampler guided = create(model, o);
  const int32_t labels[] = {9, 3, 9};
  Floats expected(3 * kImage), images(3 * kImage);
  ddpm_sample_task t = task(3);
  t.labels = labels;
  t.floats = expected.data();
  ok(ddpm_sample_run(plain.get(), &t));
  t.floats = images.data();
  ok(ddpm_sample_run(guided.get(), &t));
  CHECK((images == expected));
  // none + w (none - none), at any w; the image with a class is another.
  t.guidance = 8;
  ok(ddpm_sample_run(guided.get(), &t));
  const auto image = [](const Floats& all, size_t i) {
    return Floats(&all[i * kImage], &all[i * kImage] + kImage);
  };
  CHECK((image(images, 0) == image(expected, 0)));
  CHECK((image(images, 1) != image(expected, 1)));
  CHECK((image(images, 2) == image(expected, 2)));
}

TEST_CASE("c sampler: a seed for each image", "[c_sampler]") {
  for (const char* name : {"small", "small_classes"}) {
    CAPTURE(name);
    const Model model = open_model(model_folder(name));
    const Sampler s = create(model, options(2));
    const std::vector<uint64_t> seeds = {3, uint64_t{1} << 63, 3, 11, 0};  // batches of 2, 2, 1
    Floats images(5 * kImage);
    ddpm_sample_task t = task(5);
    t.seeds = seeds.data();
    t.first = 12;
    t.floats = images.data();
    ok(ddpm_sample_run(s.get(), &t));
    for (size_t i = 0; i < 5; ++i) {
      Floats one(kImage);
      ok(ddpm_sample_float(s.get(), seeds[i], 12, 1, one.data()));
      CHECK((one == Floats(&images[i * kImage], &images[i * kImage] + kImage)));
    }
    // A program of an older header does not know the field.
    t.struct_size = offsetof(ddpm_sample_task, seeds);
    Floats older(5 * kImage), plain(5 * kImage);
    t.floats = older.data();
    ok(ddpm_sample_run(s.get(), &t));
    ok(ddpm_sample_float(s.get(), 3, 12, 5, plain.data()));
    CHECK((older == plain));
    CHECK((older != images));
  }
}

TEST_CASE("c sampler: a model from memory is the folder's", "[c_sampler]") {
  const std::string folder = model_folder("small");
  std::string unet = contents(folder + "/unet/config.json");
  const std::string scheduler = contents(folder + "/scheduler/scheduler_config.json");
  std::string weights = contents(folder + "/unet/diffusion_pytorch_model.safetensors");
  ddpm_model_files files{};
  files.struct_size = sizeof files;
  files.unet_config = unet.c_str();
  files.scheduler_config = scheduler.c_str();
  files.weights = weights.data();
  files.weights_size = weights.size();
  ddpm_model_options o{};
  o.struct_size = sizeof o;
  o.threads = kThreads;
  o.device = "cpu";
  std::vector<std::string> log;
  o.log = [](void* user, const char* line) {
    static_cast<std::vector<std::string>*>(user)->emplace_back(line);
  };
  o.user = &log;
  ddpm_model* raw = nullptr;
  ok(ddpm_model_load_memory(&files, &o, &raw));
  const Model model(raw);
  std::fill(weights.begin(), weights.end(), 'x');  // they were copied
  const Sampler s = create(model, options());
  Floats images(2 * kImage);
  ok(ddpm_sample_float(s.get(), 3, 0, 2, images.data()));
  CHECK((images == by_generator(folder, {.steps = kSteps}, 0, 2, 2)));
  REQUIRE(log.size() == 2);
  CHECK(log[0].find("CPU, 2 threads") != std::string::npos);
  CHECK(log[1].find("sampler of 2 images, 5 steps") != std::string::npos);

  raw = nullptr;
  CHECK(ddpm_model_load_memory(&files, &o, &raw) == DDPM_FILE);  // x for weights
  files.weights_size = 0;
  CHECK(ddpm_model_load_memory(&files, &o, &raw) == DDPM_FILE);
  files.weights_size = std::numeric_limits<size_t>::max();
  CHECK(ddpm_model_load_memory(&files, &o, &raw) == DDPM_USAGE);
  unet = "{\"sample_size\": 8, \"nonsense\": 1}";
  files.unet_config = unet.c_str();
  files.weights_size = weights.size();
  CHECK(ddpm_model_load_memory(&files, &o, &raw) == DDPM_CONFIG);
  CHECK(std::string(ddpm_last_error()).find("nonsense") != std::string::npos);
  CHECK(raw == nullptr);
}

TEST_CASE("c sampler: progress, previews and stopping", "[c_sampler]") {
  const Model model = open_model(model_folder("small"));
  Watch watch;
  ddpm_sampler_options o = options();
  o.progress = on_progress;
  o.preview = on_preview;
  o.preview_every = 2;
  o.user = &watch;
  const Sampler s = create(model, o);
  Floats whole(3 * kImage), images = whole;
  ok(ddpm_sample_float(s.get(), 1, 0, 3, whole.data()));
  CHECK(watch.seen == std::vector<int>{1, 2, 3, 4, 5, 1, 2, 3, 4, 5});
  REQUIRE(watch.previews.size() == 6);  // after steps 2, 4, 5 of two chains
  CHECK(watch.previews[0].size() == 2 * kImage);
  CHECK(watch.previews[5].size() == kImage);
  // The last step's x0 is the image, and not what the chain began with.
  CHECK((watch.previews[2] == Floats(whole.begin(), whole.begin() + 2 * kImage)));
  CHECK((watch.previews[0] != watch.previews[2]));

  for (const bool by_cancel : {false, true})
    for (int at = 1; at <= kSteps; ++at) {
      INFO(by_cancel << " at step " << at);
      watch = {};
      watch.cancel = by_cancel ? s.get() : nullptr;
      watch.at = at;
      const ddpm_status status = ddpm_sample_float(s.get(), 1, 0, 2, images.data());
      // A cancel in the last step has no step left to stop: the next call takes it.
      if (by_cancel && at == kSteps) {
        CHECK(status == DDPM_OK);
        CHECK(ddpm_sample_float(s.get(), 1, 0, 2, images.data()) == DDPM_STOPPED);
      } else {
        CHECK(status == DDPM_STOPPED);
      }
      CHECK(std::string(ddpm_sampler_last_error(s.get())).find("stopped by") == 0);
      watch = {};
      ok(ddpm_sample_float(s.get(), 1, 0, 3, images.data()));  // as if nothing had happened
      CHECK((images == whole));
    }
  ddpm_cancel(s.get());
  CHECK(ddpm_sample_float(s.get(), 1, 0, 1, images.data()) == DDPM_STOPPED);
  watch.again = s.get();
  ok(ddpm_sample_float(s.get(), 1, 0, 1, images.data()));
  CHECK(watch.refused == DDPM_USAGE);
}

TEST_CASE("c sampler: a value that is not finite is told", "[c_sampler]") {
  const Model model = open_model(model_folder("small"));
  const Sampler s = create(model, options());
  Floats start(2 * kImage), images(2 * kImage);
  start[kImage + 1] = std::nanf("");
  ddpm_sample_task t = task(2);
  t.x_T = start.data();
  t.floats = images.data();
  CHECK(ddpm_sample_run(s.get(), &t) == DDPM_NONFINITE);
  CHECK(ddpm_sampler_wait(s.get()) == DDPM_NONFINITE);
  t.n = 1;  // the bad image is gone with its slot
  ok(ddpm_sample_run(s.get(), &t));
  ok(ddpm_sampler_wait(s.get()));
}

TEST_CASE("c sampler: threads with their own samplers, made, freed and cancelled", "[c_sampler]") {
  const int samples = 25;
  const Model model = open_model(model_folder("small"), nullptr, 1);
  Bytes expected(static_cast<size_t>(samples) * kImage);
  {
    const Sampler s = create(model, options());
    ok(ddpm_sample(s.get(), 9, 0, static_cast<size_t>(samples), expected.data()));
  }
  std::atomic<int> wrong{0}, stopped{0};
  const auto work = [&](int thread) {
    Sampler s;
    for (int i = 0; i < samples; ++i) {
      const int k = (i * 7 + thread * 3) % samples;
      if (i % 5 == 0) {
        const ddpm_sampler_options o = options();
        ddpm_sampler* raw = nullptr;
        s.reset();
        if (ddpm_sampler_create(model.get(), &o, &raw) != DDPM_OK) ++wrong;
        s.reset(raw);
      }
      Bytes image(kImage);
      ddpm_status status;
      if (i % 4 == 3) {  // sometimes before, in or after the call; the next one takes what is left
        std::thread other([&] { ddpm_cancel(s.get()); });
        status = ddpm_sample(s.get(), 9, static_cast<uint64_t>(k), 1, image.data());
        other.join();
        if (status != DDPM_STOPPED) {
          if (ddpm_sample(s.get(), 9, 0, 1, image.data()) != DDPM_STOPPED) ++wrong;
        }
        ++stopped;
      }
      status = ddpm_sample(s.get(), 9, static_cast<uint64_t>(k), 1, image.data());
      if (status != DDPM_OK ||
          std::memcmp(image.data(), &expected[static_cast<size_t>(k) * kImage], kImage) != 0)
        ++wrong;
    }
  };
  std::vector<std::thread> threads;
  for (int i = 0; i < 8; ++i) threads.emplace_back(work, i);
  for (std::thread& t : threads) t.join();
  CHECK(wrong == 0);
  CHECK(stopped == 8 * 6);
}

TEST_CASE("c sampler: every bad argument is refused with its status", "[c_sampler]") {
  Model model = open_model(model_folder("small"));
  const auto fails = [](ddpm_status status, const char* part) {
    INFO(ddpm_last_error() << " / " << part);
    CHECK(status == DDPM_USAGE);
    CHECK(std::string(ddpm_last_error()).find(part) != std::string::npos);
  };
  ddpm_sampler* none = nullptr;
  const auto with = [&](auto change) {
    ddpm_sampler_options o = options();
    change(o);
    const ddpm_status status = ddpm_sampler_create(model.get(), &o, &none);
    CHECK(none == nullptr);
    return status;
  };
  fails(ddpm_sampler_create(nullptr, nullptr, &none), "model is NULL");
  fails(ddpm_sampler_create(model.get(), nullptr, nullptr), "sampler is NULL");
  for (uint32_t size : {0u, 4u, ~0u})
    fails(with([&](auto& o) { o.struct_size = size; }), "struct_size");
  for (int batch : {-1, 65537, std::numeric_limits<int>::max()})
    fails(with([&](auto& o) { o.batch_size = batch; }), "batch_size");
  for (int steps : {-1, 1001, std::numeric_limits<int>::max()})
    fails(with([&](auto& o) { o.steps = steps; }), "steps");
  fails(with([](auto& o) { o.sampler = "euler"; }), "euler");
  fails(with([](auto& o) { o.spacing = "karras"; }), "karras");
  fails(with([](auto& o) { o.eta = 0.5; }), "eta");
  fails(with([](auto& o) { o.eta = std::nan(""); }), "eta");
  fails(with([](auto& o) { o.preview_every = -1; }), "preview_every");
  for (double w : {-1.0, 1000.1, std::nan("")})
    fails(with([&](auto& o) { o.guidance = w; }), "guidance must be 0 to 1000");
  fails(with([](auto& o) { o.guidance = 1; }), "guidance 1: the model has no classes; train one");

  const Sampler s = create(model, options());
  model.reset();  // the sampler keeps what it needs
  Floats images(kImage);
  const auto run = [&](auto change) {
    ddpm_sample_task t = task(1);
    t.floats = images.data();
    change(t);
    return ddpm_sample_run(s.get(), &t);
  };
  fails(ddpm_sample(nullptr, 0, 0, 1, nullptr), "sampler is NULL");
  fails(ddpm_sample_float(nullptr, 0, 0, 1, images.data()), "sampler is NULL");
  fails(ddpm_sample_device(nullptr, 0, 0, 1, images.data(), nullptr), "sampler is NULL");
  fails(ddpm_sample(s.get(), 0, 0, 1, nullptr), "NULL");
  fails(ddpm_sample_float(s.get(), 0, 0, 1, nullptr), "NULL");
  fails(ddpm_sample_device(s.get(), 0, 0, 1, nullptr, nullptr), "NULL");
  fails(ddpm_sample_device(s.get(), 0, 0, 1, images.data(), &images), "the CPU has none");
  constexpr size_t kHuge = std::numeric_limits<size_t>::max();
  fails(ddpm_sample_float(s.get(), 0, 0, kHuge, images.data()), "too large");
  fails(ddpm_sample_float(s.get(), 0, kHuge, 1, images.data()), "too large");
  fails(ddpm_sample_run(s.get(), nullptr), "task is NULL");
  fails(ddpm_sample_run(nullptr, nullptr), "task is NULL");
  fails(run([](auto& t) { t.struct_size = 8; }), "struct_size");
  fails(run([](auto& t) { t.on_device = 2; }), "on_device");
  fails(run([&](auto& t) { t.stream = &t; }), "stream");
  fails(run([](auto& t) { t.floats = nullptr; }), "bytes and floats");
  const int32_t label = 0;
  fails(run([&](auto& t) { t.labels = &label; }), "no classes");
  for (double w : {-1.0, 1000.1, std::nan("")})
    fails(run([&](auto& t) { t.guidance = w; }), "guidance must be 0 to 1000");
  fails(run([](auto& t) { t.guidance = 2; }), "guidance 2: the sampler or pool is not guided");
  CHECK(std::string(ddpm_sampler_last_error(s.get())) == ddpm_last_error());
  fails(ddpm_sampler_wait(nullptr), "sampler is NULL");
  ddpm_sampler_info info{};
  fails(ddpm_sampler_get_info(nullptr, &info), "sampler is NULL");
  fails(ddpm_sampler_get_info(s.get(), nullptr), "info is NULL");
  fails(ddpm_sampler_get_info(s.get(), &info), "struct_size");
  info.struct_size = sizeof info;
  ok(ddpm_sampler_get_info(s.get(), &info));
  CHECK(info.batch_size == 2);
  CHECK(info.steps == kSteps);
  CHECK(info.image_size == kImage);
  CHECK(info.device_bytes > 100000);
  CHECK((images == Floats(kImage)));
  ok(ddpm_sample_float(s.get(), 0, 0, 0, images.data()));  // no image is no work
  CHECK((images == Floats(kImage)));

  const Model classes = open_model(model_folder("small_classes"));
  ddpm_sampler_options guided = options();
  guided.guidance = 2;
  fails(ddpm_sampler_create(classes.get(), &guided, &none), "was not trained without its classes");
  const Sampler labelled = create(classes, options());
  for (int32_t bad : {-1, 10, std::numeric_limits<int32_t>::max()}) {
    ddpm_sample_task t = task(1);
    t.labels = &bad;
    t.floats = images.data();
    fails(ddpm_sample_run(labelled.get(), &t), "labels");
  }

  ddpm_model* no_model = nullptr;
  ddpm_model_files files{};
  fails(ddpm_model_load_memory(nullptr, nullptr, &no_model), "files is NULL");
  fails(ddpm_model_load_memory(&files, nullptr, nullptr), "model is NULL");
  fails(ddpm_model_load_memory(&files, nullptr, &no_model), "struct_size");
  files.struct_size = sizeof files;
  fails(ddpm_model_load_memory(&files, nullptr, &no_model), "unet_config is NULL");
  files.unet_config = "{}";
  fails(ddpm_model_load_memory(&files, nullptr, &no_model), "weights is NULL");
  ddpm_model_options mo{};
  const char* folder = model_folder("small").c_str();
  fails(ddpm_model_load(folder, &mo, &no_model), "struct_size");
  mo.struct_size = sizeof mo;
  mo.threads = 4097;
  fails(ddpm_model_load(folder, &mo, &no_model), "threads");
  mo.threads = 0;
  mo.batch_invariant = 2;
  fails(ddpm_model_load(folder, &mo, &no_model), "batch_invariant");
  CHECK(no_model == nullptr);

  ddpm_cancel(nullptr);
  ddpm_sampler_destroy(nullptr);
  CHECK(std::string(ddpm_sampler_last_error(nullptr)).empty());
  CHECK(std::string(ddpm_session_last_error(nullptr)).empty());
  CHECK(std::string(ddpm_version()) == DDPM_VERSION);
  CHECK(std::string(ddpm_status_string(DDPM_OK)) == "success");
  CHECK(std::string(ddpm_status_string(static_cast<ddpm_status>(99))) == "unknown status");
}

#ifdef DDPM_C_API_FAULTS
TEST_CASE("c sampler: memory that runs out, and samples that leave none behind", "[c_sampler]") {
  const std::string command = std::string(DDPM_C_API_FAULTS) + " '" + model_folder("small") + "'";
  CHECK(std::system(command.c_str()) == 0);
}
#endif
