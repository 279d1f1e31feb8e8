// A training run that is told to stop, killed, or goes wrong: what is on disk afterwards.
#include <catch2/catch.hpp>

#include <algorithm>
#include <chrono>
#include <csignal>
#include <cstdlib>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <random>
#include <thread>
#include <vector>

#include "model/pipeline.h"
#include "model/run_config.h"
#include "tests/child.h"
#include "tests/faulty_file_system.h"
#include "tests/temp_folder.h"
#include "tools/common.h"
#include "tools/run_trainer.h"

using namespace ddpm;
using namespace ddpm::test;

TEST_CASE("survival: a signal saves at the next step and is exit 75, resumable bit for bit",
          "[survival]") {
  const TempFolder tmp;
  const std::string settings = "--batch-size 4 --steps 60 --save-every 0";
  REQUIRE(Child(train_command(tmp / "whole", settings), tmp / "log").wait() == 0);
  for (const int signal : {SIGTERM, SIGINT, SIGUSR1}) {
    INFO("signal " << signal);
    const std::string run = tmp / std::to_string(signal);
    const std::string more = "--batch-size 4 --steps 1000000 --save-every 0";
    int64_t before = 0;
    {
      Child child(train_command(run, more), tmp / "log");
      wait_for_steps(child, run, 3);
      before = logged_steps(run);
      child.send(signal);
      CHECK(child.wait() == static_cast<int>(Status::kStopped));
    }
    INFO(get_bytes(tmp / "log"));
    const auto saved = list_checkpoints(run);
    REQUIRE(saved.size() == 1);
    CHECK(saved.begin()->first == static_cast<uint64_t>(logged_steps(run)));
    CHECK(logged_steps(run) >= before);
    CHECK(get_bytes(tmp / "log").find("stopped by a signal") != std::string::npos);
    if (saved.begin()->first >= 60) continue;  // a slow reader of a fast run
    REQUIRE(Child(train_command(run, settings), tmp / "log").wait() == 0);
    CHECK(state_of(run, 60) == state_of(tmp / "whole", 60));
  }
}

TEST_CASE("survival: a second signal ends the program at once, its checkpoints whole",
          "[survival]") {
  const TempFolder tmp;
  const std::string run = tmp / "run";
  REQUIRE(Child(train_command(run, "--batch-size 2048 --steps 1"), tmp / "log").wait() == 0);
  const auto saved = state_of(run, 1);
  Child child(train_command(run, "--batch-size 2048 --steps 1000"), tmp / "log");
  wait_for_steps(child, run, 2);  // step 3 now takes a while
  child.send(SIGTERM);
  child.send(SIGINT);
  const int code = child.wait();
  INFO(get_bytes(tmp / "log"));
  CHECK((code == 128 + SIGTERM || code == 128 + SIGINT));
  CHECK(list_checkpoints(run).size() == 1);
  CHECK(state_of(run, 1) == saved);
}

namespace {

// The operation that an error names.
std::string named(const std::string& text) {
  const size_t at = text.find("first in ");
  return at == std::string::npos ? "" : text.substr(at + 9, text.find(';', at) - at - 9);
}

}  // namespace

