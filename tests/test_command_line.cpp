// The program as a user meets it: what each bad input gives (one line, its exit code, nothing left
// behind), and a run from data to pictures.
#include <catch2/catch.hpp>

#include <sys/wait.h>

#include <algorithm>
#include <cstdio>
#include <filesystem>
#include <map>
#include <nlohmann/json.hpp>
#include <sstream>

#include "engine/safetensors.h"
#include "engine/shapes.h"
#include "model/pipeline.h"
#include "model/presets.h"
#include "model/trainer.h"
#include "tests/temp_folder.h"
#include "tools/image_io.h"

using namespace ddpm;
using test::get_bytes;
using test::put_bytes;
using test::TempFolder;

namespace {

struct Result {
  int exit_code = -1;
  std::string text;  // stdout and stderr

  bool says(const std::string& part) const { return text.find(part) != std::string::npos; }
  // The error is one line.
  std::string error() const {
    const size_t at = text.find("ddpm: ");
    return at == std::string::npos ? "" : text.substr(at);
  }
};

Result run(const std::string& arguments) {
  Result r;
  FILE* pipe = popen(("exec 2>&1; " DDPM_PROGRAM " " + arguments).c_str(), "r");
  REQUIRE(pipe != nullptr);
  char buffer[4096];
  for (size_t got; (got = fread(buffer, 1, sizeof(buffer), pipe)) > 0;) r.text.append(buffer, got);
  const int status = pclose(pipe);
  r.exit_code = WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
  return r;
}

// A small network's settings, so that a run takes a moment.
const std::string kSmall =
    " --set unet.block_out_channels=[8,8,8] --set unet.norm_num_groups=4 --set unet.sample_size=8"
    " --set train.sample_every=0 --batch-size 4";

Result train(const TempFolder& tmp, const std::string& more) {
  return run("train --data shapes --out " + tmp / "run" + kSmall + " " + more);
}

void check_fails(const Result& r, Status status, const std::string& part) {
  INFO(r.text);
  CHECK(r.exit_code == static_cast<int>(status));
  const std::string error = r.error();
  CHECK(error.find(part) != std::string::npos);
  CHECK(std::count(error.begin(), error.end(), '\n') == 1);
}

// A trained model every test may read.
const TempFolder& trained() {
  static const TempFolder tmp;
  static const Result r = train(tmp, "--steps 4 --save-every 2");
  INFO(r.text);
  REQUIRE(r.exit_code == 0);
  return tmp;
}

std::string copy_of_model(const TempFolder& tmp) {
  const std::string to = tmp / "model";
  std::filesystem::copy(checkpoint_folder(trained() / "run", 4), to,
                        std::filesystem::copy_options::recursive);
  return to;
}

}  // namespace

TEST_CASE("command line: help names what there is, and nothing else", "[command_line]") {
  const Result help = run("--help");
  CHECK(help.exit_code == 0);
  for (const char* command : {"train", "replay", "sample", "progressive", "interpolate", "eval",
                              "paper", "probe", "pack", "info", "bench", "doctor"}) {
    CHECK(help.says(command));
    CHECK(run(std::string(command) + " --help").exit_code == 0);
  }
  const Result version = run("--version");
  CHECK(version.exit_code == 0);
  CHECK(version.says("oneDNN"));
  CHECK(run("doctor").says("cpu       ok"));
}

