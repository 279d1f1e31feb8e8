// Sampling and evaluation over ranks that mpirun starts, for real: the bytes of one process, stops,
// and what becomes of a rank that is lost.
#include <catch2/catch.hpp>

#include <cstdlib>
#include <filesystem>

#include "engine/shapes.h"
#include "tests/inception_weights.h"
#include "tests/rank_support.h"
#include "tests/small_model.h"
#include "tools/frechet.h"
#include "tools/image_io.h"

using namespace ddpm;
using namespace ddpm::test;

namespace {

// What a command writes to `out`, which stands in it last.
std::string written(int ranks, const TempFolder& tmp, const std::string& command,
                    const std::string& out) {
  const std::string words = command + " --threads 1 --out " + (tmp / out);
  const int code = ranks == 1 ? Child(words, tmp / "log").wait()
                              : mpirun(ranks, DDPM_PROGRAM, words, tmp / "log").wait();
  const std::string log = get_bytes(tmp / "log");
  INFO(words << "\n" << log);
  REQUIRE(code == 0);
  // Rank 0 alone speaks.
  CHECK(log.find("device ") == log.rfind("device "));
  CHECK((log.find(format("ranks    %d by Open MPI", ranks)) != std::string::npos) == (ranks > 1));
  return get_bytes(tmp / out);
}

void wait_for(Child& child, const TempFolder& tmp, const std::string& text) {
  while (get_bytes(tmp / "log").find(text) == std::string::npos && !child.ended())
    std::this_thread::sleep_for(std::chrono::milliseconds(2));
  INFO(get_bytes(tmp / "log"));
  REQUIRE_FALSE(child.ended());
}

// A model of few steps, with three classes and one for none.
std::string guided_model(const TempFolder& tmp) {
  UNetConfig unet = small_unet();
  unet.num_class_embeds = 4;
  unet.null_class = true;
  save_small_model(tmp / "model", unet, {}, 0.3f);
  return "sample --model " + (tmp / "model") + " --seed 11 --first 3 --batch-size 2 --steps 4";
}

}  // namespace

TEST_CASE("rank rounds: sample draws the bytes of one process", "[rank_rounds]") {
  const TempFolder tmp;
  const std::string sample = guided_model(tmp);
  const Dataset shapes = make_shapes(5, {1, 8, 8, 3});
  tools::write_png_folder(tmp / "pictures", shapes.images.data(), 5, 8, 8, 3, 0);
  // Seven images are a batch for each of three ranks, and one more for the first; five are two for
  // each of two, and one.
  for (const auto& [ranks, more] : {std::pair(3, std::string(" --num 7 --guidance 2")),
                                    std::pair(2, " --num 5 --from " + (tmp / "pictures")),
                                    std::pair(2, " --num 5 --invert " + (tmp / "pictures"))})
    CHECK((written(ranks, tmp, sample + more, "more.safetensors") ==
           written(1, tmp, sample + more, "one.safetensors")));
}

TEST_CASE("rank rounds: the bound of one process, and of other ranks after a stop",
          "[rank_rounds]") {
  const TempFolder tmp;
  save_small_model(tmp / "model", small_unet(), {}, 0.3f);
  const std::string eval =
      "eval --model " + (tmp / "model") + " --data shapes --seed 9 --batch-size 7 --num ";
  const std::string one = written(1, tmp, eval + "3", "one.json");
  CHECK((written(2, tmp, eval + "3", "more.json") == one));

  const std::string many = eval + "20 --threads 1 --out " + (tmp / "many.json");
  Child child = watched(2, tmp, many);
  wait_for(child, tmp, "images ");
  signal_rank(child, tmp / "many.json", 1, SIGUSR1);
  child.wait();
  INFO(get_bytes(tmp / "log"));
  for (int r = 0; r < 2; ++r) REQUIRE(code_of(tmp, r) == static_cast<int>(Status::kStopped));
  CHECK_FALSE(std::filesystem::exists(tmp / "many.json"));
  REQUIRE(std::filesystem::exists(tmp / "many.json.progress"));
  const std::string resumed = written(3, tmp, eval + "20", "many.json");
  CHECK(get_bytes(tmp / "log").find("resumed  from ") != std::string::npos);
  CHECK_FALSE(std::filesystem::exists(tmp / "many.json.progress"));
  CHECK((resumed == written(1, tmp, eval + "20", "whole.json")));
}