TEST_CASE("survival: a step that is not finite is exit 7, named, and replayed from its bundle",
          "[survival]") {
  const TempFolder tmp;
  const std::string run = tmp / "run", settings = "--batch-size 4 --save-every 0 ";
  REQUIRE(Child(train_command(run, settings + "--steps 3"), tmp / "log").wait() == 0);
  CHECK(Child("replay --threads 1 --run " + run, tmp / "log").wait() == 0);
  CHECK(get_bytes(tmp / "log").find("step 4 is finite: loss ") != std::string::npos);
  plant_overflow(run, 3);
  const auto before = state_of(run, 3);
  CHECK(Child(train_command(run, settings + "--steps 9"), tmp / "log").wait() ==
        static_cast<int>(Status::kNonFinite));
  const std::string text = get_bytes(tmp / "log");
  INFO(text);
  CHECK(text.find("step 4 produced") != std::string::npos);
  CHECK(named(text).starts_with("mid_block.resnets.1.conv2:"));
  CHECK(state_of(run, 3) == before);
  CHECK(list_checkpoints(run).size() == 1);
  // The update was not applied: the bundle holds the state that the step began with.
  CHECK(state_of(run + "/nonfinite", 3) == before);
  CHECK(Child("replay --threads 1 --run " + run + "/nonfinite", tmp / "replayed").wait() ==
        static_cast<int>(Status::kNonFinite));
  const std::string replayed = get_bytes(tmp / "replayed");
  INFO(replayed);
  CHECK(named(replayed) == named(text));
  CHECK(replayed.find("step 4 produced") != std::string::npos);
}

namespace {

RunConfig small_config() {
  RunConfig c = run_config_of(find_preset("tiny"));
  c.unet.sample_height = c.unet.sample_width = 8;
  c.unet.block_out_channels = {4, 4, 4};
  c.unet.norm_num_groups = 2;
  c.train.data = "shapes";
  c.train.batch_size = 2;
  return c;
}

void save(const std::string& path, const RunConfig& c, const Trainer& trainer, FileSystem& fs) {
  Manifest m;
  m.step = trainer.state().step;
  m.batch_size = c.train.batch_size;
  m.numerics = "test";
  save_checkpoint(path, c.unet, c.scheduler, trainer.store(), m, fs);
}

// A small run that has begun, and a folder for its checkpoints.
struct Begun {
  RunConfig config = small_config();
  std::unique_ptr<Backend> backend = make_cpu_backend({});
  std::unique_ptr<Trainer> trainer =
      tools::make_trainer(*backend, config, tools::load_run_data(config));
  TempFolder tmp;
  std::string path = tmp / "step";

  Begun() { trainer->initialize(1); }
  void save_to(const std::string& where, FileSystem& fs = FileSystem::real()) const {
    save(where, config, *trainer, fs);
  }
};

// What a failed save may leave: the whole folder as it was, or as it was to become.
void check_crash_points(Fault fault, int error, int stride) {
  const Begun run;
  const TempFolder& tmp = run.tmp;
  const std::string& path = run.path;
  run.save_to(tmp / "old");
  run.trainer->step();
  run.save_to(tmp / "new");
  const auto old_tree = tree_of(tmp / "old"), new_tree = tree_of(tmp / "new");
  CHECK(old_tree != new_tree);
  int k = 0;
  for (bool reached = true; reached; k += stride) {
    std::filesystem::remove_all(path);
    std::filesystem::copy(tmp / "old", path, std::filesystem::copy_options::recursive);
    FaultyFileSystem fs(fault, k, error);
    bool saved = true;
    try {
      run.save_to(path, fs);
    } catch (const Error& e) {
      saved = false;
      CHECK(e.status() == Status::kFile);
      CHECK(std::string(e.what()).find(tmp.path()) != std::string::npos);
    }
    reached = fs.was_reached();
    recover_all(tmp.path());
    const auto tree = tree_of(path);
    INFO("operation " << k);
    CHECK((tree == new_tree || (!saved && tree == old_tree)));
    CHECK(std::distance(std::filesystem::directory_iterator(tmp.path()), {}) == 3);
  }
  CHECK(k > 800);
}

}  // namespace

TEST_CASE("survival: whichever operation of a save fails, the old or the new checkpoint is there",
          "[survival]") {
  check_crash_points(Fault::kDead, EIO, 1);
  // test_file_io.cpp has every operation for these; here a save has some 900, mostly alike.
  check_crash_points(Fault::kOnce, ENOSPC, 11);
  check_crash_points(Fault::kShort, EIO, 13);
}

