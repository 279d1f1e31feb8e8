#include "model/config.h"

#include <algorithm>
#include <catch2/catch.hpp>
#include <map>
#include <nlohmann/json.hpp>

#include "engine/json.h"
#include "model/presets.h"
#include "model/run_config.h"
#include "model/schedule.h"

namespace {

using namespace ddpm;
using Catch::Contains;
using nlohmann::json;

// The published google/ddpm-cifar10-32.
const char* const kCifar10Unet = R"({
  "_class_name": "UNet2DModel", "_diffusers_version": "0.0.4", "act_fn": "silu",
  "attention_head_dim": null, "block_out_channels": [128, 256, 256, 256],
  "center_input_sample": false,
  "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"],
  "downsample_padding": 0, "flip_sin_to_cos": false, "freq_shift": 1, "in_channels": 3,
  "layers_per_block": 2, "mid_block_scale_factor": 1, "norm_eps": 1e-06, "norm_num_groups": 32,
  "out_channels": 3, "sample_size": 32, "time_embedding_type": "positional",
  "up_block_types": ["UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"]})";
const char* const kCifar10Scheduler = R"({
  "_class_name": "DDPMScheduler", "_diffusers_version": "0.1.1", "beta_end": 0.02,
  "beta_schedule": "linear", "beta_start": 0.0001, "clip_sample": true,
  "num_train_timesteps": 1000, "trained_betas": null, "variance_type": "fixed_large"})";

// Every key that diffusers 0.42 saves, where it saves its defaults.
const char* const kSavedUnet = R"({
  "_class_name": "UNet2DModel", "_diffusers_version": "0.42.1", "_name_or_path": "x/y",
  "act_fn": "silu", "add_attention": true, "attention_head_dim": 8,
  "attn_norm_num_groups": null, "block_out_channels": [224, 448, 672, 896],
  "center_input_sample": false, "class_embed_type": null,
  "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"],
  "downsample_padding": 1, "downsample_type": "conv", "dropout": 0.0, "flip_sin_to_cos": true,
  "freq_shift": 0, "in_channels": 3, "layers_per_block": 2, "mid_block_scale_factor": 1,
  "mid_block_type": "UNetMidBlock2D", "norm_eps": 1e-05, "norm_num_groups": 32,
  "num_class_embeds": null, "num_train_timesteps": null, "out_channels": 3,
  "resnet_time_scale_shift": "default", "sample_size": [64, 32], "time_embedding_dim": null,
  "time_embedding_type": "positional",
  "up_block_types": ["AttnUpBlock2D", "AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
  "upsample_type": "conv"})";
const char* const kSavedDpmSolver = R"({
  "_class_name": "DPMSolverMultistepScheduler", "_diffusers_version": "0.42.1",
  "algorithm_type": "dpmsolver++", "beta_end": 0.02, "beta_schedule": "linear",
  "beta_start": 0.0001, "dynamic_thresholding_ratio": 0.995, "euler_at_final": false,
  "final_sigmas_type": "zero", "flow_shift": 1.0, "lambda_min_clipped": -Infinity,
  "lower_order_final": true, "num_train_timesteps": 1000, "prediction_type": "epsilon",
  "rescale_betas_zero_snr": false, "sample_max_value": 1.0, "solver_order": 2,
  "solver_type": "midpoint", "steps_offset": 0, "thresholding": false,
  "time_shift_type": "exponential", "timestep_spacing": "linspace", "trained_betas": null,
  "use_beta_sigmas": false, "use_dynamic_shifting": false, "use_exponential_sigmas": false,
  "use_flow_sigmas": false, "use_karras_sigmas": false, "use_lu_lambdas": false,
  "variance_type": null})";
