// `ddpm sample` as a function: where chains start, where they are led, and what becomes of those
// that are stopped.
#include <catch2/catch.hpp>

#include <cmath>
#include <filesystem>

#include "engine/safetensors.h"
#include "engine/shapes.h"
#include "tests/reference/random.h"
#include "tests/small_model.h"
#include "tests/temp_folder.h"
#include "tools/commands.h"
#include "tools/image_io.h"

using namespace ddpm;
using namespace ddpm::test;
using Catch::Contains;

namespace {

tools::SampleArgs args_for(const TempFolder& tmp, const std::string& out) {
  tools::SampleArgs a;
  a.model = tmp / "model";
  a.out = tmp / out;
  a.num = 5;
  a.first = 3;
  a.seed = 11;
  a.batch_size = 2;
  a.device.threads = 1;
  return a;
}

std::vector<float> tensor(const std::string& path, const char* name) {
  const SafetensorsReader file(path);
  const TensorInfo* t = file.find(name);
  REQUIRE(t != nullptr);
  std::vector<float> values(t->elements);
  file.read_f32(*t, values.data());
  return values;
}

// [N,C,H,W] of 8x8x3 images given as (N,H,W,C).
std::vector<float> nchw(const std::vector<float>& v) {
  return tools::to_nchw(v, static_cast<int>(v.size() / 192), 8, 8, 3);
}

}  // namespace

TEST_CASE("sample: suspended and resumed, the same bits", "[sample]") {
  const TempFolder tmp;
  UNetConfig unet = small_unet();
  struct Case {
    const char* sampler;
    double eta;
    bool classes;
    double guidance = 1;
  };
  const Case c =
      GENERATE(Case{"ddpm", 0, false}, Case{"ddim", 0.5, true, 2.5}, Case{"dpmpp2m", 0, false});
  if (c.classes) unet.num_class_embeds = 3;
  unet.null_class = c.classes;
  save_small_model(tmp / "model", unet, {});
  tools::SampleArgs a = args_for(tmp, "whole.safetensors");
  a.chain.sampler = c.sampler;
  a.chain.eta = c.eta;
  a.chain.steps = 6;
  a.chain.guidance = c.guidance;
  REQUIRE(tools::run_sample(a) == Status::kOk);
  const std::string whole = get_bytes(a.out);

  // In the first batch, at its end, and in the last: of 18 steps in all.
  for (const int64_t at : {1, 4, 6, 15}) {
    tools::SampleArgs first = a;
    first.out = tmp / "parts.safetensors";
    first.suspend = tmp / "s.safetensors";
    first.suspend_at = at;
    REQUIRE(tools::run_sample(first) == Status::kOk);
    CHECK_FALSE(std::filesystem::exists(first.out));
    tools::SampleArgs second;
    second.model = a.model;
    second.out = first.out;
    second.resume = first.suspend;
    second.suspend = first.suspend;  // and once more
    second.suspend_at = 2;
    second.device.threads = 1;
    REQUIRE(tools::run_sample(second) == Status::kOk);
    CHECK_FALSE(std::filesystem::exists(first.out));
    second.suspend.clear();
    second.suspend_at.reset();
    REQUIRE(tools::run_sample(second) == Status::kOk);
    CHECK((get_bytes(first.out) == whole));
    std::filesystem::remove(first.out);
  }
}

TEST_CASE("sample: a signal suspends", "[sample]") {
  const TempFolder tmp;
  save_small_model(tmp / "model", small_unet(), {});
  tools::SampleArgs a = args_for(tmp, "whole.safetensors");
  a.num = 2;
  a.chain.steps = 1000;
  REQUIRE(tools::run_sample(a) == Status::kOk);

  const std::string log = tmp / "log", out = tmp / "parts.safetensors",
                    file = tmp / "s.safetensors";
  const int code =
      stopped_program({"sample", "--model", a.model, "--num", "2", "--first", "3", "--seed", "11",
                       "--batch-size", "2", "--threads", "1", "--suspend", file, "--out", out},
                      log, "sampling");
  INFO(get_bytes(log));
  REQUIRE(code == 75);
  CHECK_FALSE(std::filesystem::exists(out));
  tools::SampleArgs rest;
  rest.model = a.model;
  rest.out = out;
  rest.resume = file;
  rest.device.threads = 1;
  REQUIRE(tools::run_sample(rest) == Status::kOk);
  CHECK((get_bytes(out) == get_bytes(a.out)));
}

