// Training over ranks that mpirun starts, for real: their messages, what they compute, how they end
// when one of them does.
#include <catch2/catch.hpp>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <csignal>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <map>
#include <nlohmann/json.hpp>
#include <random>
#include <thread>
#include <vector>

#include "engine/comm.h"
#include "engine/shapes.h"
#include "model/presets.h"
#include "model/trainer.h"
#include "tests/child.h"
#include "tests/rank_support.h"
#include "tests/support.h"
#include "tests/temp_folder.h"

using namespace ddpm;
using namespace ddpm::test;

namespace {

Child train(int ranks, const std::string& out, const std::string& more, const std::string& log) {
  return mpirun(ranks, DDPM_PROGRAM, train_command(out, more), log);
}

}  // namespace

namespace {

void check_weights(Communicator& ranks) {
  const auto backend = make_cpu_backend({.threads = 1});
  UNetConfig u = find_preset("tiny").unet;
  u.sample_height = u.sample_width = 8;
  u.block_out_channels = {8, 8, 8};
  u.norm_num_groups = 4;
  TrainerOptions o;
  o.batch_size = ranks.size();
  o.parts = {.total = ranks.size(), .ranks = &ranks, .bucket = 500};
  Trainer trainer(*backend, u, SchedulerConfig{}, o, make_shapes(8, {1, 8, 8, 3}));
  trainer.initialize(static_cast<uint64_t>(ranks.rank()));
  if (ranks.size() > 1) CHECK_THROWS_AS(trainer.require_equal_weights(), AgreedError);
  trainer.share_parameters();
  CHECK_NOTHROW(trainer.require_equal_weights());
  StepState state;
  state.seed = 3;
  trainer.set_state(state);
  for (int i = 0; i < 3; ++i) trainer.step();
  CHECK_NOTHROW(trainer.require_equal_weights());
  std::vector<float> weights = trainer.store().read(Arena::kWeights);
  if (ranks.rank() == ranks.size() - 1) weights[3] = std::nextafter(weights[3], 1.0f);
  trainer.store().write(Arena::kWeights, weights);
  if (ranks.size() > 1)
    CHECK_THROWS_WITH(trainer.require_equal_weights(),
                      Catch::Contains(format("rank %d's weights", ranks.size() - 1)));
}

}  // namespace

// Under mpirun this case is its own ranks.
TEST_CASE("ranks: messages, sums and agreement, on 1 to 4 ranks", "[ranks_inside]") {
  if (!started_by_mpi()) {
    const TempFolder tmp;
    for (int ranks : {1, 2, 3, 4}) {
      const int code = mpirun(ranks, own_program(), "[ranks_inside]", tmp / "log").wait();
      INFO(get_bytes(tmp / "log"));
      CHECK(code == 0);
    }
    return;
  }
  const auto ranks = make_mpi_communicator(leaving(60));
  check_messages(*ranks);
  check_sums(*ranks);
  check_rounded_sums(*ranks);
  check_agreement(*ranks);
  check_weights(*ranks);
}

namespace {

std::vector<nlohmann::json> metrics_of(const std::string& run) {
  std::ifstream file(run + "/metrics.jsonl");
  std::vector<nlohmann::json> lines;
  for (std::string line; std::getline(file, line);) lines.push_back(nlohmann::json::parse(line));
  return lines;
}

const std::string kRandom = " --flip on --dropout 0.1 ";

}  // namespace

TEST_CASE("ranks: with --reduction-shards 1, 2 and 4 ranks give the same bytes", "[ranks]") {
  const TempFolder tmp;
  const std::string more = "--batch-size 16 --steps 6 --reduction-shards 8" + kRandom;
  REQUIRE(Child(train_command(tmp / "0", more), tmp / "log").wait() == 0);
  for (int ranks : {1, 2, 4}) {
    const std::string run = tmp / std::to_string(ranks);
    const int code = train(ranks, run, more, tmp / "log").wait();
    INFO(get_bytes(tmp / "log"));
    REQUIRE(code == 0);
    CHECK(state_of(run, 6) == state_of(tmp / "0", 6));
    const auto expected = metrics_of(tmp / "0"), found = metrics_of(run);
    REQUIRE(found.size() == expected.size());
    for (size_t i = 0; i < found.size(); ++i) {
      CHECK(found[i]["loss"] == expected[i]["loss"]);
      CHECK(found[i]["grad_norm"] == expected[i]["grad_norm"]);
    }
  }
}