const char* const kSavedDdim = R"({
  "_class_name": "DDIMScheduler", "_diffusers_version": "0.42.1", "beta_end": 0.02,
  "beta_schedule": "linear", "beta_start": 0.0001, "clip_sample": true,
  "clip_sample_range": 1.0, "dynamic_thresholding_ratio": 0.995, "num_train_timesteps": 1000,
  "prediction_type": "epsilon", "rescale_betas_zero_snr": false, "sample_max_value": 1.0,
  "set_alpha_to_one": true, "steps_offset": 0, "thresholding": false,
  "timestep_spacing": "leading", "trained_betas": null})";

json cifar10() { return json::parse(kCifar10Unet); }

// The message of the Error(status) that `call` throws.
template <typename F>
std::string error_of(Status status, F call) {
  try {
    call();
  } catch (const Error& e) {
    CHECK(e.status() == status);
    return e.what();
  }
  return "no error";
}

std::string unet_error(const json& j) {
  return error_of(Status::kConfig, [&] { unet_from_json(j, "config.json"); });
}

std::string unet_error(const char* key, const json& value) {
  json j = cifar10();
  j[key] = value;
  return unet_error(j);
}

std::string scheduler_error(const char* key, const json& value) {
  return error_of(Status::kConfig, [&] {
    scheduler_from_json({{key, value}}, "scheduler_config.json");
  });
}

}  // namespace

TEST_CASE("config: the published CIFAR-10 model is the preset", "[config]") {
  UNetConfig expected = find_preset("cifar10").unet;
  expected.dropout = 0;
  CHECK(parse_unet_config(kCifar10Unet, "config.json") == expected);
  CHECK(parse_scheduler_config(kCifar10Scheduler, "scheduler_config.json") ==
        find_preset("cifar10").scheduler);
}

TEST_CASE("config: diffusers' defaults", "[config]") {
  UNetConfig expected;
  expected.sample_height = 64;
  expected.sample_width = 32;
  CHECK(parse_unet_config(kSavedUnet, "config.json") == expected);
  // Missing and written defaults are the same; only sample_size has none.
  CHECK(unet_from_json({{"sample_size", {64, 32}}}, "config.json") == expected);
  CHECK(*expected.attention_head_dim == 8);
  CHECK(expected.heads(448) == 56);
  CHECK(expected.time_embed_dim() == 896);
  CHECK(scheduler_from_json(json::object(), "s") == SchedulerConfig{});
  CHECK(parse_scheduler_config(kSavedDdim, "s") == SchedulerConfig{});
  CHECK(parse_scheduler_config(kSavedDpmSolver, "s") == SchedulerConfig{});
  CHECK(scheduler_from_json({{"timestep_spacing", "trailing"}}, "s") == SchedulerConfig{});
}

