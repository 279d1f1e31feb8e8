// The pictures' images against chains that are run by hand.
#include "tools/strips.h"

#include <catch2/catch.hpp>
#include <cmath>
#include <set>

#include "tests/small_model.h"
#include "tests/temp_folder.h"
#include "tools/chain.h"
#include "tools/commands.h"
#include "tools/image_io.h"

using namespace ddpm;
using namespace ddpm::test;
using Catch::Contains;

namespace {

constexpr size_t kSize = 8 * 8 * 3;

struct Model {
  TempFolder tmp;
  std::unique_ptr<Backend> backend = make_cpu_backend({.threads = 1});
  Pipeline pipeline;

  explicit Model(float gain = 1, std::optional<int> classes = {}, bool null_class = false) {
    UNetConfig unet = small_unet();
    unet.num_class_embeds = classes;
    unet.null_class = null_class;
    save_small_model(tmp / "model", unet, {.variance_type = VarianceType::kFixedLarge}, gain);
    pipeline = open_pipeline(tmp / "model");
  }
  tools::Chain chain(const SamplerOptions& o, int batch) {
    return tools::make_chain(*backend, pipeline,
                             sampler_rows(Schedule(pipeline.scheduler), pipeline.scheduler, o),
                             batch);
  }
};

std::vector<float> cell(const tools::Strips& s, int64_t row, int64_t column) {
  const auto at = s.images.begin() + (row * s.columns + column) * static_cast<int64_t>(kSize);
  return {at, at + kSize};
}

std::vector<float> image(const std::vector<float>& batch, size_t i) {
  return {batch.begin() + static_cast<int64_t>(i * kSize),
          batch.begin() + static_cast<int64_t>((i + 1) * kSize)};
}

}  // namespace

TEST_CASE("strips: what a chain takes for the image", "[strips]") {
  Model model;
  // 20 timesteps of 1000: 980, 960, ...; parts of 100 end at 900, 800, ..., 0.
  tools::Chain chain = model.chain({.kind = SamplerKind::kDdpm, .steps = 50}, 2);
  Generator& g = *chain.generator;
  int64_t steps = 0;
  const tools::Strips strips =
      tools::predictions(g, 1000, 10, 4, 6, [&](int64_t done) { steps = done; });
  CHECK(steps == 50);
  REQUIRE(strips.columns == 10);
  REQUIRE(strips.images.size() == 2 * 10 * kSize);
  const std::vector<float> whole = g.sample(4, 6, 2);
  for (size_t i = 0; i < 2; ++i) CHECK(cell(strips, static_cast<int64_t>(i), 9) == image(whole, i));
  g.begin(4, 6);
  g.executor().run(Phase::kStart);
  std::vector<float> x0(2 * kSize);
  int checked = 0;
  for (const SamplerRow& row : g.rows()) {
    g.executor().step();
    if (row.t % 100 != 0) continue;
    g.executor().download(x0.data(), g.x0());
    for (size_t i = 0; i < 2; ++i)
      CHECK(cell(strips, static_cast<int64_t>(i), 9 - row.t / 100) == image(x0, i));
    ++checked;
  }
  CHECK(checked == 10);
  // No more columns than the chain has steps.
  tools::Chain few = model.chain({.kind = SamplerKind::kDdim, .steps = 3}, 1);
  CHECK(tools::predictions(*few.generator, 1000, 10, 4, 6).columns == 3);
}

TEST_CASE("strips: what one latent may become", "[strips]") {
  const std::optional<int> classes = GENERATE(std::optional<int>(), std::optional<int>(5));
  Model model(1, classes);
  tools::Chain chain = model.chain({.kind = SamplerKind::kDdpm, .steps = 20}, 3);
  Generator& g = *chain.generator;
  // Not in the chain's order; 40 is before the last step, 30 within it.
  const std::vector<int> shared{499, 999, 100, 30};
  int64_t steps = 0;
  const tools::Strips strips =
      tools::shared_latents(g, shared, 4, 7, [&](int64_t done) { steps = done; });
  CHECK(steps <= 5 * 20);
  REQUIRE(strips.columns == 4);
  REQUIRE(strips.images.size() == 16 * kSize);
  const std::vector<float> trunk = image(g.sample(4, 7, 3), 0);
  for (int64_t row = 0; row < 4; ++row) {
    CHECK(cell(strips, row, 1) == trunk);  // the first end is the image itself
    const bool ends_differ = row != 3;     // behind t = 30 only t = 0 is left, which draws no noise
    CHECK((cell(strips, row, 2) != trunk) == ends_differ);
    CHECK((cell(strips, row, 3) != cell(strips, row, 2)) == ends_differ);
  }
  // The later, the closer.
  const auto distance = [&](int64_t row) {
    double sum = 0;
    const auto a = cell(strips, row, 1), b = cell(strips, row, 2);
    for (size_t i = 0; i < kSize; ++i) sum += std::abs(a[i] - b[i]);
    return sum;
  };
  CHECK(distance(1) > distance(2));
  // The latent itself: x_T, clamped.
  const std::vector<float> noise = g.start_noise(4, 7);
  const auto latent = cell(strips, 1, 0);
  for (size_t i = 0; i < kSize; ++i) CHECK(latent[i] == std::clamp(noise[i], -1.0f, 1.0f));
  // At 100 the chain's own step of t = 100 is still to come.
  for (const SamplerRow& step : g.rows())
    if (step.t > 100) g.executor().step();
  CHECK(cell(strips, 2, 0) == image(g.images(3), 0));
}

