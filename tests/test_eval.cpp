// `ddpm eval` as a function: its files, and that batch size, threads and stops change none of them.
#include <catch2/catch.hpp>

#include <filesystem>
#include <nlohmann/json.hpp>

#include "tests/small_model.h"
#include "tests/temp_folder.h"
#include "tools/commands.h"
#include "tools/eval_progress.h"

using namespace ddpm;
using namespace ddpm::test;
using Catch::Contains;

namespace {

SchedulerConfig short_process() {
  SchedulerConfig c;
  c.num_train_timesteps = 20;
  c.beta_end = 0.5;
  c.variance_type = VarianceType::kFixedLarge;
  return c;
}

tools::EvalArgs args_for(const TempFolder& tmp, const char* out) {
  tools::EvalArgs a;
  a.model = tmp / "model";
  a.data = "shapes";
  a.num = 3;
  a.seed = 9;
  a.out = tmp / out;
  a.device.threads = 1;
  return a;
}

nlohmann::json result(const tools::EvalArgs& a) {
  REQUIRE(tools::run_eval(a) == Status::kOk);
  return nlohmann::json::parse(get_bytes(a.out));
}

}  // namespace

TEST_CASE("eval: bits per dimension, and no bit by batch or threads", "[eval]") {
  const TempFolder tmp;
  UNetConfig unet = small_unet();
  if (GENERATE(false, true)) unet.num_class_embeds = 3;
  save_small_model(tmp / "model", unet, short_process(), 0.3f);
  tools::EvalArgs a = args_for(tmp, "a.json");
  const nlohmann::json nll = result(a);
  CHECK(nll.size() == 7);
  REQUIRE(nll["terms"].size() == 20);
  double sum = nll["prior"];
  for (const double term : nll["terms"]) sum += term;
  CHECK(nll["bits_per_dim"] == Approx(sum).epsilon(1e-14));
  CHECK(nll["decoder"] == nll["terms"][0]);
  CHECK(nll["num"] == 3);
  CHECK(nll["seed"] == 9);
  CHECK(nll["ci95"] > 0);
  CHECK_FALSE(std::filesystem::exists(a.out + ".progress"));

  for (const auto& [batch, threads] : {std::pair{1, 1}, {7, 2}}) {
    tools::EvalArgs b = args_for(tmp, "b.json");
    b.batch_size = batch;
    b.device.threads = threads;
    result(b);
    CHECK((get_bytes(a.out) == get_bytes(b.out)));
  }
  a.split = "train";
  CHECK(result(a)["bits_per_dim"] != nll["bits_per_dim"]);
  a.split = "";
  a.seed = 10;
  CHECK(result(a)["bits_per_dim"] != nll["bits_per_dim"]);
}

TEST_CASE("eval: rate and distortion are of the same terms", "[eval]") {
  const TempFolder tmp;
  save_small_model(tmp / "model", small_unet(), short_process(), 0.3f);
  tools::EvalArgs a = args_for(tmp, "nll.json");
  const nlohmann::json nll = result(a);
  a.metric = "rd";
  a.out = tmp / "rd.json";
  const nlohmann::json rd = result(a);
  double behind = 0;
  REQUIRE(rd["rate"].size() == 20);
  REQUIRE(rd["distortion"].size() == 20);
  for (size_t t = 20; t-- > 0;) {
    CHECK(rd["rate"][t].get<double>() == Approx(behind).epsilon(1e-12).margin(1e-15));
    behind += nll["terms"][t].get<double>();
  }
  CHECK(rd["prior"] == nll["prior"]);
  REQUIRE(rd["rows"].size() == 10);
  for (size_t k = 0; k < 10; ++k) {  // labels T - t: 20, 18, ..., 2
    CHECK(rd["rows"][k]["reverse_time"] == 20 - 2 * k);
    CHECK(rd["rows"][k]["rate"] == rd["rate"][2 * k]);
    CHECK(rd["rows"][k]["distortion"] == rd["distortion"][2 * k]);
  }
}