TEST_CASE("config: every honoured key is read and written", "[config]") {
  const json j = {{"_class_name", "UNet2DModel"},
                  {"attention_head_dim", 12},
                  {"block_out_channels", {12, 24, 36}},
                  {"down_block_types", {"AttnDownBlock2D", "DownBlock2D", "DownBlock2D"}},
                  {"downsample_padding", 0},
                  {"dropout", 0.25},
                  {"flip_sin_to_cos", false},
                  {"freq_shift", 1},
                  {"in_channels", 4},
                  {"layers_per_block", 3},
                  {"norm_eps", 1e-6},
                  {"norm_num_groups", 6},
                  {"num_class_embeds", 10},
                  {"out_channels", 8},
                  {"sample_size", {20, 12}},
                  {"up_block_types", {"UpBlock2D", "AttnUpBlock2D", "UpBlock2D"}}};
  UNetConfig expected;
  expected.sample_height = 20;
  expected.sample_width = 12;
  expected.in_channels = 4;
  expected.out_channels = 8;
  expected.layers_per_block = 3;
  expected.block_out_channels = {12, 24, 36};
  expected.down_attention = {true, false, false};
  expected.up_attention = {false, true, false};
  expected.norm_num_groups = 6;
  expected.norm_eps = 1e-6;
  expected.attention_head_dim = 12;
  expected.flip_sin_to_cos = false;
  expected.freq_shift = 1;
  expected.downsample_padding = 0;
  expected.dropout = 0.25;
  expected.num_class_embeds = 10;
  CHECK(unet_from_json(j, "config.json") == expected);
  CHECK(json(to_json(expected)) == j);

  const json s = {{"_class_name", "DDPMScheduler"},
                  {"beta_end", 0.012},
                  {"beta_schedule", "scaled_linear"},
                  {"beta_start", 0.00085},
                  {"clip_sample", false},
                  {"clip_sample_range", 2.5},
                  {"num_train_timesteps", 500},
                  {"prediction_type", "v_prediction"},
                  {"variance_type", "fixed_large"}};
  const SchedulerConfig scheduler{500,
                                  BetaSchedule::kScaledLinear,
                                  0.00085,
                                  0.012,
                                  PredictionType::kVPrediction,
                                  VarianceType::kFixedLarge,
                                  false,
                                  2.5};
  CHECK(scheduler_from_json(s, "s") == scheduler);
  CHECK(json(to_json(scheduler)) == s);
  for (const auto kind :
       {BetaSchedule::kLinear, BetaSchedule::kScaledLinear, BetaSchedule::kSquaredcosCapV2,
        BetaSchedule::kSigmoid, BetaSchedule::kConst, BetaSchedule::kWarmup10,
        BetaSchedule::kWarmup50, BetaSchedule::kJsd})
    CHECK(scheduler_from_json({{"beta_schedule", name_of(kind)}}, "s").beta_schedule == kind);
  for (const auto kind : {PredictionType::kEpsilon, PredictionType::kSample,
                          PredictionType::kVPrediction, PredictionType::kPreviousMean})
    CHECK(scheduler_from_json({{"prediction_type", name_of(kind)}}, "s").prediction_type == kind);
  for (const auto kind : {VarianceType::kFixedSmall, VarianceType::kFixedLarge,
                          VarianceType::kLearned, VarianceType::kLearnedRange})
    CHECK(scheduler_from_json({{"variance_type", name_of(kind)}}, "s").variance_type == kind);
}

TEST_CASE("config: the written text is diffusers' style", "[config]") {
  CHECK(to_text(to_json(SchedulerConfig{})) ==
        "{\n  \"_class_name\": \"DDPMScheduler\",\n  \"beta_end\": 0.02,\n"
        "  \"beta_schedule\": \"linear\",\n  \"beta_start\": 0.0001,\n"
        "  \"clip_sample\": true,\n  \"clip_sample_range\": 1.0,\n"
        "  \"num_train_timesteps\": 1000,\n  \"prediction_type\": \"epsilon\",\n"
        "  \"variance_type\": \"fixed_small\"\n}\n");
  const std::string text = to_text(to_json(find_preset("tiny").unet));
  CHECK_THAT(text, Contains("\"attention_head_dim\": null") &&
                       Contains("\"block_out_channels\": [\n    32,\n    64,\n    64\n  ]") &&
                       Contains("\"norm_eps\": 1e-06") && Contains("\"sample_size\": 16"));
  CHECK(parse_unet_config(text, "x") == find_preset("tiny").unet);
}