// Without shards sums go in another order: equal up to rounding, which some steps do not magnify.
TEST_CASE("ranks: the batch over ranks and parts is the batch", "[ranks]") {
  const TempFolder tmp;
  const std::string more = "--batch-size 12 --steps 4" + kRandom;
  REQUIRE(Child(train_command(tmp / "whole", more), tmp / "log").wait() == 0);
  const auto whole = metrics_of(tmp / "whole");
  const auto compare = [&](const std::string& run) {
    const auto found = metrics_of(run);
    REQUIRE(found.size() == whole.size());
    for (size_t i = 0; i < found.size(); ++i) {
      INFO(run << " " << i);
      CHECK(found[i]["loss"].get<double>() == Approx(whole[i]["loss"].get<double>()).epsilon(1e-5));
      CHECK(found[i]["grad_norm"].get<double>() ==
            Approx(whole[i]["grad_norm"].get<double>()).epsilon(1e-4));
      for (size_t b = 0; b < 10; ++b) {
        const auto &x = found[i]["loss_by_timestep"][b], &y = whole[i]["loss_by_timestep"][b];
        REQUIRE(x.is_null() == y.is_null());
        if (!x.is_null()) CHECK(x.get<double>() == Approx(y.get<double>()).epsilon(1e-4));
      }
    }
  };
  REQUIRE(Child(train_command(tmp / "parts", more + "--accumulate 3"), tmp / "log").wait() == 0);
  compare(tmp / "parts");
  for (const auto& [ranks, accumulate] : std::map<int, int>{{2, 1}, {3, 2}, {4, 3}}) {
    const std::string run = tmp / std::to_string(ranks);
    const int code =
        train(ranks, run, more + format("--accumulate %d", accumulate), tmp / "log").wait();
    const std::string log = get_bytes(tmp / "log");
    INFO(log);
    REQUIRE(code == 0);
    compare(run);
    // Rank 0 alone writes and speaks.
    CHECK(log.find(format("ranks    %d by Open MPI", ranks)) != std::string::npos);
    CHECK(log.find("device ") == log.rfind("device "));
    CHECK(log.find("saved ") == log.rfind("saved "));
    CHECK(log.find("% waiting for sums") != std::string::npos);
  }
}

TEST_CASE("ranks: --gradient-sums bf16 says so, and rounds gradients alone", "[ranks]") {
  const TempFolder tmp;
  const std::string more = "--batch-size 12 --steps 3 --log-every 1 ";
  for (const auto& [name, flags] :
       std::map<std::string, std::string>{{"fp32", ""},
                                          {"bf16", "--gradient-sums bf16"},
                                          {"parts", "--gradient-sums bf16 --accumulate 2"}}) {
    const int code = train(2, tmp / name, more + flags, tmp / "log").wait();
    const std::string log = get_bytes(tmp / "log");
    INFO(log);
    REQUIRE(code == 0);
    CHECK((log.find("; gradients are summed in bf16") != std::string::npos) == (name != "fp32"));
  }
  const auto exact = metrics_of(tmp / "fp32");
  for (const char* name : {"bf16", "parts"}) {
    const auto rounded = metrics_of(tmp / name);
    CHECK(rounded[0]["loss"].get<double>() == Approx(exact[0]["loss"].get<double>()).epsilon(1e-6));
    const double a = rounded[0]["grad_norm"], b = exact[0]["grad_norm"];
    CHECK(a == Approx(b).epsilon(1e-3));
    CHECK(std::abs(a - b) > 1e-7 * b);
  }
}