TEST_CASE("command line: what is mistyped is exit 2 with the nearest name", "[command_line]") {
  const TempFolder tmp;
  check_fails(run("train --data shapes --stepz 3"), Status::kUsage, "--steps");
  check_fails(run("trian"), Status::kUsage, "train");
  check_fails(run("train --data shapes --preset cifar11"), Status::kUsage, "cifar10");
  check_fails(run(""), Status::kUsage, "subcommand");
  check_fails(run("train"), Status::kUsage, "--data");
  check_fails(train(tmp, "--set train.lerning_rate=1"), Status::kUsage, "train.learning_rate");
  check_fails(train(tmp, "--device cdua"), Status::kUsage, "cuda");
  check_fails(train(tmp, "--precision bf16"), Status::kUsage, "CPU computes in fp32");
  check_fails(train(tmp, "--threads 0"), Status::kUsage, "--threads");
  const std::string sample = "sample --model " + trained() / "run" + " --out " + tmp / "x.png";
  check_fails(run(sample + " --sampler ddpmm"), Status::kUsage, "ddpm");
  check_fails(run(sample + " --eta 0.5"), Status::kUsage, "ddim");
  check_fails(run(sample + " --steps 1001"), Status::kUsage, "1000");
  check_fails(run(sample + " --steps 0"), Status::kUsage, "1");
  check_fails(run(sample + " --num 0"), Status::kUsage, "--num");
  check_fails(run(sample + " --timesteps 0,1000"), Status::kUsage, "1000");
  check_fails(run(sample + " --timesteps 0,10 --steps 2"), Status::kUsage, "--steps");
  check_fails(run(sample + " --strength 0.5"), Status::kUsage, "--from");
  check_fails(run(sample + " --from shapes --strength 2"), Status::kUsage, "strength");
  check_fails(run(sample + " --from shapes --init x"), Status::kUsage, "--init");
  check_fails(run(sample + " --invert shapes"), Status::kUsage, ".safetensors");
  check_fails(run(sample + " --suspend-at 3"), Status::kUsage, "--suspend");
  check_fails(run(sample + " --resume x --steps 3"), Status::kUsage, "--steps");
  check_fails(run(sample + " --resume " + tmp / "x"), Status::kConfig, tmp / "x");
  check_fails(run("info"), Status::kUsage, "--preset");
  CHECK(std::filesystem::is_empty(tmp.path()));
}

TEST_CASE("command line: no GPU is exit 6", "[command_line]") {
  const TempFolder tmp;
  check_fails(train(tmp, "--device cuda"), Status::kDevice, "--device cpu");
  CHECK(std::filesystem::is_empty(tmp.path()));
}

TEST_CASE("command line: data that cannot be trained on", "[command_line]") {
  const TempFolder tmp;
  const auto data = [&](const std::string& path) {
    return run("train --data " + path + " --out " + tmp / "run" + kSmall);
  };
  check_fails(data(tmp / "absent"), Status::kConfig, "absent");
  std::filesystem::create_directory(tmp / "empty");
  check_fails(data(tmp / "empty"), Status::kConfig, "empty");

  const Dataset shapes = make_shapes(6, {1, 8, 8, 3});
  std::filesystem::create_directory(tmp / "pictures");
  tools::write_png_folder(tmp / "pictures", shapes.images.data(), 6, 8, 8, 3, 0);
  put_bytes(tmp / "pictures/000003.png", get_bytes(tmp / "pictures/000003.png").substr(0, 60));
  check_fails(data(tmp / "pictures"), Status::kFile, "000003.png");
  tools::write_png(tmp / "pictures/000003.png", {5, 8, 3, std::vector<uint8_t>(5 * 8 * 3)});
  check_fails(data(tmp / "pictures"), Status::kConfig, "ddpm pack");

  std::filesystem::create_directory(tmp / "cifar");
  put_bytes(tmp / "cifar/data_batch_1.bin", std::string(3073 * 2 - 1, '\0'));
  check_fails(run("train --data " + tmp / "cifar" + " --out " + tmp / "run" + kSmall +
                  " --set unet.sample_size=32"),
              Status::kFile, "3073");
  put_bytes(tmp / "cifar/data_batch_1.bin", std::string(3073 * 8, '\0'));
  check_fails(data(tmp / "cifar"), Status::kConfig, "ddpm pack");

  tools::write_png(tmp / "pictures/000003.png", {8, 8, 3, std::vector<uint8_t>(8 * 8 * 3)});
  check_fails(data(tmp / "pictures --set train.batch_size=7"), Status::kConfig, "--batch-size 6");
  CHECK_FALSE(std::filesystem::exists(tmp / "run"));
}