TEST_CASE("config: values that mean another network", "[config]") {
  const std::pair<const char*, json> bad[] = {{"_class_name", "UNet2DConditionModel"},
                                              {"act_fn", "gelu"},
                                              {"add_attention", false},
                                              {"attn_norm_num_groups", 8},
                                              {"center_input_sample", true},
                                              {"class_embed_type", "timestep"},
                                              {"downsample_type", "resnet"},
                                              {"mid_block_scale_factor", 0.5},
                                              {"mid_block_type", nullptr},
                                              {"num_train_timesteps", 1000},
                                              {"resnet_time_scale_shift", "scale_shift"},
                                              {"time_embedding_dim", 128},
                                              {"time_embedding_type", "fourier"},
                                              {"upsample_type", "resnet"},
                                              {"sample_size", "32"},
                                              {"sample_size", 0},
                                              {"sample_size", nullptr},
                                              {"sample_size", 1 << 20},
                                              {"sample_size", 32.0},
                                              {"sample_size", {32}},
                                              {"sample_size", {32, 32, 3}},
                                              {"in_channels", 0},
                                              {"in_channels", 18446744073709551615u},
                                              {"out_channels", -1},
                                              {"layers_per_block", 0},
                                              {"layers_per_block", 2.5},
                                              {"layers_per_block", 1000},
                                              {"block_out_channels", 128},
                                              {"block_out_channels", {128, 256, 256, 0}},
                                              {"block_out_channels", {128, "256", 256, 256}},
                                              {"block_out_channels", json::array()},
                                              {"down_block_types", "DownBlock2D"},
                                              {"norm_num_groups", 0},
                                              {"norm_num_groups", nullptr},
                                              {"norm_eps", 0},
                                              {"norm_eps", "1e-6"},
                                              {"norm_eps", 2},
                                              {"attention_head_dim", 0},
                                              {"attention_head_dim", {8, 8}},
                                              {"flip_sin_to_cos", 1},
                                              {"freq_shift", -1},
                                              {"freq_shift", 64},
                                              {"downsample_padding", 2},
                                              {"dropout", 1.0},
                                              {"dropout", -0.1},
                                              {"num_class_embeds", 0}};
  for (const auto& [key, value] : bad) {
    INFO(key << " = " << value);
    CHECK_THAT(unet_error(key, value), Contains(key) && Contains("config.json"));
  }
  CHECK_THAT(unet_error("act_fn", "gelu"), Contains("\"gelu\"") && Contains("\"silu\""));
  CHECK_THAT(unet_error("down_block_types", {"DownBlock2D", "SkipDownBlock2D"}),
             Contains("SkipDownBlock2D") && Contains("AttnDownBlock2D"));
  CHECK_THAT(unet_error("layer_per_block", 2),
             Contains("layer_per_block") && Contains("layers_per_block"));
  json j = cifar10();
  j.erase("sample_size");
  CHECK_THAT(unet_error(j), Contains("sample_size") && Contains("missing"));
  CHECK_THAT(unet_error(json::array()), Contains("object"));
  j = cifar10();
  j["_anything"] = {1, 2};
  CHECK(unet_error(j) == "no error");
}

TEST_CASE("config: sizes that do not fit together", "[config]") {
  CHECK_THAT(unet_error("sample_size", 30), Contains("multiples of 8") && Contains("32"));
  CHECK_THAT(unet_error("sample_size", {32, 36}), Contains("32x36") && Contains("multiples of 8"));
  CHECK_THAT(unet_error("norm_num_groups", 48), Contains("128") && Contains("48"));
  CHECK_THAT(unet_error("attention_head_dim", 96), Contains("256") && Contains("96"));
  CHECK_THAT(unet_error("out_channels", 5), Contains("5") && Contains("in_channels 3"));
  CHECK(unet_error("out_channels", 6) == "no error");
  CHECK_THAT(unet_error("block_out_channels", {128, 256, 256}), Contains("3, 4 and 4"));
  CHECK_THAT(unet_error("up_block_types", {"UpBlock2D"}), Contains("4, 4 and 1"));
  // Levels without attention do not need whole heads.
  json j = cifar10();
  j["block_out_channels"] = {32, 64, 96, 128};
  j["attention_head_dim"] = 64;
  CHECK(unet_error(j) == "no error");
  // The middle block is at the last level, attention above it or not; up_block_types run upwards.
  j["block_out_channels"] = {32, 64, 128, 96};
  CHECK_THAT(unet_error(j), Contains("96 is not a multiple of attention_head_dim 64"));
  j["block_out_channels"] = {32, 64, 96, 128};
  j["up_block_types"] = {"UpBlock2D", "AttnUpBlock2D", "UpBlock2D", "UpBlock2D"};
  CHECK_THAT(unet_error(j), Contains("96 is not a multiple of attention_head_dim 64"));
}