TEST_CASE("ranks: pictures are drawn by all of them", "[ranks]") {
  const TempFolder tmp;
  const std::string more = "--batch-size 4 --steps 1 --reduction-shards 4 ";
  // Behind what the command sets: the last one counts.
  const std::string samples = "--set train.sample_every=1";
  REQUIRE(Child(train_command(tmp / "1", more + samples), tmp / "log").wait() == 0);
  const int code = train(4, tmp / "4", more + samples, tmp / "log").wait();
  INFO(get_bytes(tmp / "log"));
  REQUIRE(code == 0);
  const std::string name = "/samples/step-00000001.png";
  CHECK(get_bytes(tmp / ("4" + name)) == get_bytes(tmp / ("1" + name)));
}

TEST_CASE("ranks: what cannot be shared out is exit 2 and named, by one rank", "[ranks]") {
  const TempFolder tmp;
  struct Case {
    int ranks;
    std::string more, named;
  };
  for (const Case& c : std::vector<Case>{
           {2, "--batch-size 3", "--batch-size 3: does not divide into 2 ranks"},
           {4, "--batch-size 2", "--batch-size 2: does not divide into 4 ranks"},
           {2, "--batch-size 6 --accumulate 2", "2 ranks times --accumulate 2"},
           {4, "--batch-size 8 --reduction-shards 2", "cannot be shared out to 4 ranks"},
           {3, "--batch-size 8 --reduction-shards 4", "cannot be shared out to 3 ranks"},
           {1, "--batch-size 8 --reduction-shards 6", "must be a power of two"},
           {1, "--batch-size 4 --reduction-shards 8", "--batch-size 4: does not divide into 8"},
           {1, "--batch-size 8 --reduction-shards 4 --accumulate 2", "exclude each other"},
           {2, "--batch-size 8 --reduction-shards 4 --gradient-sums bf16",
            "sums in order are in"}}) {
    const std::string more = c.more + " --steps 1";
    const int code = c.ranks == 1 ? Child(train_command(tmp / "run", more), tmp / "log").wait()
                                  : train(c.ranks, tmp / "run", more, tmp / "log").wait();
    const std::string log = get_bytes(tmp / "log");
    INFO(c.more << "\n" << log);
    CHECK(code == 2);
    CHECK(log.find(c.named) != std::string::npos);
    CHECK(log.find("ddpm: ") == log.rfind("ddpm: "));
    CHECK_FALSE(std::filesystem::exists(tmp / "run/config.json"));
  }
  // Several processes that are no ranks would write the same files.
  ::setenv("WORLD_SIZE", "2", 1);
  for (const std::string& command :
       {train_command(tmp / "run", "--steps 1"), "sample --model " + (tmp / "run") + " --out x.png",
        "pack " + tmp.path() + " --out " + (tmp / "x")}) {
    CHECK(Child(command, tmp / "log").wait() == 2);
    INFO(get_bytes(tmp / "log"));
    const char* named = command.starts_with("pack") ? "WORLD_SIZE is 2" : "RANK is ''";
    CHECK(get_bytes(tmp / "log").find(named) != std::string::npos);
  }
  ::unsetenv("WORLD_SIZE");
}

TEST_CASE("ranks: --reduction-shards is part of a run, --accumulate is not", "[ranks]") {
  const TempFolder tmp;
  const std::string run = tmp / "run", more = "--batch-size 8 --reduction-shards ";
  REQUIRE(Child(train_command(run, more + "4 --steps 1"), tmp / "log").wait() == 0);
  CHECK(Child(train_command(run, more + "2 --steps 2"), tmp / "log").wait() == 3);
  const std::string log = get_bytes(tmp / "log");
  INFO(log);
  CHECK(log.find("\"train.reduction_shards\" is 4") != std::string::npos);
  REQUIRE(Child(train_command(tmp / "a", "--batch-size 8 --steps 1"), tmp / "log").wait() == 0);
  CHECK(Child(train_command(tmp / "a", "--batch-size 8 --accumulate 2 --steps 2"), tmp / "log")
            .wait() == 0);
}

