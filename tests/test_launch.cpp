// Who a rank is, by what started it, and ranks that the program starts itself.
#include <catch2/catch.hpp>

#include <chrono>
#include <cstdlib>
#include <optional>

#include "tests/rank_support.h"
#include "tests/temp_folder.h"
#include "tools/launch.h"
#include "tools/processes.h"

using namespace ddpm;
using namespace ddpm::test;
using tools::Launch;

TEST_CASE("launch: torchrun, srun and nothing", "[launch]") {
  CHECK(tools::find_launch().by == Launch::By::kNothing);
  {
    const Variables v({{"WORLD_SIZE", "16"},
                       {"RANK", "11"},
                       {"LOCAL_RANK", "3"},
                       {"MASTER_ADDR", "node1"},
                       {"MASTER_PORT", "29500"}});
    const Launch l = tools::find_launch();
    CHECK((l.by == Launch::By::kTorchrun && l.size == 16 && l.rank == 11 && l.local_rank == 3));
    CHECK(l.meeting == "node1:29501");
    const Variables own(Words{{"NCCL_COMM_ID", "node9:7"}});
    CHECK(tools::find_launch().meeting == "node9:7");
  }
  for (const auto& [list, first] :
       Words{{"gpu[03-05,07]", "gpu03"}, {"a1", "a1"}, {"a1,b[1-2]", "a1"}, {"n[7]", "n7"}}) {
    const Variables v({{"SLURM_STEP_NUM_TASKS", "8"},
                       {"SLURM_PROCID", "5"},
                       {"SLURM_LOCALID", "1"},
                       {"SLURM_STEP_NODELIST", list},
                       {"SLURM_JOB_ID", "123456"},
                       {"SLURM_STEP_ID", "2"}});
    const Launch l = tools::find_launch();
    CHECK((l.by == Launch::By::kSlurm && l.size == 8 && l.rank == 5 && l.local_rank == 1));
    CHECK(l.meeting == first + ":24562");
  }
  // One process is no rank, whoever started it.
  const Variables alone({{"WORLD_SIZE", "1"}, {"RANK", "0"}, {"LOCAL_RANK", "0"}});
  CHECK(tools::find_launch().by == Launch::By::kNothing);
}

TEST_CASE("launch: a variable that is missing or no number is named", "[launch]") {
  const Words good{{"WORLD_SIZE", "4"},
                   {"RANK", "3"},
                   {"LOCAL_RANK", "1"},
                   {"MASTER_ADDR", "a"},
                   {"MASTER_PORT", "1000"}};
  for (const auto& [name, value] : Words{{"WORLD_SIZE", "four"},
                                         {"RANK", "4"},
                                         {"LOCAL_RANK", "-1"},
                                         {"MASTER_ADDR", ""},
                                         {"MASTER_PORT", "99999"}}) {
    auto bad = good;
    bad[name] = value;
    const Variables v(bad);
    CHECK_THROWS_WITH(tools::find_launch(), Catch::Contains(name));
  }
}