TEST_CASE("rank rounds: the distance of one process, and of other ranks after a stop",
          "[rank_rounds]") {
  if (!tools::frechet_built()) return;
  const TempFolder tmp;
  save_small_model(tmp / "model", small_unet(), {}, 0.3f);
  write_tensors(tmp / "weights", inception_tensors());
  write_inception_images(tmp / "data", "b", 20);
  const std::string eval = "eval --metric fid --data " + (tmp / "data") + " --inception " +
                           (tmp / "weights") + " --batch-size 4";
  const std::string drawn =
      eval + " --seed 3 --sampler ddim --steps 5 --model " + (tmp / "model") + " --num ";
  const std::string one = written(1, tmp, drawn + "12 --statistics " + (tmp / "s1"), "one.json");
  CHECK((written(2, tmp, drawn + "12 --statistics " + (tmp / "s2"), "more.json") == one));
  CHECK((get_bytes(tmp / "s1") == get_bytes(tmp / "s2")));

  // With statistics that are there, which rank 0 reads.
  const std::string many = drawn + "400 --statistics " + (tmp / "s1");
  Child child = watched(2, tmp, many + " --threads 1 --out " + (tmp / "many.json"));
  wait_for(child, tmp, "images ");
  std::this_thread::sleep_for(std::chrono::milliseconds(150));  // so that some are done
  signal_rank(child, tmp / "many.json", 1, SIGUSR1);
  child.wait();
  INFO(get_bytes(tmp / "log"));
  for (int r = 0; r < 2; ++r) REQUIRE(code_of(tmp, r) == static_cast<int>(Status::kStopped));
  REQUIRE(std::filesystem::exists(tmp / "many.json.progress"));
  const std::string resumed = written(3, tmp, many, "many.json");
  CHECK((resumed == written(1, tmp, many, "whole.json")));
}

TEST_CASE("rank rounds: a rank that is killed is named, and nothing is written", "[rank_rounds]") {
  const TempFolder tmp;
  save_small_model(tmp / "model", small_unet(), {}, 0.3f);
  const std::string out = tmp / "out.safetensors";
  struct Case {
    std::string command, running, advice;
    int victim;
  };
  for (const Case& c : {Case{"sample --num 10000000 --batch-size 2 --steps 1000", "sampling ",
                             "no image was written; the same command begins anew", 0},
                        Case{"eval --data shapes", "images ",
                             "the same command goes on from what was kept last", 1}}) {
    const std::string command =
        c.command + " --model " + (tmp / "model") + " --threads 1 --comm-timeout 1 --out " + out;
    Child child = watched(2, tmp, command);
    wait_for(child, tmp, c.running);
    signal_rank(child, out, c.victim, SIGKILL);
    child.wait();
    const std::string log = get_bytes(tmp / "log");
    INFO(log);
    for (int r = 0; r < 2; ++r) CHECK(code_of(tmp, r) == (r == c.victim ? 128 + SIGKILL : 8));
    CHECK(log.find(format("rank %d on ", c.victim)) != std::string::npos);
    CHECK(log.find(c.advice) != std::string::npos);
    CHECK(all_gone(out));
    CHECK_FALSE(std::filesystem::exists(out));
  }
}