namespace {

const std::string kEndless = "--batch-size 8 --reduction-shards 4 --steps 10000000 --save-every 1 ";

Child train_watched(int ranks, const TempFolder& tmp, const std::string& out,
                    const std::string& more) {
  return watched(ranks, tmp, train_command(out, more));
}

}  // namespace

TEST_CASE("ranks: a rank that is killed is named, and the others leave with exit 8", "[ranks]") {
  for (const int victim : {0, 2}) {
    const TempFolder tmp;
    const std::string run = tmp / "run";
    Child child = train_watched(3, tmp, run,
                                "--batch-size 6 --steps 10000000 --save-every 1 --comm-timeout 5");
    wait_for_steps(child, run, 4);
    signal_rank(child, run, victim, SIGKILL);
    child.wait();
    const std::string log = get_bytes(tmp / "log");
    INFO(log);
    for (int r = 0; r < 3; ++r) CHECK(code_of(tmp, r) == (r == victim ? 128 + SIGKILL : 8));
    const std::string name = format("rank %d on ", victim);
    CHECK(log.find(name) != std::string::npos);
    CHECK(log.find(name) == log.rfind(name));  // one says it
    CHECK(all_gone(run));
    CHECK(list_checkpoints(run).size() >= 1);
    CHECK(Child(train_command(run, "--batch-size 6 --steps 1"), tmp / "log").wait() == 0);
  }
}

TEST_CASE("ranks: a rank that is stopped is named, and nothing is left of the run", "[ranks]") {
  for (const int victim : {0, 1}) {
    const TempFolder tmp;
    const std::string run = tmp / "run";
    Child child = train(2, run, kEndless + "--comm-timeout 5", tmp / "log");
    wait_for_steps(child, run, 4);
    signal_rank(child, run, victim, SIGSTOP);
    const int code = child.wait();
    const std::string log = get_bytes(tmp / "log");
    INFO(log);
    CHECK(code == 8);
    CHECK(log.find(format("rank %d on ", victim)) != std::string::npos);
    CHECK(all_gone(run));
    CHECK(Child(train_command(run, "--batch-size 8 --reduction-shards 4 --steps 1"), tmp / "log")
              .wait() == 0);
  }
}

TEST_CASE("ranks: one that fails says why, and the others leave with exit 8", "[ranks]") {
  const TempFolder tmp;
  const std::string run = tmp / "run";
  std::filesystem::create_directories(run);
  put_bytes(run + "/checkpoints", "in the way");
  train_watched(2, tmp, run, "--batch-size 4 --steps 100000 --save-every 3").wait();
  const std::string log = get_bytes(tmp / "log");
  INFO(log);
  CHECK(code_of(tmp, 0) == 4);
  CHECK(code_of(tmp, 1) == 8);
  CHECK(log.find("ddpm: cannot make the folder '" + run) != std::string::npos);
  CHECK(log.find("rank 0 on ") != std::string::npos);
  CHECK(log.find("failed: cannot make the folder '" + run) != std::string::npos);
}

TEST_CASE("ranks: one that never comes is no endless wait", "[ranks]") {
  const TempFolder tmp;
  const int code =
      mpirun(1, DDPM_PROGRAM,
             train_command(tmp / "run", "--batch-size 4 --comm-timeout 3") + " : -n 1 sleep 1000",
             tmp / "log")
          .wait();
  INFO(get_bytes(tmp / "log"));
  CHECK(code == 8);
  CHECK(get_bytes(tmp / "log").find("not all started within 3 s") != std::string::npos);
  CHECK_FALSE(any_process_of(tmp / "run"));
}