TEST_CASE("eval: stopped by a signal and gone on with", "[eval]") {
  const TempFolder tmp;
  save_small_model(tmp / "model", small_unet(), {}, 0.3f);
  tools::EvalArgs a = args_for(tmp, "whole.json");
  result(a);
  const std::string log = tmp / "log", out = tmp / "parts.json";
  const int code =
      stopped_program({"eval", "--model", a.model, "--data", "shapes", "--num", "3", "--seed", "9",
                       "--batch-size", "2", "--threads", "1", "--out", out},
                      log, "images ");
  INFO(get_bytes(log));
  REQUIRE(code == 75);
  CHECK_FALSE(std::filesystem::exists(out));
  REQUIRE(std::filesystem::exists(out + ".progress"));

  tools::EvalArgs b = a;
  b.out = out;
  b.seed = 8;
  CHECK_THROWS_WITH(tools::run_eval(b), Contains("another evaluation") && Contains("seed"));
  b.seed = a.seed;
  b.batch_size = 5;
  result(b);
  CHECK((get_bytes(out) == get_bytes(a.out)));
  CHECK_FALSE(std::filesystem::exists(out + ".progress"));
}

TEST_CASE("eval: what its progress file keeps, and what is none", "[eval]") {
  const TempFolder tmp;
  tools::EvalProgress p{{{"model", "a"}, {"num", "3"}}, "cpu", BoundSums(3)};
  BoundSums& s = p.sums;
  s.images = 2;
  s.bits = 1.0 / 3;
  s.squared_bits = 0.1;
  s.prior = 1e-300;
  s.terms = {1, 2.5, 1e-17};
  s.mse = {0.1, 0.2, 0.3};
  s.image_terms = {0.7};
  s.image_mse = {std::nextafter(0.7, 1)};
  const std::string path = tmp / "p";
  tools::write_eval_progress(path, p);
  const tools::EvalProgress r = tools::read_eval_progress(path, p.of, 3);
  CHECK(r.sums.images == s.images);
  CHECK(r.sums.bits == s.bits);
  CHECK(r.sums.squared_bits == s.squared_bits);
  CHECK(r.sums.prior == s.prior);
  CHECK(r.sums.terms == s.terms);
  CHECK(r.sums.mse == s.mse);
  CHECK(r.sums.image_terms == s.image_terms);
  CHECK(r.sums.image_mse == s.image_mse);
  CHECK(r.numerics == "cpu");
  CHECK_THROWS_WITH(tools::read_eval_progress(path, {{"model", "b"}, {"num", "3"}}, 3),
                    Contains("model") && Contains("remove it"));
  CHECK_THROWS_WITH(tools::read_eval_progress(path, p.of, 4), Contains("terms"));
  const std::string good = get_bytes(path);
  for (const auto& [from, to] : {std::pair{"[1.0,", "[\"1\","},
                                 {"\"images\":2", "\"images\":-2"},
                                 {"\"images\":2", "\"images\":1e300"},
                                 {"\"images\":2", "\"images\":9007199254740993"},
                                 {"\"format\":1", "\"format\":\"1\""},
                                 {"\"of\":{", "\"of\":1,\"fo\":{"},
                                 {"\"mse\"", "\"mes\""},
                                 {"\"image_mse\":[", "\"image_mse\":[1,"}}) {
    std::string bad = good;
    REQUIRE(bad.find(from) != std::string::npos);
    bad.replace(bad.find(from), std::string(from).size(), to);
    put_bytes(path, bad);
    INFO(bad);
    CHECK_THROWS_WITH(tools::read_eval_progress(path, p.of, 3), Contains("remove the file"));
  }
}

TEST_CASE("eval: data that it is not for", "[eval]") {
  const TempFolder tmp;
  UNetConfig unet = small_unet();
  save_small_model(tmp / "model", unet, short_process());
  tools::EvalArgs a = args_for(tmp, "a.json");
  a.num = 10001;
  CHECK_THROWS_WITH(tools::run_eval(a), Contains("10000 images"));
  a.data = tmp / "none";
  CHECK_THROWS_WITH(tools::run_eval(a), Contains("none"));
  std::filesystem::create_directory(tmp / "folder");
  a.data = tmp / "folder";
  a.split = "test";
  CHECK_THROWS_WITH(tools::run_eval(a), Contains("--split test"));
}