TEST_CASE("command line: configurations that cannot be", "[command_line]") {
  const TempFolder tmp;
  check_fails(train(tmp, "--set unet.sample_size=9"), Status::kConfig, "sample_size");
  nlohmann::json config = nlohmann::json::parse(get_bytes(trained() / "run/config.json"));
  config["unet"]["act_fn"] = "relu";
  put_bytes(tmp / "relu.json", config.dump());
  check_fails(train(tmp, "--config " + tmp / "relu.json"), Status::kConfig, "act_fn");
  check_fails(train(tmp, "--set 'unet.down_block_types=[\"DownBlock2D\",\"SkipDownBlock2D\"]'"),
              Status::kConfig, "SkipDownBlock2D");
  check_fails(train(tmp, "--set unet.norm_num_groups=3"), Status::kConfig, "norm_num_groups");
  check_fails(train(tmp, "--set train.batch_size=0"), Status::kConfig, "batch_size");
  check_fails(train(tmp, "--steps 1.5"), Status::kConfig, "steps");
  check_fails(train(tmp, "--config " + tmp / "none.json"), Status::kConfig, "none.json");
  put_bytes(tmp / "bad.json", "{\"unet\": {}, \"unet\": {}}");
  check_fails(train(tmp, "--config " + tmp / "bad.json"), Status::kConfig, "unet");
  CHECK_FALSE(std::filesystem::exists(tmp / "run"));
}

TEST_CASE("command line: models that are damaged or are none", "[command_line]") {
  const TempFolder tmp;
  const std::string model = copy_of_model(tmp), out = tmp / "x.png";
  const std::string sample = "sample --num 1 --sampler ddim --steps 2 --out " + out + " --model ";
  const std::string weights = model + "/unet/diffusion_pytorch_model.safetensors";
  const std::string config = model + "/unet/config.json";
  const std::string good = get_bytes(weights), good_config = get_bytes(config);
  CHECK(run(sample + model).exit_code == 0);
  std::filesystem::remove(out);

  check_fails(run(sample + tmp / "nowhere"), Status::kConfig, "nowhere");
  std::filesystem::create_directory(tmp / "hollow");
  check_fails(run(sample + tmp / "hollow"), Status::kConfig, "hollow");

  put_bytes(weights, good.substr(0, good.size() / 2));
  check_fails(run(sample + model), Status::kFile, "diffusion_pytorch_model.safetensors");
  put_bytes(weights, std::string("\x80\x02}q\x00X\x05\x00\x00\x00", 10) + good.substr(10));
  check_fails(run(sample + model), Status::kFile, "pickle");
  put_bytes(weights, std::string("PK\x03\x04") + good.substr(4));
  check_fails(run(sample + model), Status::kFile, "safetensors");
  std::string huge =
      "{\"a\":{\"dtype\":\"F32\",\"shape\":[274877906944],\"data_offsets\":"
      "[0,1099511627776]}}";
  huge.resize((huge.size() + 7) / 8 * 8, ' ');
  const uint64_t length = huge.size();
  put_bytes(weights, std::string(reinterpret_cast<const char*>(&length), 8) + huge);
  check_fails(run(sample + model), Status::kFile, "diffusion_pytorch_model.safetensors");

  std::string nan = good;
  std::fill(nan.end() - 4, nan.end(), '\xff');
  put_bytes(weights, nan);
  check_fails(run(sample + model), Status::kFile, "not finite");
  put_bytes(weights, good);

  nlohmann::json json = nlohmann::json::parse(good_config);
  json["block_out_channels"] = {8, 8, 16};
  put_bytes(config, json.dump());
  check_fails(run(sample + model), Status::kConfig, "shape");
  json["block_out_channels"] = {8, 8, 8};
  json["layers_per_block"] = 2;
  put_bytes(config, json.dump());
  check_fails(run(sample + model), Status::kConfig, "missing");
  json["layers_per_block"] = 1;
  json["surprise"] = 1;
  put_bytes(config, json.dump());
  check_fails(run(sample + model), Status::kConfig, "surprise");
  put_bytes(config, good_config);
  std::filesystem::remove(weights);
  put_bytes(model + "/unet/diffusion_pytorch_model.bin", "x");
  check_fails(run(sample + model), Status::kConfig, "safe_serialization");
  CHECK_FALSE(std::filesystem::exists(out));
}