TEST_CASE("config: a schedule that diffusers has no word for takes its betas along", "[config]") {
  SchedulerConfig c;
  c.beta_schedule = BetaSchedule::kJsd;
  c.num_train_timesteps = 4;
  const json written = to_diffusers_json(c);
  CHECK(written["trained_betas"] == json{0.25, 1.0 / 3, 0.5, 1.0});
  CHECK(parse_scheduler_config(written.dump(), "s") == c);
  CHECK(scheduler_from_json(json(to_json(c)), "s") == c);  // a run's config has the word alone
  json other = written;
  other["trained_betas"][1] = 0.3;
  CHECK_THAT(error_of(Status::kConfig, [&] { parse_scheduler_config(other.dump(), "s"); }),
             Contains("trained_betas") && Contains("jsd"));
  other = written;
  other["num_train_timesteps"] = 5;
  CHECK_THAT(error_of(Status::kConfig, [&] { parse_scheduler_config(other.dump(), "s"); }),
             Contains("trained_betas"));
  c.beta_schedule = BetaSchedule::kSigmoid;  // diffusers' own
  CHECK_FALSE(to_diffusers_json(c).contains("trained_betas"));
  // The longest there can be.
  c.beta_schedule = BetaSchedule::kJsd;
  c.num_train_timesteps = 100000;
  CHECK(parse_scheduler_config(to_text(to_diffusers_json(c)), "s") == c);
}

TEST_CASE("config: schedulers that mean another process", "[config]") {
  const std::pair<const char*, json> bad[] = {{"_class_name", "PNDMScheduler"},
                                              {"num_train_timesteps", 1},
                                              {"num_train_timesteps", 1e3},
                                              {"num_train_timesteps", 10000000},
                                              {"beta_schedule", "laplace"},
                                              {"beta_start", 0},
                                              {"beta_end", 1},
                                              {"beta_end", nullptr},
                                              {"prediction_type", "flow_prediction"},
                                              {"variance_type", "fixed_small_log"},
                                              {"clip_sample", "yes"},
                                              {"clip_sample_range", 0},
                                              {"timestep_spacing", "karras"},
                                              {"steps_offset", 1},
                                              {"trained_betas", {0.1, 0.2}},
                                              {"thresholding", true},
                                              {"rescale_betas_zero_snr", true},
                                              {"set_alpha_to_one", false},
                                              {"sample_max_value", 2},
                                              {"dynamic_thresholding_ratio", 0.9},
                                              {"solver_order", 3},
                                              {"algorithm_type", "sde-dpmsolver++"},
                                              {"final_sigmas_type", "sigma_min"},
                                              {"use_karras_sigmas", true},
                                              {"lambda_min_clipped", -5.1},
                                              {"beta_strat", 0.1}};
  for (const auto& [key, value] : bad) {
    INFO(key << " = " << value);
    CHECK_THAT(scheduler_error(key, value), Contains(key) && Contains("scheduler_config.json"));
  }
  CHECK_THAT(scheduler_error("beta_schedule", "laplace"),
             Contains("linear") && Contains("scaled_linear") && Contains("squaredcos_cap_v2"));
  CHECK_THAT(error_of(Status::kConfig,
                      [] {
                        scheduler_from_json({{"beta_start", 2}}, "config.json", "scheduler");
                      }),
             Contains("config.json") && Contains("scheduler.beta_start"));
}

