// Frechet inception distance and inception score: sums, the distance, files, and `ddpm eval` as a
// function, against PyTorch's and numpy's values (golden/make_inception.py).
#include <catch2/catch.hpp>

#include <cmath>
#include <filesystem>
#include <nlohmann/json.hpp>

#include "tests/inception_weights.h"
#include "tests/small_model.h"
#include "tests/temp_folder.h"
#include "tools/commands.h"
#include "tools/feature_files.h"
#include "tools/frechet.h"

using namespace ddpm;
using namespace ddpm::test;
using namespace ddpm::tools;
using Catch::Contains;

namespace {

FeatureStatistics gaussian(std::vector<double> mean, std::vector<double> covariance) {
  return {10, std::move(mean), std::move(covariance)};
}

FeatureStatistics statistics_of(const std::vector<float>& values, size_t features) {
  FeatureSums s(features);
  s.add(values.data(), static_cast<int64_t>(values.size() / features));
  return s.statistics();
}

}  // namespace

TEST_CASE("features: mean and covariance, the same bits however they come", "[features]") {
  constexpr size_t kFeatures = 7;
  constexpr int64_t kCount = 23;
  // A mean a thousand times the deviation.
  const auto x = random_values(kCount * kFeatures, 1, 1.0f, 1000.0f);
  const FeatureStatistics s = statistics_of(x, kFeatures);
  for (size_t i = 0; i < kFeatures; ++i) {
    double mean_i = 0;
    for (size_t n = 0; n < kCount; ++n)
      mean_i += static_cast<double>(x[n * kFeatures + i]) / kCount;
    CHECK(s.mean[i] == Approx(mean_i).epsilon(1e-14));
    for (size_t j = 0; j < kFeatures; ++j) {
      double mean_j = 0, c = 0;
      for (size_t n = 0; n < kCount; ++n)
        mean_j += static_cast<double>(x[n * kFeatures + j]) / kCount;
      for (size_t n = 0; n < kCount; ++n)
        c += (static_cast<double>(x[n * kFeatures + i]) - mean_i) *
             (static_cast<double>(x[n * kFeatures + j]) - mean_j) / (kCount - 1);
      // Products of 1e6 in double.
      CHECK(s.covariance[i * kFeatures + j] == Approx(c).margin(1e-8));
    }
  }
  FeatureSums parts(kFeatures);
  parts.add(x.data(), 4);
  parts.add(x.data() + 4 * kFeatures, kCount - 4);
  CHECK(parts.statistics().covariance == s.covariance);
  CHECK(parts.statistics().mean == s.mean);
}

TEST_CASE("features: distances that are known", "[features]") {
  const FeatureStatistics unit = gaussian({0, 0}, {1, 0, 0, 1});
  CHECK(frechet_distance(unit, unit) == Approx(0).margin(1e-14));
  CHECK(frechet_distance(unit, gaussian({3, 4}, {1, 0, 0, 1})) == Approx(25));
  // (sqrt(a) - sqrt(b))^2 where both are diagonal.
  CHECK(frechet_distance(gaussian({0, 0}, {4, 0, 0, 9}), gaussian({0, 0}, {1, 0, 0, 25})) ==
        Approx(1 + 4));
  // Two by two: tr sqrt(P) = sqrt(tr P + 2 sqrt(det P)), P = S1 S2.
  const double p00 = 2 * 3 + 1 * -1, p01 = 2 * -1 + 1 * 2, p10 = 1 * 3 + 1 * -1, p11 = -1 + 2;
  const double root = std::sqrt(p00 + p11 + 2 * std::sqrt(p00 * p11 - p01 * p10));
  const FeatureStatistics a = gaussian({1, 2}, {2, 1, 1, 1}), b = gaussian({1, 0}, {3, -1, -1, 2});
  CHECK(frechet_distance(a, b) == Approx(4 + 3 + 5 - 2 * root));
  CHECK(frechet_distance(b, a) == Approx(frechet_distance(a, b)));
  // One of rank one, whose smallest eigenvalue may come out negative.
  CHECK(frechet_distance(gaussian({0, 0}, {1, 1, 1, 1}), unit) ==
        Approx(2 + 2 - 2 * std::sqrt(2.0)));
}