// As torchrun and srun start them: no MPI, and no sums between ranks that would want it.
TEST_CASE("rank rounds: ranks that meet over TCP", "[rank_rounds]") {
  const TempFolder tmp;
  const auto start = [&](const std::string& command) {
    std::vector<std::unique_ptr<Child>> ranks;
    const int port = free_port();
    for (int r = 0; r < 3; ++r) {
      const Variables v(torchrun_words(r, 3, port));
      std::filesystem::remove(tmp / format("log.%d", r));
      ranks.push_back(std::make_unique<Child>(command, tmp / format("log.%d", r)));
    }
    return ranks;
  };
  const std::string sample = guided_model(tmp) + " --num 7 --guidance 2";
  for (auto& rank : start(sample + " --threads 1 --out " + (tmp / "more.safetensors")))
    CHECK(rank->wait() == 0);
  INFO(get_bytes(tmp / "log.0"));
  CHECK(get_bytes(tmp / "log.0").find("ranks    3 by TCP: 0 to 2 on ") != std::string::npos);
  for (int r : {1, 2}) CHECK(get_bytes(tmp / format("log.%d", r)).empty());
  CHECK((get_bytes(tmp / "more.safetensors") == written(1, tmp, sample, "one.safetensors")));

  const std::string out = tmp / "killed.safetensors";
  auto ranks = start("sample --num 10000000 --batch-size 2 --steps 1000 --threads 1 --model " +
                     (tmp / "model") + " --out " + out);
  while (get_bytes(tmp / "log.0").find("sampling ") == std::string::npos && !ranks[0]->ended())
    std::this_thread::sleep_for(std::chrono::milliseconds(2));
  ranks[1]->send(SIGKILL);
  for (int r : {0, 2}) CHECK(ranks[static_cast<size_t>(r)]->wait() == 8);
  const std::string log = get_bytes(tmp / "log.0");
  INFO(log);
  CHECK(log.find("rank 1 on ") != std::string::npos);
  CHECK(log.find("its connection ended; no image was written") != std::string::npos);
  CHECK_FALSE(std::filesystem::exists(out));
}

TEST_CASE("rank rounds: an error is one line, and the exit code of all", "[rank_rounds]") {
  const TempFolder tmp;
  const std::string model = guided_model(tmp).substr(6) + " --threads 1 --out " + (tmp / "x");
  const auto check = [&](const std::string& command, int code, const std::string& text) {
    watched(2, tmp, command).wait();
    const std::string log = get_bytes(tmp / "log");
    INFO(command << "\n" << log);
    for (int r = 0; r < 2; ++r) CHECK(code_of(tmp, r) == code);
    CHECK(log.find(text) != std::string::npos);
    CHECK(log.find("ddpm: ") == log.rfind("ddpm: "));
    CHECK_FALSE(std::filesystem::exists(tmp / "x"));
  };
  check("sample" + model + " --suspend " + (tmp / "s"), 2, "--suspend keeps the chains of one");
  check("eval --metric nll --model " + (tmp / "none") + " --data shapes", 3, "none");
  save_small_model(tmp / "model", small_unet(), {}, 1, "mid_block.resnets.1.conv2.weight");
  check("eval --data shapes --num 2 --threads 1 --model " + (tmp / "model"), 7, "not finite");
  const std::string sample = "sample" + model;
  CHECK(mpirun(1, DDPM_PROGRAM, sample + " --num 3 : -n 1 " DDPM_PROGRAM " " + sample + " --num 4",
               tmp / "log")
            .wait() == 2);
  CHECK(get_bytes(tmp / "log").find("rank 1 was started with other settings") != std::string::npos);
  // What knows of no ranks.
  ::setenv("WORLD_SIZE", "2", 1);
  for (const std::string& command :
       {std::string("progressive"), std::string("interpolate --from shapes"),
        std::string("paper --data shapes")}) {
    CHECK(Child(command + " --model " + (tmp / "model") + " --out " + (tmp / "x.html"), tmp / "log")
              .wait() == 2);
    CHECK(get_bytes(tmp / "log").find("WORLD_SIZE is 2") != std::string::npos);
  }
  ::unsetenv("WORLD_SIZE");
}
