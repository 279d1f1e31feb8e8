// The file that sampling is suspended to: all of it comes back, and nothing that is not its own.
#include "tools/suspended.h"

#include <catch2/catch.hpp>

#include "engine/safetensors.h"
#include "model/sampler.h"
#include "tests/small_model.h"
#include "tests/temp_folder.h"

using namespace ddpm;
using namespace ddpm::test;
using Catch::Contains;
using tools::Sampling;

namespace {

const Shape kImage{1, 8, 8, 3};

std::vector<float> images(int64_t count, uint64_t seed) {
  return random_values(count * kImage.count(), seed);
}

Sampling some(const Pipeline& p) {
  Sampling s;
  s.seed = (uint64_t{1} << 63) - 1;
  s.first = 77;
  s.num = 7;
  s.batch_size = 2;
  s.sampler = "dpmpp2m";
  s.rows =
      sampler_rows(Schedule(p.scheduler), p.scheduler, {.kind = SamplerKind::kDpmpp2m, .steps = 5});
  s.model = model_hash(p);
  s.numerics = "cpu of some kind";
  s.images_done = 2;
  s.steps_done = 3;
  s.images = images(2, 1);
  s.x = images(2, 2);
  s.previous = images(2, 3);
  s.starts = images(3, 4);
  return s;
}

std::string error_of(Status status, const std::string& path, const Pipeline& p) {
  try {
    tools::read_sampling(path, p);
  } catch (const Error& e) {
    CHECK(e.status() == status);
    return e.what();
  }
  return "no error";
}

}  // namespace

TEST_CASE("suspended: what is written is read again", "[suspended]") {
  const TempFolder tmp;
  SchedulerConfig scheduler;
  UNetConfig unet = small_unet();
  const bool classes = GENERATE(false, true);
  if (classes) unet.num_class_embeds = 5;
  save_small_model(tmp / "model", unet, scheduler);
  const Pipeline p = open_pipeline(tmp / "model");
  Sampling s = some(p);
  if (classes) s.labels = {0, 4, 2, 1, 3, 0, 2};
  const bool between_batches = GENERATE(false, true);
  if (between_batches) {
    s.steps_done = 0;
    s.x = s.previous = {};
    s.starts = images(5, 4);
    s.latents = true;
  }
  tools::write_sampling(tmp / "s.safetensors", s, kImage);
  const Sampling r = tools::read_sampling(tmp / "s.safetensors", p);
  CHECK(r.seed == s.seed);
  CHECK(r.first == s.first);
  CHECK(r.num == s.num);
  CHECK(r.batch_size == s.batch_size);
  CHECK(r.latents == s.latents);
  CHECK(r.sampler == s.sampler);
  CHECK(r.numerics == s.numerics);
  CHECK(r.labels == s.labels);
  CHECK(r.images_done == s.images_done);
  CHECK(r.steps_done == s.steps_done);
  CHECK(r.images == s.images);
  CHECK(r.x == s.x);
  CHECK(r.previous == s.previous);
  CHECK(r.starts == s.starts);
  REQUIRE(r.rows.size() == s.rows.size());
  for (size_t i = 0; i < r.rows.size(); ++i) {
    const SamplerRow &a = r.rows[i], &b = s.rows[i];
    CHECK(std::tie(a.t, a.x0_x, a.x0_out, a.clip, a.x_x, a.x_x0, a.x_out, a.x_previous, a.x_z,
                   a.z_log, a.z_out) == std::tie(b.t, b.x0_x, b.x0_out, b.clip, b.x_x, b.x_x0,
                                                 b.x_out, b.x_previous, b.x_z, b.z_log, b.z_out));
  }
}

TEST_CASE("suspended: another model, another file, a damaged one", "[suspended]") {
  const TempFolder tmp;
  const UNetConfig unet = small_unet();
  save_small_model(tmp / "model", unet, {});
  save_small_model(tmp / "other", unet, {}, 0.5f);
  const Pipeline p = open_pipeline(tmp / "model");
  const std::string path = tmp / "s.safetensors";
  tools::write_sampling(path, some(p), kImage);
  CHECK(error_of(Status::kConfig, path, p) == "no error");
  CHECK_THAT(error_of(Status::kConfig, path, open_pipeline(tmp / "other")),
             Contains("another model"));
  Pipeline heads = p;  // the same weights in another network
  heads.unet.attention_head_dim = 4;
  CHECK_THAT(error_of(Status::kConfig, path, heads), Contains("another model"));
  CHECK_THAT(error_of(Status::kConfig, p.weights, p), Contains("--suspend"));
  CHECK_THAT(error_of(Status::kConfig, tmp / "none", p), Contains("none"));

  const std::string good = get_bytes(path);
  for (const size_t part : {1, 2, 3, 5, 7}) {  // in the data: each tensor is some of it
    std::string bad = good;
    bad[bad.size() - 1 - part * bad.size() / 10] ^= 1;
    put_bytes(path, bad);
    CHECK_THAT(error_of(Status::kFile, path, p), Contains("checksum"));
  }
  std::string bad = good;
  bad[good.find("\"steps_done\":\"3\"") + 14] = '2';
  put_bytes(path, bad);
  CHECK_THAT(error_of(Status::kFile, path, p), Contains("checksum"));
  put_bytes(path, good.substr(0, good.size() - 4));
  CHECK_THAT(error_of(Status::kFile, path, p), Contains("s.safetensors"));
}