TEST_CASE("features: distance and score of PyTorch's features as numpy's", "[features]") {
  const auto a = golden_inception_values("a.features"), b = golden_inception_values("b.features");
  const double fid = frechet_distance(statistics_of(a, 128), statistics_of(b, 128));
  // Features as float32, 6e-8 of what is ten times their deviation.
  CHECK(fid == Approx(golden_inception_values("fid")[0]).epsilon(1e-5));
  const auto logits = golden_inception_values("a.logits");
  ScoreSums s(24, 63);
  s.add(logits.data(), 11);
  s.add(logits.data() + 11 * 63, 13);
  const auto expected = golden_inception_values("a.inception_score");
  CHECK(s.score().mean == Approx(expected[0]).epsilon(1e-6));
  CHECK(s.score().deviation == Approx(expected[1]).epsilon(1e-6));
  // Where all logits are larger by 1000, whose exponentials are beyond double, nothing changes but
  // their rounding to 6e-5.
  std::vector<float> large = logits;
  for (float& v : large) v += 1000;
  ScoreSums l(24, 63);
  l.add(large.data(), 24);
  CHECK(l.score().mean == Approx(expected[0]).epsilon(1e-3));
}

TEST_CASE("features: what the files keep, and what is none", "[features]") {
  const TempFolder tmp;
  const std::string path = tmp / "statistics";
  const FeatureStatistics s{5, {1, 1.0 / 3}, {2, 0.1, 0.1, 1e-300}};
  write_statistics(path, {"d", "n", "1"}, s);
  const StoredStatistics r = read_statistics(path, 2);
  CHECK(r.source.data == "d");
  CHECK(r.source.network == "n");
  CHECK(r.source.code == "1");
  CHECK(r.statistics.count == 5);
  CHECK(r.statistics.mean == s.mean);
  CHECK(r.statistics.covariance == s.covariance);
  CHECK_THROWS_WITH(read_statistics(tmp / "none", 2), Contains("none"));
  CHECK_THROWS_WITH(read_statistics(path, 3), Contains("2 features") && Contains("another"));
  const std::string good = get_bytes(path);
  for (const auto& [from, to] : {std::pair{"\"5\"", "\"x\""},
                                 {"\"5\"", "\"1\""},
                                 {"\"mean\"", "\"main\""},
                                 {"[2,2]", "[1,4]"}}) {
    std::string bad = good;
    REQUIRE(bad.find(from) != std::string::npos);
    bad.replace(bad.find(from), std::string(from).size(), to);
    put_bytes(path, bad);
    INFO(bad.substr(8, 300));
    CHECK_THROWS_WITH(read_statistics(path, 2), Contains("remove the file"));
  }

  FeatureProgress p{{{"network", "n"}}, "cpu", FeatureSums(2), FeatureSums(2), ScoreSums(12, 3)};
  p.reference.add(std::vector<float>{1, 2, 3, 4}.data(), 2);
  p.images.add(std::vector<float>{5, 7}.data(), 1);
  p.score.add(std::vector<float>{0, 1, 2}.data(), 1);
  write_feature_progress(tmp / "p", p);
  FeatureProgress q{{{"network", "n"}}, "", FeatureSums(2), FeatureSums(2), ScoreSums(12, 3)};
  read_feature_progress(tmp / "p", q);
  CHECK(q.numerics == "cpu");
  CHECK(q.reference.count == 2);
  CHECK(q.reference.sum == p.reference.sum);
  CHECK(q.images.products == p.images.products);
  CHECK(q.score.p == p.score.p);
  CHECK(q.score.p_log_p == p.score.p_log_p);
  q.of = {{"network", "m"}};
  CHECK_THROWS_WITH(read_feature_progress(tmp / "p", q), Contains("network") && Contains("\"n\""));
  FeatureProgress wide{p.of, "", FeatureSums(3), FeatureSums(3), ScoreSums(12, 3)};
  CHECK_THROWS_WITH(read_feature_progress(tmp / "p", wide), Contains("remove the file"));
  CHECK_THROWS_WITH(read_statistics(tmp / "p", 2), Contains("no statistics"));
}