TEST_CASE("command line: output that cannot be written", "[command_line]") {
  const TempFolder tmp;
  put_bytes(tmp / "file", "x");
  check_fails(run("train --data shapes --out " + tmp / "file/run" + kSmall), Status::kFile, "file");
  check_fails(run("sample --num 1 --sampler ddim --steps 1 --model " + trained() / "run" +
                  " --out " + tmp / "file/x.png"),
              Status::kFile, "file");
  CHECK(get_bytes(tmp / "file") == "x");
}

// Before hours of work, not after.
TEST_CASE("command line: a file's folder must be there at the start", "[command_line]") {
  const TempFolder tmp;
  const std::string model = " --model " + trained() / "run", none = " --out " + (tmp / "none/x");
  std::filesystem::create_directory(tmp / "x.png");
  for (const auto& [command, why] : std::vector<std::pair<std::string, std::string>>{
           {"sample" + model + none + ".npz", "no folder"},
           {"sample" + model + " --out " + (tmp / "x.png"), "it is a folder"},
           {"eval --data shapes" + model + none + ".json", "no folder"},
           {"paper --data shapes" + model + none + ".html", "no folder"},
           {"progressive" + model + none + ".png", "no folder"},
           {"interpolate --from shapes" + model + none + ".png", "no folder"},
           {"pack " + tmp.path() + none + ".safetensors", "no folder"}}) {
    const Result r = run(command);
    INFO(command << "\n" << r.text);
    CHECK(r.exit_code == 4);
    CHECK(r.says(why));
    CHECK_FALSE(r.says("device "));  // nothing was begun
  }
  CHECK_FALSE(std::filesystem::exists(tmp / "none"));
}

TEST_CASE("command line: a full disk is exit 4 and leaves nothing half-written", "[command_line]") {
  const TempFolder tmp;
  // A limit on file sizes is what a full disk looks like to a write, and needs no root.
  const Result r = run("train --data shapes --steps 2 --out " + tmp / "run" + kSmall);
  REQUIRE(r.exit_code == 0);
  Result limited;
  FILE* pipe =
      popen(("ulimit -f 8; exec 2>&1; " DDPM_PROGRAM " train --data shapes --steps 3 --out " +
             tmp / "run" + kSmall)
                .c_str(),
            "r");
  char buffer[4096];
  for (size_t got; (got = fread(buffer, 1, sizeof(buffer), pipe)) > 0;)
    limited.text.append(buffer, got);
  const int status = pclose(pipe);
  limited.exit_code = WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
  check_fails(limited, Status::kFile, "step-00000003");
  CHECK(list_checkpoints(tmp / "run").size() == 1);
  for (const auto& entry : std::filesystem::directory_iterator(tmp / "run/checkpoints"))
    CHECK(entry.path().filename() == "step-00000002");
}

TEST_CASE("command line: a run goes on where it stopped, and only as itself", "[command_line]") {
  const TempFolder whole, parts;
  REQUIRE(train(whole, "--steps 6 --save-every 3").exit_code == 0);
  REQUIRE(train(parts, "--steps 4 --save-every 3").exit_code == 0);
  const Result resumed = train(parts, "--steps 6 --save-every 5");
  INFO(resumed.text);
  CHECK(resumed.exit_code == 0);
  CHECK(resumed.says("resumed from"));
  for (const char* file :
       {"training_state.safetensors", "unet/diffusion_pytorch_model.safetensors"})
    CHECK(get_bytes(checkpoint_folder(whole / "run", 6) + "/" + file) ==
          get_bytes(checkpoint_folder(parts / "run", 6) + "/" + file));
  const Result finished = train(parts, "--steps 6");
  CHECK(finished.exit_code == 0);
  CHECK(finished.says("finished already"));
  check_fails(train(parts, "--steps 9 --learning-rate 1e-5"), Status::kConfig,
              "train.learning_rate");
  check_fails(train(parts, "--steps 9 --seed 3"), Status::kConfig, "train.seed");
  check_fails(train(parts, "--resume never"), Status::kUsage, "--out");
  const Result branch = run("train --data shapes --out " + parts / "other" + kSmall +
                            " --steps 8 --resume " + checkpoint_folder(parts / "run", 6));
  INFO(branch.text);
  CHECK(branch.exit_code == 0);
  CHECK(list_checkpoints(parts / "other").contains(8));
}