TEST_CASE("strips: mixing", "[strips]") {
  const std::vector<float> a{1, 0, 0, 2}, b{0, 2, -1, 0};  // at right angles, of equal norm
  using tools::Blend;
  using tools::blend;
  CHECK(blend(Blend::kLinear, a, b, 0) == a);
  CHECK(blend(Blend::kLinear, a, b, 1) == b);
  CHECK(blend(Blend::kLinear, a, b, 0.25) == std::vector<float>{0.75f, 0.5f, -0.25f, 1.5f});
  for (double part = 0; part <= 1; part += 0.125) {
    const std::vector<float> mix = blend(Blend::kSpherical, a, b, part);
    const double pi = 3.14159265358979, x = std::cos(part * pi / 2), y = std::sin(part * pi / 2);
    for (size_t i = 0; i < 4; ++i) CHECK(mix[i] == Approx(x * a[i] + y * b[i]).margin(1e-6));
  }
  // Where there is no circle, the line.
  CHECK(blend(Blend::kSpherical, a, a, 0.3)[3] == Approx(2));
  CHECK(blend(Blend::kSpherical, a, {std::vector<float>(4)}, 0.5)[3] == Approx(1));
}

TEST_CASE("strips: between two images", "[strips]") {
  Model model;
  tools::Chain chain = model.chain({.kind = SamplerKind::kDdpm, .steps = 10, .start = 500}, 2);
  Generator& g = *chain.generator;
  tools::Pairs pairs{random_values(2 * kSize, 1), random_values(2 * kSize, 2),
                     random_values(2 * kSize, 3, 2), random_values(2 * kSize, 4, 2)};
  const tools::Strips strips = tools::interpolations(g, pairs, tools::Blend::kLinear, 3, 8, 5);
  REQUIRE(strips.columns == 5);
  REQUIRE(strips.images.size() == 10 * kSize);
  std::vector<float> middle;
  for (size_t i = 0; i < 2 * kSize; ++i)
    middle.push_back(static_cast<float>(0.5 * pairs.from_a[i] + 0.5 * pairs.from_b[i]));
  // Each column a chain with the same noise.
  const std::vector<float> columns[] = {pairs.a, g.sample_from(pairs.from_a, 8, 5, 2),
                                        g.sample_from(middle, 8, 5, 2),
                                        g.sample_from(pairs.from_b, 8, 5, 2), pairs.b};
  for (int64_t row = 0; row < 2; ++row)
    for (int64_t column = 0; column < 5; ++column)
      CHECK(cell(strips, row, column) ==
            image(columns[static_cast<size_t>(column)], static_cast<size_t>(row)));
}

namespace {

// The largest between two images of a picture's first row.
int difference(const tools::Image& picture, int a, int b) {
  const int cell_size = 8 * 8 + 2;  // enlarged 8 times
  int worst = 0;
  for (int y = 2; y < 2 + 64; ++y)
    for (int x = 2; x < 2 + 64; ++x)
      for (int c = 0; c < 3; ++c) {
        const auto at = [&](int column) {
          return int{
              picture
                  .pixels[static_cast<size_t>((y * picture.w + x + column * cell_size) * 3 + c)]};
        };
        worst = std::max(worst, std::abs(at(a) - at(b)));
      }
  return worst;
}

}  // namespace