TEST_CASE("config: text that is not JSON", "[config]") {
  for (const char* text : {"", "{", "[]", "{\"sample_size\": 32,}", "{\"sample_size\": NaN}",
                           "{\"sample_size\": 32, \"sample_size\": 32}"}) {
    INFO(text);
    CHECK_THAT(error_of(Status::kConfig, [&] { parse_unet_config(text, "config.json"); }),
               Contains("config.json"));
    CHECK_THAT(error_of(Status::kConfig, [&] { parse_scheduler_config(text, "config.json"); }),
               Contains("config.json"));
  }
  // Only the bare word of Python's minus infinity is let through, and only where null would be.
  const auto error = [](const char* text) {
    return error_of(Status::kConfig, [&] { parse_scheduler_config(text, "s"); });
  };
  CHECK(error(R"({"lambda_min_clipped": -Infinity, "_note": "\" -Infinity"})") == "no error");
  CHECK_THAT(error(R"({"lambda_min_clipped": "-Infinity"})"), Contains("\"-Infinity\""));
  CHECK_THAT(error(R"({"beta_start": -Infinity})"), Contains("beta_start"));
  CHECK_THAT(error(R"({"beta_schedule": "\" -Infinity"})"), Contains("-Infinity"));
  CHECK_THAT(error(R"({"lambda_min_clipped": Infinity})"), Contains("not usable"));
  CHECK_THAT(error(R"({"_note": "\)"), Contains("not usable"));
}

TEST_CASE("presets: the paper's networks", "[config]") {
  REQUIRE(presets().size() == 4);
  for (const Preset& p : presets()) {
    INFO(p.name);
    CHECK(&find_preset(p.name) == &p);
    CHECK(unet_from_json(json(to_json(p.unet)), p.name) == p.unet);
    CHECK(scheduler_from_json(json(to_json(p.scheduler)), p.name) == p.scheduler);
    CHECK(Schedule(p.scheduler).ab.back() == Approx(4.03582977e-05).epsilon(1e-8));
    CHECK(p.train.dropout == p.unet.dropout);
    CHECK(p.unet.heads(p.unet.block_out_channels.back()) == 1);
  }
  const Preset& cifar = find_preset("cifar10");
  CHECK(cifar.train == TrainDefaults{128, 800000, 2e-4, 5000, 1, 0.9999, 0.1, true});
  CHECK(cifar.scheduler.variance_type == VarianceType::kFixedLarge);
  const Preset& faces = find_preset("celebahq256");
  CHECK(faces.train == TrainDefaults{64, 500000, 2e-5, 5000, 1, 0.9999, 0, true});
  CHECK(faces.scheduler.variance_type == VarianceType::kFixedSmall);
  CHECK(faces.unet.sample_height == 256);
  CHECK(faces.unet.block_out_channels == std::vector<int>{128, 128, 256, 256, 512, 512});
  CHECK(faces.unet.down_attention == std::vector<bool>{false, false, false, false, true, false});
  CHECK(faces.unet.up_attention == std::vector<bool>{false, true, false, false, false, false});
  CHECK(find_preset("lsun256").unet == faces.unet);
  CHECK(find_preset("lsun256").train.steps == 1200000);
  const Preset& tiny = find_preset("tiny");
  CHECK(tiny.unet.down_attention == std::vector<bool>{false, true, true});
  CHECK(tiny.unet.up_attention == std::vector<bool>{true, true, false});

  CHECK_THAT(error_of(Status::kUsage, [] { find_preset("cifar100"); }),
             Contains("cifar100") && Contains("\"cifar10\""));
  CHECK_THAT(error_of(Status::kUsage, [] { find_preset(""); }), Contains("lsun256"));
}

TEST_CASE("config: every variance and loss that go together, and why the others do not",
          "[config]") {
  const auto error = [](const std::string& variance, const std::string& loss, int out_channels,
                        const json& train = json::object(),
                        const json& scheduler = json::object()) {
    RunConfig c = run_config_of(find_preset("tiny"));
    json j(to_json(c));
    j["unet"]["out_channels"] = out_channels;
    j["scheduler"]["variance_type"] = variance;
    j["train"]["loss"] = loss;
    j["train"].update(train);
    j["scheduler"].update(scheduler);
    return error_of(Status::kConfig, [&] {
      const RunConfig read = run_config_from_json(j, "run.json");
      CHECK(json(to_json(read)) == j);
    });
  };
  const std::map<std::string, std::vector<std::string>> legal = {
      {"fixed_small", {"simple", "kl"}},
      {"fixed_large", {"simple", "kl"}},
      {"learned", {"kl"}},
      {"learned_range", {"kl", "hybrid"}}};
  for (const auto& [variance, losses] : legal) {
    const bool learned = variance.starts_with("learned");
    for (const std::string loss : {"simple", "kl", "hybrid"}) {
      INFO(variance << " " << loss);
      const std::string text = error(variance, loss, learned ? 6 : 3);
      if (std::find(losses.begin(), losses.end(), loss) != losses.end()) {
        CHECK(text == "no error");
        for (const char* prediction : {"epsilon", "sample", "v_prediction", "previous_mean"})
          for (const char* timesteps : {"uniform", "loss_second_moment"})
            CHECK(error(variance, loss, learned ? 6 : 3, {{"timesteps", timesteps}},
                        {{"prediction_type", prediction}}) == "no error");
      } else {
        CHECK_THAT(text, Contains("train.loss \"" + loss + "\"") &&
                             Contains("scheduler.variance_type \"" + variance + "\""));
      }
      CHECK_THAT(error(variance, loss, learned ? 3 : 6),
                 Contains("variance_type \"" + variance + "\"") && Contains("out_channels"));
    }
  }
  CHECK_THAT(error("fixed_small", "kl", 3, json::object(), {{"beta_schedule", "jsd"}}),
             Contains("train.loss") && Contains("beta_schedule") && Contains("prediction_type"));
  CHECK(error("fixed_small", "simple", 3, json::object(), {{"beta_schedule", "jsd"}}) ==
        "no error");
  CHECK(error("fixed_small", "kl", 3, json::object(),
              {{"beta_schedule", "jsd"}, {"prediction_type", "sample"}}) == "no error");
  for (const char* field : {"reduction_shards", "accumulate"})
    CHECK_THAT(error("fixed_small", "simple", 3, {{"timesteps", "loss_second_moment"}, {field, 2}}),
               Contains("train.timesteps") && Contains(std::string("train.") + field));
  // Labels that are dropped need an embedding that stands for none.
  CHECK_THAT(error("fixed_small", "simple", 3, {{"label_dropout", 0.1}}),
             Contains("train.label_dropout") && Contains("unet.num_class_embeds"));
  CHECK_THAT(error("fixed_small", "l1", 3), Contains("\"l1\"") && Contains("hybrid"));
}

TEST_CASE("config: the embedding that stands for no class", "[config]") {
  json j = cifar10();
  j["num_class_embeds"] = 11;
  CHECK(parse_unet_config(j.dump(), "x").classes() == 11);
  j["_null_class"] = 10;
  const UNetConfig u = parse_unet_config(j.dump(), "x");
  CHECK(u.null_class);
  CHECK(u.classes() == 10);
  CHECK(unet_from_json(json(to_json(u)), "x") == u);
  for (const json& bad : {json(9), json(11), json("10"), json(nullptr)}) {
    j["_null_class"] = bad;
    CHECK_THAT(unet_error(j), Contains("_null_class"));
  }
  j["_null_class"] = 10;
  j.erase("num_class_embeds");
  CHECK_THAT(unet_error(j), Contains("_null_class"));
  // Of a run it is what train.label_dropout says.
  json run(to_json(run_config_of(find_preset("tiny"))));
  run["unet"]["num_class_embeds"] = 4;
  CHECK(run_config_from_json(run, "run.json").unet.classes() == 4);
  run["train"]["label_dropout"] = 0.1;
  const RunConfig c = run_config_from_json(run, "run.json");
  CHECK(c.unet.classes() == 3);
  CHECK(json(to_json(c)) == run);
}
