// The estimate of a training's time: the work counted by hand, and where its words come from.
#include <catch2/catch.hpp>

#include <nlohmann/json.hpp>

#include "model/presets.h"
#include "model/trainer.h"
#include "tests/child.h"
#include "tests/temp_folder.h"
#include "tools/ceilings.h"
#include "tools/estimate.h"
#include "tools/metrics.h"

using namespace ddpm;
using namespace ddpm::test;
using namespace ddpm::tools;
using Catch::Contains;

TEST_CASE("estimate: a step's multiply-adds as counted by hand", "[estimate]") {
  UNetConfig u = find_preset("tiny").unet;  // on 4x4 images, one level, 8 channels
  u.sample_height = u.sample_width = 4;
  u.block_out_channels = {8};
  u.down_attention = u.up_attention = {false};
  u.norm_num_groups = 4;
  REQUIRE(u.layers_per_block == 1);
  const int64_t pixels = 16, batch = 2;
  const int64_t conv_in = pixels * 9 * 3 * 8, conv_out = pixels * 9 * 8 * 3;
  const int64_t conv = pixels * 9 * 8 * 8;
  // Two of each of three residual blocks; of two in the up block the first reads 16 channels and
  // has a shortcut.
  const int64_t convs =
      conv_in + 3 * 2 * conv + 2 * (pixels * 9 * 16 * 8 + conv + pixels * 16 * 8) + conv_out;
  // In the middle: q, k and v, and the output.
  const int64_t linear = pixels * 8 * (3 * 8 + 8);
  // 8 to 32 to 32 to a row of 8 for each of five blocks.
  const int64_t first_linear = 8 * 32, time = first_linear + 32 * 32 + 32 * 5 * 8;
  // A product with its two gradients, but for the inputs of the first ones; attention has two
  // products, and five going back.
  const int64_t step =
      3 * (convs + linear + time) - conv_in - first_linear + (2 + 5) * pixels * pixels * 8;
  const auto backend = make_cpu_backend({.threads = 1});
  TrainerOptions o;
  o.batch_size = static_cast<int>(batch);
  const TrainingGraph t = build_training_graph(*backend, u, SchedulerConfig{}, o, 1);
  CHECK(step_macs(t.graph) == batch * step);
}

TEST_CASE("estimate: what it says", "[estimate]") {
  // 2 GFLOP at four fifths of 5 GFLOP/s are half a second.
  const StepEstimate e{.macs = 1e9, .product_rate = 2.5e9};
  CHECK(e.seconds() == Approx(0.5));
  CHECK(
      estimate_text(4000, e, "fp32") ==
      "about 33 min 20 s for 4,000 steps: 2 GFLOP a step at 4 GFLOP/s, 80 % of a matrix product's "
      "rate here (fp32)");
  CHECK(estimate_text(72000, 0.0504) ==
        "about 1 h 00 min for 72,000 steps: 50.4 ms a step, as this run measured it last");
  const auto backend = make_cpu_backend({.threads = 1});
  CHECK(product_rate(*backend, 64, 3) > 1e6);
}

TEST_CASE("estimate: what a run measured last", "[estimate]") {
  const TempFolder tmp;
  CHECK_FALSE(last_step_seconds(tmp.path(), 9, 8, 1));
  put_bytes(tmp / "metrics.jsonl",
            "{\"step\":1,\"images_per_second\":100}\n{\"step\":2,\"images_per_second\":16}\n"
            "{\"step\":3,\"images_per_second\":4,\"ranks\":2}\n{\"step\":4}\n{\"step\":5,\"ima");
  CHECK(last_step_seconds(tmp.path(), 1, 8, 1) == Approx(0.08));
  CHECK(last_step_seconds(tmp.path(), 2, 8, 1) == Approx(0.5));
  CHECK_FALSE(last_step_seconds(tmp.path(), 2, 8, 2));
  CHECK(last_step_seconds(tmp.path(), 3, 8, 2) == Approx(2));
  CHECK_FALSE(last_step_seconds(tmp.path(), 3, 8, 1));
  CHECK_FALSE(last_step_seconds(tmp.path(), 9, 8, 1));
}

TEST_CASE("estimate: train says it before its first step", "[estimate]") {
  const TempFolder tmp;
  const auto train = [&](const std::string& steps, const char* threads = "--threads 1") {
    std::string command = train_command(tmp / "run", "--batch-size 4 --steps " + steps);
    command.replace(command.find("--threads 1"), 11, threads);
    const int code = Child(command, tmp / "log").wait();
    const std::string log = get_bytes(tmp / "log");
    INFO(log);
    REQUIRE(code == 0);
    return log.substr(0, log.find("\nstep "));
  };
  CHECK_THAT(train("2"), Contains("\nestimate about ") && Contains(" for 2 steps: ") &&
                             Contains("of a matrix product's rate here (F32)"));
  const std::string metrics = get_bytes(tmp / "run/metrics.jsonl");
  const auto last = nlohmann::json::parse(metrics.substr(metrics.find('\n')));
  const double ms = 4e3 / last["images_per_second"].get<double>();
  CHECK_THAT(train("5"), Contains(format(" for 3 steps: %.3g ms a step, as this run", ms)));
  // On two threads it has measured nothing; and where nothing is left to do nothing is said.
  CHECK_THAT(train("6", "--threads 2"), Contains("of a matrix product's rate"));
  CHECK_THAT(train("6"), !Contains("estimate"));
}