TEST_CASE("strips: the commands' pictures", "[strips]") {
  Model model(0.002f);
  const std::string folder = model.tmp / "model";
  tools::ProgressiveArgs p;
  p.model = folder;
  p.out = model.tmp / "p.png";
  p.num = 3;
  p.columns = 4;
  p.chain.steps = 8;
  p.device.threads = 1;
  tools::run_progressive(p);
  const auto picture = [](const std::string& path) { return tools::read_image(path); };
  const int cell_size = 8 * 8 + 2;  // enlarged 8 times
  CHECK(picture(p.out).w == 4 * cell_size + 2);
  CHECK(picture(p.out).h == 3 * cell_size + 2);
  p.shared = {999, 499};
  tools::run_progressive(p);
  CHECK(picture(p.out).w == 4 * cell_size + 2);
  CHECK(picture(p.out).h == 2 * cell_size + 2);
  p.shared = {1000};
  CHECK_THROWS_WITH(tools::run_progressive(p), Contains("--shared 1000"));
  p.shared = {10};
  p.chain.sampler = "dpmpp2m";
  CHECK_THROWS_WITH(tools::run_progressive(p), Contains("draws no noise"));
  p.out = model.tmp / "p.npz";
  CHECK_THROWS_WITH(tools::run_progressive(p), Contains(".png"));

  tools::InterpolateArgs i;
  i.model = folder;
  i.from = "shapes";
  i.out = model.tmp / "i.png";
  i.num = 2;
  i.columns = 3;
  i.chain.steps = 100;
  i.device.threads = 1;
  tools::run_interpolate(i);
  CHECK(picture(i.out).w == 5 * cell_size + 2);
  CHECK(picture(i.out).h == 2 * cell_size + 2);
  // From latents of ddim the ends are the images.
  i.latents = "ddim";
  tools::run_interpolate(i);
  const tools::Image ends = picture(i.out);
  CHECK(difference(ends, 0, 1) < 16);
  CHECK(difference(ends, 3, 4) < 16);
  i.timestep = 5;
  CHECK_THROWS_WITH(tools::run_interpolate(i), Contains("--timestep"));
  i.latents = "diffused";
  i.timestep = 5;
  i.chain.spacing = "trailing";  // 9 is its last
  CHECK_THROWS_WITH(tools::run_interpolate(i), Contains("timestep 5"));
}

// Class and guidance are those of sample: the last prediction of a chain is its image.
TEST_CASE("strips: a class, and guidance by it", "[strips]") {
  const Model model(0.3f, 4, true);
  tools::ProgressiveArgs p;
  p.model = model.tmp / "model";
  p.out = model.tmp / "p.png";
  p.num = 2;
  p.columns = 2;
  p.chain.steps = 4;
  p.chain.label = 2;
  p.chain.guidance = 3;
  p.device.threads = 1;
  tools::run_progressive(p);
  tools::SampleArgs sample;
  sample.model = p.model;
  sample.out = model.tmp / "images";
  sample.num = p.num;
  sample.chain = p.chain;
  sample.device = p.device;
  REQUIRE(tools::run_sample(sample) == Status::kOk);
  const tools::Image strips = tools::read_image(p.out);
  for (int row = 0; row < 2; ++row) {
    const tools::Image image = tools::read_image(sample.out + format("/%06d.png", row));
    REQUIRE(image.w == 8);
    for (int y = 0; y < 8; ++y)
      for (int x = 0; x < 8; ++x)
        for (int c = 0; c < 3; ++c) {
          const int at = ((2 + row * 66 + y * 8) * strips.w + 2 + 66 + x * 8) * 3 + c;
          REQUIRE(strips.pixels[static_cast<size_t>(at)] ==
                  image.pixels[static_cast<size_t>((y * 8 + x) * 3 + c)]);
        }
  }

  tools::InterpolateArgs i;
  i.model = p.model;
  i.from = "shapes";
  i.num = 1;
  i.columns = 2;
  i.device = p.device;
  std::set<std::string> pictures;
  for (const char* latents : {"diffused", "ddim"}) {
    i.latents = latents;
    i.chain = {};
    i.chain.steps = 100;
    for (const auto& [label, guidance] :
         std::vector<std::pair<int, double>>{{0, 1}, {1, 1}, {1, 3}}) {
      i.out = model.tmp / "i.png";
      i.chain.label = label;
      i.chain.guidance = guidance;
      tools::run_interpolate(i);
      CHECK(pictures.insert(get_bytes(i.out)).second);
    }
    i.chain.label = 3;
    CHECK_THROWS_WITH(tools::run_interpolate(i), Contains("--label 3"));
  }
  // Led back as the class that the chains are of: with another one this is 100.
  const Model gentle(0.01f, 4, true);
  i.model = gentle.tmp / "model";
  i.chain.steps = 200;
  i.chain.label = 1;
  i.chain.guidance = 1;
  tools::run_interpolate(i);
  CHECK(difference(tools::read_image(i.out), 0, 1) < 30);

  p.chain.label = 3;
  CHECK_THROWS_WITH(tools::run_progressive(p), Contains("--label 3"));
  const Model plain;
  p.model = plain.tmp / "model";
  p.chain.label = {};
  CHECK_THROWS_WITH(tools::run_progressive(p), Contains("--guidance 3"));
}