namespace {

// The status of three ranks that each run the script, and what they wrote.
Status shell(const TempFolder& tmp, const std::string& script, double grace = 10) {
  put_bytes(tmp / "rank.sh", "exec 2>/dev/null; cd " + tmp.path() + "\n" + script);
  return tools::run_processes({"/bin/sh", tmp / "rank.sh"}, 3, grace, "do this");
}

double seconds_of(const std::function<void()>& f) {
  const auto start = std::chrono::steady_clock::now();
  f();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

}  // namespace

TEST_CASE("launch: ranks know who they are, and their end is the run's", "[launch]") {
  const TempFolder tmp;
  CHECK(shell(tmp, "echo $RANK/$LOCAL_RANK/$WORLD_SIZE $MASTER_ADDR > out.$RANK") == Status::kOk);
  for (int r = 0; r < 3; ++r)
    CHECK(get_bytes(tmp / ("out." + std::to_string(r))) == format("%d/%d/3 127.0.0.1\n", r, r));
  // A process group each, so that a terminal's signal reaches them through the parent alone.
  CHECK(shell(tmp, "set -- $(cat /proc/$$/stat); [ $5 = $$ ] || exit 4") == Status::kOk);
  CHECK(shell(tmp, "exit $((RANK == 1 ? 4 : 0))") == Status::kFile);
  CHECK(shell(tmp, "exit 75") == Status::kStopped);
  CHECK(shell(tmp, "sleep 0.0$RANK; exit $((RANK == 1 ? 75 : RANK == 2 ? 5 : 0))") ==
        Status::kMemory);
  // The first that fails counts, not those that follow from it.
  CHECK(shell(tmp, "sleep 0.$((RANK == 1 ? 0 : 6)); exit $((RANK == 1 ? 4 : 8))") == Status::kFile);
}

TEST_CASE("launch: when a rank is killed the others do not stay", "[launch]") {
  const TempFolder tmp;
  Status status = Status::kOk;
  const double seconds = seconds_of([&] {
    status = shell(tmp, "echo $$ > pid.$RANK; [ $RANK = 1 ] && kill -9 $$; exec sleep 1000", 0.5);
  });
  CHECK(status == Status::kPeer);
  CHECK(seconds < 30);
  for (int r = 0; r < 3; ++r) {
    const pid_t process = std::stoi(get_bytes(tmp / ("pid." + std::to_string(r))));
    CHECK(::kill(process, 0) != 0);
  }
}

TEST_CASE("launch: signals are handed on, once", "[launch]") {
  for (const int signal : {SIGTERM, SIGUSR1}) {
    const TempFolder tmp;
    const pid_t own = ::getpid();
    const std::string name = signal == SIGTERM ? "TERM" : "USR1";
    // Rank 2 sends it to the parent when all are ready.
    const Status status = shell(
        tmp, "trap 'echo x >> got.$RANK; sleep 0.3; exit 75' " + name +
                 "; touch ready.$RANK; [ $RANK = 2 ] && { while ! [ -e ready.0 -a -e ready.1 ]; do "
                 "sleep 0.01; done; kill -" +
                 name + " " + std::to_string(own) + "; }; while :; do sleep 0.02; done");
    CHECK(status == Status::kStopped);
    for (int r = 0; r < 3; ++r) CHECK(get_bytes(tmp / ("got." + std::to_string(r))) == "x\n");
  }
}

TEST_CASE("launch: --gpus says what it cannot do", "[launch]") {
  const TempFolder tmp;
  const auto run = [&](const std::string& more) {
    const int code = Child(train_command(tmp / "run", more), tmp / "log").wait();
    return std::pair(code, get_bytes(tmp / "log"));
  };
  const auto [code, log] = run("--gpus 4 --device cpu");
  CHECK(code == 2);
  CHECK(log.find("--gpus 4 and --device cpu exclude each other") != std::string::npos);
  if (cuda_device_count() < 1000) {
    const auto [missing, text] = run("--gpus 1000");
    CHECK(missing == 6);
    CHECK(text.find("--gpus 1000: this machine has") != std::string::npos);
  }
  // Gradients of CPUs are summed by MPI alone, which rank 0 says.
  const int port = free_port();
  std::optional<Variables> v(std::in_place, torchrun_words(1, 2, port));
  Child second(train_command(tmp / "run", "--device cpu"), tmp / "second");
  v.reset();
  v.emplace(torchrun_words(0, 2, port));
  const auto [cpu, words] = run("--device cpu");
  CHECK(cpu == 2);
  CHECK(second.wait() == 2);
  CHECK(words.find("2 ranks on CPUs sum their gradients by MPI") != std::string::npos);
  CHECK(get_bytes(tmp / "second").empty());
  CHECK(run("--gpus 3").first == 2);
  CHECK_FALSE(std::filesystem::exists(tmp / "run"));
}