TEST_CASE("ranks: a signal to one of them stops all after the same step", "[ranks]") {
  const TempFolder tmp;
  const std::string settings = "--batch-size 8 --reduction-shards 4 --save-every 0 --steps 40";
  REQUIRE(Child(train_command(tmp / "whole", settings), tmp / "log").wait() == 0);
  const std::string run = tmp / "run";
  Child child = train(2, run, settings + "00000", tmp / "log");
  wait_for_steps(child, run, 3);
  signal_rank(child, run, 1, SIGUSR1);
  const int code = child.wait();
  INFO(get_bytes(tmp / "log"));
  CHECK(code == static_cast<int>(Status::kStopped));
  const auto saved = list_checkpoints(run);
  REQUIRE(saved.size() == 1);
  CHECK(saved.begin()->first == static_cast<uint64_t>(logged_steps(run)));
  if (saved.begin()->first >= 40) return;  // a slow reader of a fast run
  REQUIRE(train(4, run, settings, tmp / "log").wait() == 0);
  CHECK(state_of(run, 40) == state_of(tmp / "whole", 40));
}

TEST_CASE("ranks: a step that is not finite is exit 7 on all, and one says it", "[ranks]") {
  const TempFolder tmp;
  const std::string run = tmp / "run", settings = "--batch-size 4 --save-every 0 --steps ";
  REQUIRE(Child(train_command(run, settings + "3"), tmp / "log").wait() == 0);
  plant_overflow(run, 3);
  const auto before = state_of(run, 3);
  train_watched(2, tmp, run, settings + "9").wait();
  const std::string log = get_bytes(tmp / "log");
  INFO(log);
  for (int r = 0; r < 2; ++r) CHECK(code_of(tmp, r) == 7);
  CHECK(log.find("step 4 produced") != std::string::npos);
  CHECK(log.find("first in mid_block.resnets.1.conv2:") != std::string::npos);
  CHECK(log.find("ddpm: ") == log.rfind("ddpm: "));
  CHECK(state_of(run + "/nonfinite", 3)[0] == before[0]);
  CHECK(list_checkpoints(run).size() == 1);
}

TEST_CASE(
    "ranks: killed at random instants and resumed on other numbers of ranks, a run is the "
    "unbroken one",
    "[ranks]") {
  const char* asked = std::getenv("DDPM_TEST_KILLS");
  const int wanted = asked != nullptr ? std::stoi(asked) : 4;
  const TempFolder tmp;
  const std::string settings = "--batch-size 8 --reduction-shards 4 --steps 60 --save-every 2";
  const auto start = std::chrono::steady_clock::now();
  REQUIRE(train(2, tmp / "whole", settings, tmp / "log").wait() == 0);
  const std::chrono::duration<double> length = std::chrono::steady_clock::now() - start;
  const auto whole = state_of(tmp / "whole", 60);
  std::mt19937 random(21);
  std::uniform_real_distribution<double> instant(0, length.count());
  const std::string run = tmp / "run";
  const std::vector<int> numbers{2, 4, 1};
  for (int kills = 0, runs = 0; kills < wanted;) {
    const int ranks = numbers[static_cast<size_t>(runs++) % numbers.size()];
    Child child = train(ranks, run, settings, tmp / "log");
    std::this_thread::sleep_for(std::chrono::duration<double>(instant(random)));
    const int rank = static_cast<int>(random() % static_cast<unsigned>(ranks));
    if (const pid_t victim = process_of(child, run, rank); victim > 0) {
      ::kill(victim, SIGKILL);
      // mpirun 4.1.4 itself may hang where a rank dies as it joins; its ranks have gone then too.
      if (!child.wait_for(std::chrono::seconds(60))) {
        WARN("mpirun did not end after kill " << kills + 1);
        CHECK(all_gone(run));
        child.send(SIGKILL);
      }
      child.wait();
      ++kills;
      CHECK(all_gone(run));
      if (kills < wanted) continue;
      REQUIRE(train(4, run, settings, tmp / "log").wait() == 0);
    }
    INFO(get_bytes(tmp / "log") << "\nafter " << kills << " kills, run " << runs);
    CHECK(state_of(run, 60) == whole);
    CHECK(logged_steps(run) == 60);
    std::filesystem::remove_all(run);
  }
}