TEST_CASE("command line: the rate cools down to the run's end, wherever that is",
          "[command_line]") {
  const TempFolder tmp;
  const std::string settings =
      "--learning-rate 0.0078125 --set train.warmup_steps=0 --set train.cooldown_steps=4 "
      "--log-every 1";
  const auto rates = [&] {
    std::istringstream metrics(get_bytes(tmp / "run/metrics.jsonl"));
    std::vector<double> out;
    for (std::string line; std::getline(metrics, line);)
      out.push_back(128 * nlohmann::json::parse(line)["learning_rate"].get<double>());
    return out;
  };
  REQUIRE(train(tmp, "--steps 3 " + settings).exit_code == 0);
  CHECK(rates() == std::vector{0.75, 0.5, 0.25});
  REQUIRE(train(tmp, "--steps 8 " + settings).exit_code == 0);
  CHECK(rates() == std::vector{0.75, 0.5, 0.25, 1.0, 1.0, 0.75, 0.5, 0.25});
  check_fails(train(tmp, "--steps 9 --set train.cooldown_steps=-1"), Status::kConfig,
              "cooldown_steps");
  // A config from before there was a cool-down has none.
  nlohmann::json config = nlohmann::json::parse(get_bytes(tmp / "run/config.json"));
  config["train"].erase("cooldown_steps");
  put_bytes(tmp / "old.json", config.dump());
  REQUIRE(
      run("train --data shapes --steps 2 --config " + tmp / "old.json" + " --out " + tmp / "old")
          .exit_code == 0);
  CHECK(nlohmann::json::parse(get_bytes(tmp / "old/config.json"))["train"]["cooldown_steps"] == 0);
}

TEST_CASE("command line: a run's folder, and every form of samples", "[command_line]") {
  const TempFolder& tmp = trained();
  const std::string metrics = get_bytes(tmp / "run/metrics.jsonl");
  const nlohmann::json line = nlohmann::json::parse(metrics.substr(0, metrics.find('\n')));
  for (const char* key : {"step", "loss", "loss_by_timestep", "grad_norm", "learning_rate",
                          "images_per_second", "seconds", "peak_bytes"})
    CHECK(line.contains(key));
  REQUIRE(line["loss_by_timestep"].size() == 10);
  for (const nlohmann::json& mean : line["loss_by_timestep"])
    CHECK((mean.is_null() || mean.get<double>() > 0));
  CHECK(list_checkpoints(tmp / "run").size() == 2);

  const TempFolder out;
  const std::string sample =
      "sample --num 3 --sampler ddim --steps 2 --model " + tmp / "run" + " --out ";
  for (const char* name : {"a.png", "a.npz", "a.safetensors", "folder"}) {
    const Result r = run(sample + out / name);
    INFO(r.text);
    CHECK(r.exit_code == 0);
    CHECK(std::filesystem::exists(out / name));
  }
  CHECK(tools::read_image(out / "folder/000002.png").w == 8);
  // The same again is the same bytes; --first addresses images; --init replaces the noise.
  REQUIRE(run(sample + out / "b.safetensors").exit_code == 0);
  CHECK(get_bytes(out / "a.safetensors") == get_bytes(out / "b.safetensors"));
  REQUIRE(run("sample --num 1 --first 2 --batch-size 3 --sampler ddim --steps 2 --model " +
              tmp / "run" + " --out " + out / "c.safetensors")
              .exit_code == 0);
  const SafetensorsReader all(out / "a.safetensors"), one(out / "c.safetensors");
  std::vector<float> a(all.tensors()[0].elements), c(one.tensors()[0].elements);
  all.read_f32(all.tensors()[0], a.data());
  one.read_f32(one.tensors()[0], c.data());
  for (size_t i = 0; i < c.size(); ++i) REQUIRE(std::abs(a[2 * c.size() + i] - c[i]) <= 2.0f / 255);
  check_fails(run(sample + out / "d.png --init " + out / "a.safetensors"), Status::kConfig, "x_T");
}