TEST_CASE("sample: from images with noise", "[sample]") {
  const TempFolder tmp;
  save_small_model(tmp / "model", small_unet(), {});
  const Dataset shapes = make_shapes(5, {1, 8, 8, 3});
  tools::write_png_folder(tmp / "pictures", shapes.images.data(), 5, 8, 8, 3, 0);
  tools::SampleArgs a = args_for(tmp, "out.safetensors");
  a.from = tmp / "pictures";
  a.chain.sampler = "ddpm";
  a.chain.steps = 10;
  a.strength = 0.3;
  REQUIRE(tools::run_sample(a) == Status::kOk);

  // The same by hand: leading spacing of 10 has 200, 100, 0 at its end.
  const Pipeline p = open_pipeline(a.model);
  const double ab = Schedule(p.scheduler).alpha_bar(200);
  const auto backend = make_cpu_backend({.threads = 1});
  std::unique_ptr<ParamStore> store;
  Generator generator(*backend, p.unet, p.scheduler, {.timesteps = {200, 100, 0}}, 2,
                      [&](const Params& params) {
                        store = load_store(*backend, p, params);
                        return store->arenas();
                      });
  generator.weights_changed();
  std::vector<float> expected;
  for (uint64_t i = 0; i < 5; i += 2) {
    const int now = i == 4 ? 1 : 2;
    std::vector<float> x;
    for (uint64_t k = i; k < i + static_cast<uint64_t>(now); ++k) {
      const RandomStream stream{.seed = 11, .purpose = Purpose::kSampleStart, .sample = 3 + k};
      const std::vector<double> noise = ref::normals(stream, 192);
      for (size_t e = 0; e < 192; ++e)
        x.push_back(static_cast<float>(std::sqrt(ab) *
                                           (shapes.image(static_cast<int64_t>(k))[e] / 127.5 - 1) +
                                       std::sqrt(1 - ab) * noise[e]));
    }
    const auto part = generator.sample_from(x, 11, 3 + i, now);
    expected.insert(expected.end(), part.begin(), part.end());
  }
  const std::vector<float> out = tensor(a.out, "images"), wanted = nchw(expected);
  REQUIRE(out.size() == wanted.size());
  for (size_t i = 0; i < out.size(); ++i) REQUIRE(std::abs(out[i] - wanted[i]) < 1e-4);

  // One picture is the start of all; of a folder the first are taken.
  a.from = tmp / "pictures/000000.png";
  a.out = tmp / "one.safetensors";
  a.num = 3;
  REQUIRE(tools::run_sample(a) == Status::kOk);
  const std::vector<float> one = tensor(a.out, "images");
  REQUIRE(one.size() == 3 * 192);
  for (size_t i = 0; i < 192; ++i) REQUIRE(std::abs(one[i] - wanted[i]) < 1e-4);
  CHECK(std::vector(one.begin(), one.begin() + 192) !=
        std::vector(one.begin() + 192, one.begin() + 384));
}

TEST_CASE("sample: images led back to latents, which give them again", "[sample]") {
  const TempFolder tmp;
  // It does say something else of another image, yet not much: a trained network's error stands in
  // docs/numerics.md.
  save_small_model(tmp / "model", small_unet(), {}, 0.002f);
  const Dataset shapes = make_shapes(5, {1, 8, 8, 3});
  tools::write_png_folder(tmp / "pictures", shapes.images.data(), 5, 8, 8, 3, 0);
  std::vector<float> start;
  for (const uint8_t v : shapes.images) start.push_back(static_cast<float>(v / 127.5 - 1));
  start = nchw(start);
  const auto error = [&](int steps) {
    tools::SampleArgs a = args_for(tmp, "latents.safetensors");
    a.invert = tmp / "pictures";
    a.chain.steps = steps;
    REQUIRE(tools::run_sample(a) == Status::kOk);
    tools::SampleArgs b = args_for(tmp, "again.safetensors");
    b.init = a.out;
    b.chain.sampler = "ddim";
    b.chain.steps = steps;
    b.chain.clip = "off";
    REQUIRE(tools::run_sample(b) == Status::kOk);
    double worst = 0;
    const std::vector<float> again = tensor(b.out, "images");
    REQUIRE(again.size() == start.size());
    for (size_t i = 0; i < again.size(); ++i)
      worst = std::max(worst, std::abs(double{again[i]} - double{start[i]}));
    return worst;
  };
  const double at_10 = error(10), at_100 = error(100);
  INFO(at_10 << " " << at_100);
  CHECK(at_10 < 0.5);
  CHECK(at_100 < at_10 / 3);

  // sample's own file as the source, and what cannot be.
  tools::SampleArgs a = args_for(tmp, "latents.png");
  a.invert = tmp / "again.safetensors";
  a.chain.steps = 2;
  CHECK_THROWS_WITH(tools::run_sample(a), Contains(".safetensors"));
  a.out = tmp / "few.safetensors";
  a.num = 2;
  REQUIRE(tools::run_sample(a) == Status::kOk);
  CHECK(tensor(a.out, "x_T").size() == 2 * 192);
  a.chain.sampler = "ddpm";
  CHECK_THROWS_WITH(tools::run_sample(a), Contains("ddim"));
}

TEST_CASE("sample: a class, and guidance by it", "[sample]") {
  const TempFolder tmp;
  UNetConfig unet = small_unet();
  save_small_model(tmp / "plain", unet, {});
  unet.num_class_embeds = 3;
  save_small_model(tmp / "classes", unet, {});
  unet.null_class = true;
  save_small_model(tmp / "guided", unet, {});
  const auto drawn = [&](const char* model, std::optional<int> label, double guidance) {
    tools::SampleArgs a = args_for(tmp, "out.safetensors");
    a.model = tmp / model;
    a.chain.steps = 2;
    a.chain.label = label;
    a.chain.guidance = guidance;
    try {
      tools::run_sample(a);
    } catch (const Error& e) {
      CHECK(e.status() == Status::kUsage);
      return std::string(e.what());
    }
    return get_bytes(a.out);
  };
  CHECK((drawn("guided", 0, 1) != drawn("guided", 1, 1)));
  CHECK((drawn("guided", 0, 2) != drawn("guided", 0, 1)));
  CHECK((drawn("guided", 0, 0) == drawn("guided", 1, 0)));  // of no class, whichever is asked for
  using Catch::Contains;
  CHECK_THAT(drawn("plain", 0, 1), Contains("--label 0") && Contains("no classes"));
  CHECK_THAT(drawn("classes", 3, 1), Contains("classes 0 to 2"));
  CHECK_THAT(drawn("guided", 2, 1), Contains("classes 0 to 1"));
  CHECK_THAT(drawn("guided", -1, 1), Contains("--label -1"));
  for (const char* model : {"plain", "classes"})
    CHECK_THAT(drawn(model, {}, 2), Contains("--guidance 2") && Contains("train.label_dropout") &&
                                        Contains("num_class_embeds"));
}