namespace {

// Two sets of images against each other.
EvalArgs between(const TempFolder& tmp) {
  write_tensors(tmp / "weights", inception_tensors());
  write_inception_images(tmp / "a", "a", 24);
  write_inception_images(tmp / "b", "b", 16);
  EvalArgs args;
  args.metric = "fid";
  args.images = tmp / "a";
  args.data = tmp / "b";
  args.inception = tmp / "weights";
  args.out = tmp / "fid.json";
  args.device.threads = 1;
  return args;
}

nlohmann::json result(const EvalArgs& args) {
  REQUIRE(run_eval(args) == Status::kOk);
  return nlohmann::json::parse(get_bytes(args.out));
}

Status status_of(const EvalArgs& args) {
  try {
    return run_eval(args);
  } catch (const Error& e) {
    return e.status();
  }
}

}  // namespace

TEST_CASE("eval: distance of two sets of images as PyTorch and numpy", "[features]") {
  const TempFolder tmp;
  EvalArgs args = between(tmp);
  args.statistics = tmp / "statistics";
  const nlohmann::json r = result(args);
  // The features' 3e-6 are 3e-5 of what they differ by, and it counts squared.
  const double fid = golden_inception_values("fid")[0];
  CHECK(r["fid"] == Approx(fid).epsilon(2e-4));
  CHECK(r["inception_score"] ==
        Approx(golden_inception_values("a.inception_score")[0]).epsilon(1e-4));
  CHECK(r["inception_score_std"] ==
        Approx(golden_inception_values("a.inception_score")[1]).epsilon(1e-4));
  CHECK(r["num"] == 24);
  CHECK(r["reference"]["num"] == 16);
  CHECK_FALSE(std::filesystem::exists(args.out + ".progress"));

  // From the statistics, with and without the data, the same result; from those of other data none.
  const std::string whole = get_bytes(args.out), statistics = get_bytes(args.statistics);
  result(args);
  CHECK((get_bytes(args.out) == whole));
  args.data = "";
  result(args);
  CHECK((get_bytes(args.out) == whole));
  CHECK((get_bytes(args.statistics) == statistics));
  args.data = tmp / "a";
  CHECK(result(args)["fid"] == Approx(0).margin(1e-9));
  CHECK((get_bytes(args.statistics) != statistics));

  // Another network.
  std::vector<HashTensor> other = inception_tensors();
  other[0].values[0] += 1;
  write_tensors(args.inception, other);
  args.data = "";
  CHECK_THROWS_WITH(run_eval(args), Contains("another inception network") && Contains("--data"));
  // A file of another kind is not written over.
  args.data = tmp / "b";
  args.statistics = args.inception;
  CHECK_THROWS_WITH(run_eval(args), Contains("no statistics"));

  args.statistics = "";
  args.data = "";
  args.metric = "is";
  args.num = 12;
  const nlohmann::json score = result(args);
  CHECK(score.contains("inception_score"));
  CHECK_FALSE(score.contains("fid"));
  CHECK(score["num"] == 12);
}

TEST_CASE("eval: what fid and is refuse", "[features]") {
  const TempFolder tmp;
  const EvalArgs good = between(tmp);
  EvalArgs args = good;
  args.inception = tmp / "none";
  CHECK(status_of(args) == Status::kConfig);
  CHECK_THROWS_WITH(run_eval(args), Contains("tools/convert_inception.py"));
  args.inception = "";
  CHECK(status_of(args) == Status::kUsage);
  args = good;
  args.images = "";
  CHECK(status_of(args) == Status::kUsage);
  args = good;
  args.model = tmp / "model";
  CHECK(status_of(args) == Status::kUsage);
  args = good;
  args.data = "";
  CHECK(status_of(args) == Status::kUsage);
  args = good;
  args.metric = "is";
  CHECK(status_of(args) == Status::kUsage);  // with --data
  args.data = "";
  args.num = 9;
  CHECK(status_of(args) == Status::kUsage);
  args = good;
  args.chain.sampler = "ddim";
  CHECK(status_of(args) == Status::kUsage);
  args.images = "";
  args.inception = "";
  args.model = tmp / "model";
  args.metric = "nll";
  CHECK_THROWS_WITH(run_eval(args), Contains("sampler's flags"));
  args = good;
  args.metric = "nll";
  CHECK(status_of(args) == Status::kUsage);
  args = good;
  args.num = 25;
  CHECK_THROWS_WITH(run_eval(args), Contains("24 images"));
  args = good;
  args.split = "train";
  CHECK_THROWS_WITH(run_eval(args), Contains("--split train"));
}