TEST_CASE("command line: pack, then train on it", "[command_line]") {
  const TempFolder tmp;
  const Dataset shapes = make_shapes(6, {1, 20, 12, 3});
  tools::write_png_folder(tmp / "pictures", shapes.images.data(), 6, 20, 12, 3, 0);
  const Result packed =
      run("pack " + tmp / "pictures" + " --size 8x8 --out " + tmp / "p.safetensors");
  INFO(packed.text);
  CHECK(packed.exit_code == 0);
  const Result r =
      run("train --data " + tmp / "p.safetensors" + " --steps 1 --out " + tmp / "run" + kSmall);
  INFO(r.text);
  CHECK(r.exit_code == 0);
  check_fails(run("pack " + tmp / "nothing" + " --out " + tmp / "q.safetensors"), Status::kConfig,
              "nothing");
  check_fails(run("pack " + tmp / "pictures" + " --size 8 --out " + tmp / "q.safetensors"),
              Status::kUsage, "HxW");
}

namespace {

struct Floor {
  int calls = 0;
  double ms = 0;
};

// Of each operation of a training step of the tiny preset on the CPU, from the steps themselves.
std::map<std::string, Floor> tiny_floors(int batch, double bytes_rate, double macs_rate) {
  const auto backend = make_cpu_backend({});
  const Preset& p = find_preset("tiny");
  TrainerOptions options;
  options.batch_size = batch;
  const TrainingGraph t = build_training_graph(*backend, p.unet, p.scheduler, options, 64);
  std::map<std::string, Floor> floors;
  for (const Step& s : t.graph.steps()) {
    const double memory = static_cast<double>(t.graph.bytes_moved(s)) / bytes_rate,
                 products = static_cast<double>(s.call.macs) / macs_rate;
    floors[s.call.op].ms += 1e3 * std::max(memory, products);
    ++floors[s.call.op].calls;
  }
  return floors;
}

// The table's row of an operation: calls, ms, share, floor ms, x floor, name.
void check_row(const std::string& text, const std::string& op, int calls, double ms, double floor) {
  std::istringstream lines(text);
  for (std::string line; std::getline(lines, line);) {
    std::istringstream row(line);
    std::string share, name;
    int counted = 0;
    double measured = 0, least = 0, times = 0;
    row >> counted >> measured >> share >> least >> times >> name;
    if (name != op) continue;
    CHECK(counted == calls);
    CHECK(measured == Approx(ms).margin(1e-3));
    CHECK(least == Approx(floor).margin(1e-3));
    CHECK(times == Approx(ms / floor).margin(0.1));
    return;
  }
  FAIL("no row");
}

}  // namespace

TEST_CASE("command line: bench gives each operation its least time, and a chain its end",
          "[command_line]") {
  const TempFolder tmp;
  const Result ops = run("bench ops --preset tiny --batch-size 2 --steps 1 --device cpu --json " +
                         tmp / "ops.json");
  INFO(ops.text);
  REQUIRE(ops.exit_code == 0);
  const auto json = nlohmann::json::parse(get_bytes(tmp / "ops.json"));
  CHECK(json["ceilings"]["bytes_per_second"] > 1e8);
  CHECK(json["ceilings"]["multiply_adds_per_second"] > 1e8);
  const std::map<std::string, Floor> floors = tiny_floors(
      2, json["ceilings"]["bytes_per_second"], json["ceilings"]["multiply_adds_per_second"]);
  CHECK(json["figures"].size() == floors.size());
  for (const auto& [op, floor] : floors) {
    INFO(op);
    const auto figure =
        std::find_if(json["figures"].begin(), json["figures"].end(),
                     [name = op + " ms"](const auto& f) { return f["name"] == name; });
    REQUIRE(figure != json["figures"].end());
    CHECK((*figure)["measured"] > 0);
    CHECK((*figure)["floor"].template get<double>() == Approx(floor.ms));
    check_row(ops.text, op, floor.calls, (*figure)["measured"], floor.ms);
  }
  check_fails(run("bench sample --preset tiny --batch-size 1 --steps 999 --device cpu"),
              Status::kUsage, "at most 998");
  check_fails(run("bench ops --preset tiny --device cpu --wgmma"), Status::kUsage, "wgmma");
}