TEST_CASE("survival: any bit of a checkpoint that flips is found", "[survival]") {
  const Begun run;
  const std::string& path = run.path;
  run.save_to(path);
  const auto tree = tree_of(path);
  std::vector<std::pair<std::string, size_t>> files;
  size_t total = 0;
  for (const auto& [name, bytes] : tree)
    if (!bytes.empty()) files.emplace_back(path + "/" + name, total += bytes.size());
  std::mt19937_64 random(6);
  for (int i = 0; i < 500; ++i) {
    // Every second flip falls on a file whatever its size, so that the small ones have their share.
    size_t file = random() % files.size();
    if (const size_t at = random() % total; i % 2 == 0)
      for (file = 0; files[file].second <= at;) ++file;
    const std::string name = files[file].first, good = get_bytes(name);
    std::string bad = good;
    const size_t at = random() % bad.size();
    bad[at] = static_cast<char>(bad[at] ^ (1 << random() % 8));
    put_bytes(name, bad);
    INFO(name << ", byte " << at);
    CHECK_THROWS_AS(load_checkpoint(path, run.trainer->store()), Error);
    put_bytes(name, good);
  }
  CHECK_NOTHROW(load_checkpoint(path, run.trainer->store()));
}

TEST_CASE("survival: killed at random instants and resumed, a run is the unbroken one",
          "[survival]") {
  const char* asked = std::getenv("DDPM_TEST_KILLS");
  const int wanted = asked != nullptr ? std::stoi(asked) : 10;
  const TempFolder tmp;
  const std::string settings = "--batch-size 4 --steps 120 --save-every 3";
  const auto start = std::chrono::steady_clock::now();
  REQUIRE(Child(train_command(tmp / "whole", settings), tmp / "log").wait() == 0);
  const std::chrono::duration<double> length = std::chrono::steady_clock::now() - start;
  const auto whole = state_of(tmp / "whole", 120);
  std::mt19937 random(20);
  std::uniform_real_distribution<double> instant(0, length.count());
  const std::string run = tmp / "run";
  for (int kills = 0, ended = 0; kills < wanted;) {
    Child child(train_command(run, settings), tmp / "log");
    std::this_thread::sleep_for(std::chrono::duration<double>(instant(random)));
    if (!child.ended()) {
      child.send(SIGKILL);
      child.wait();
      ++kills;
      if (kills < wanted) continue;
      Child last(train_command(run, settings), tmp / "log");
      REQUIRE(last.wait() == 0);
    }
    INFO(get_bytes(tmp / "log") << "\nafter " << kills << " kills, run " << ++ended);
    CHECK(state_of(run, 120) == whole);
    CHECK(logged_steps(run) == 120);
    for (const auto& entry : std::filesystem::directory_iterator(run + "/checkpoints"))
      CHECK(entry.path().filename().string().starts_with("step-"));
    std::filesystem::remove_all(run);
  }
}

TEST_CASE("survival: multiples of --keep-every are kept, the others up to --keep-last",
          "[survival]") {
  const TempFolder tmp;
  REQUIRE(Child(train_command(tmp / "run",
                              "--batch-size 4 --steps 9 --save-every 1 --keep-every 4 "
                              "--keep-last 2"),
                tmp / "log")
              .wait() == 0);
  std::vector<uint64_t> kept;
  for (const auto& [step, folder] : list_checkpoints(tmp / "run")) kept.push_back(step);
  CHECK(kept == std::vector<uint64_t>{4, 7, 8, 9});
  CHECK(std::distance(std::filesystem::directory_iterator(tmp / "run/checkpoints"), {}) == 4);
}

TEST_CASE("survival: too little free space is known before the first step", "[survival]") {
  const TempFolder tmp;
  CHECK_NOTHROW(tools::require_space(tmp / "not/yet/there", 1, "x"));
  CHECK_THROWS_WITH(tools::require_space(tmp / "not/yet/there", SIZE_MAX / 2, "two checkpoints"),
                    Catch::Contains("two checkpoints need") && Catch::Contains("free some space"));
}