TEST_CASE("eval: a model's distance is that of the images that sample draws", "[features]") {
  const TempFolder tmp;
  EvalArgs args = between(tmp);
  args.num = 2;
  args.statistics = tmp / "beside images of their size";
  result(args);
  args.statistics = tmp / "beside smaller images";
  UNetConfig unet = small_unet();
  unet.num_class_embeds = 3;
  unet.null_class = true;
  save_small_model(tmp / "model", unet, {}, 0.3f);
  SampleArgs sample;
  sample.model = tmp / "model";
  sample.out = tmp / "drawn.safetensors";
  sample.chain.label = 1;
  sample.chain.guidance = 2;
  sample.num = 12;
  sample.seed = 3;
  sample.batch_size = 5;
  sample.chain.sampler = "ddim";
  sample.chain.steps = 5;
  sample.device.threads = 1;
  REQUIRE(run_sample(sample) == Status::kOk);
  const SafetensorsReader drawn(sample.out);
  std::vector<float> nchw(12 * 3 * 8 * 8);
  drawn.read_f32(*drawn.find("images"), nchw.data());
  const std::vector<uint8_t> pixels = to_uint8(to_nhwc(nchw, 12, 8, 8, 3));
  {
    OutputFile file(tmp / "drawn");
    write_safetensors(file, {tensor_in_memory("images", DType::kU8, {12, 8, 8, 3}, pixels.data())});
    file.commit();
  }
  args.images = tmp / "drawn";
  args.num = 0;
  args.batch_size = sample.batch_size;
  const nlohmann::json given = result(args);
  args.images = "";
  args.model = sample.model;
  args.num = 12;
  args.seed = 3;
  args.chain = sample.chain;
  const nlohmann::json of_model = result(args);
  CHECK(of_model["fid"] == given["fid"]);
  CHECK(of_model["inception_score"] == given["inception_score"]);
  CHECK(of_model["seed"] == 3);
  CHECK(
      (get_bytes(tmp / "beside smaller images") == get_bytes(tmp / "beside images of their size")));
}

TEST_CASE("eval: a model's distance, stopped by a signal and gone on with", "[features]") {
  const TempFolder tmp;
  EvalArgs args = between(tmp);
  args.images = "";
  args.model = tmp / "model";
  args.num = 12;
  args.seed = 3;
  args.batch_size = 4;
  args.chain.sampler = "ddim";
  args.chain.steps = 5;
  save_small_model(args.model, small_unet(), {}, 0.3f);
  args.out = tmp / "whole.json";
  args.statistics = tmp / "statistics";
  const nlohmann::json whole = result(args);
  CHECK(whole["num"] == 12);
  CHECK(whole["seed"] == 3);
  CHECK(whole["fid"] > 0.01);

  // Stopped among the images of the data set, and with statistics among the model's.
  const std::string log = tmp / "log", out = tmp / "parts.json";
  for (const bool known : {false, true}) {
    std::vector<std::string> words{
        "eval",    "--metric",    "fid",         "--model", args.model, "--data",
        args.data, "--num",       "12",          "--seed",  "3",        "--batch-size",
        "4",       "--sampler",   "ddim",        "--steps", "5",        "--threads",
        "1",       "--inception", args.inception};
    if (known) words.insert(words.end(), {"--statistics", args.statistics});
    words.insert(words.end(), {"--out", out});
    const int code = stopped_program(words, log, "images  ");
    INFO(get_bytes(log));
    REQUIRE(code == 75);
    CHECK_FALSE(std::filesystem::exists(out));
    REQUIRE(std::filesystem::exists(out + ".progress"));
    EvalArgs other = args;
    other.out = out;
    if (!known) other.statistics = "";
    other.chain.steps = 6;
    CHECK_THROWS_WITH(run_eval(other), Contains("another evaluation") && Contains("chain"));
    other.chain.steps = 5;
    result(other);
    CHECK((get_bytes(out) == get_bytes(args.out)));
    CHECK_FALSE(std::filesystem::exists(out + ".progress"));
  }
}
