// Ranks on GPUs, without one: the program's own file over NCCL's functions as fake_nccl.cpp has
// them, and the CUDA kernels on the host. Each case is its own ranks, under mpirun.
#include <catch2/catch.hpp>

#include <unistd.h>

#include <filesystem>
#include <thread>

#include "engine/shapes.h"
#include "model/trainer.h"
#include "tests/rank_support.h"
#include "tests/simt/simt_backend.h"
#include "tests/small_model.h"

using namespace ddpm;
using namespace ddpm::test;

namespace {

// Under mpirun, as srun would have it: rank and size from variables, no word of MPI to the ranks,
// which meet over TCP.
int from_variable(const char* name) {
  const char* text = std::getenv(name);
  return text == nullptr ? -1 : std::atoi(text);
}
bool inside() { return std::getenv("DDPM_NCCL_RANKS") != nullptr; }

struct Ended {
  int code;
  std::string log;
  double seconds;
};
Ended run_ranks(int ranks, const std::string& test_case, const std::string& fake = "none") {
  const TempFolder tmp;
  const auto start = std::chrono::steady_clock::now();
  Child child = mpirun(ranks,
                       "-x DDPM_NCCL_RANKS=127.0.0.1:" + std::to_string(free_port()) +
                           " -x FAKE_NCCL=" + fake + " " + own_program(),
                       test_case, tmp / "log");
  const int code = child.wait();
  return {code, get_bytes(tmp / "log"),
          std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count()};
}

struct Device {
  HostLane* lane = nullptr;
  std::unique_ptr<Backend> backend;
  std::unique_ptr<Communicator> control;
  explicit Device(int64_t stuck_after = 0)
      : backend(make_simt_backend(DType::kF32, {.lane = &lane, .stuck_after = stuck_after})) {}
  std::unique_ptr<Communicator> join(double timeout = 30) {
    control =
        make_tcp_communicator(std::getenv("DDPM_NCCL_RANKS"), from_variable("OMPI_COMM_WORLD_RANK"),
                              from_variable("OMPI_COMM_WORLD_SIZE"), leaving(timeout));
    return make_nccl_communicator(*backend, *control, leaving(timeout));
  }
};

}  // namespace

TEST_CASE("nccl: sums, on 1 to 3 ranks", "[nccl_sums]") {
  if (!inside()) {
    for (int ranks : {1, 2, 3}) {
      const Ended ended = run_ranks(ranks, "[nccl_sums]");
      INFO(ended.log);
      CHECK(ended.code == 0);
    }
    return;
  }
  Device device;
  const auto ranks = device.join();
  CHECK(ranks->description() == nccl_library() + " and TCP");
  check_sums(*ranks);
  check_rounded_sums(*ranks);
}

namespace {

struct Trained {
  std::vector<float> weights, gradients;
  double loss = 0;
  std::vector<std::vector<std::string>> lane;  // of each step
};

// Where every layer is active, a step's gradients are something everywhere.
Trained train(Device& device, const Parts& parts, int steps = 3, bool active = false) {
  TrainerOptions o;
  o.batch_size = 4;
  o.parts = parts;
  o.adam.learning_rate = 1e-3f;
  o.activate_zero_layers = active;
  Trainer trainer(*device.backend, small_unet(), SchedulerConfig{}, o,
                  make_shapes(8, {1, 8, 8, 3}));
  trainer.initialize(5);
  Trained t;
  for (int i = 0; i < steps; ++i) {
    if (device.lane != nullptr) device.lane->take_events();
    trainer.step();
    if (device.lane != nullptr) t.lane.push_back(device.lane->take_events());
  }
  t.weights = trainer.store().read(Arena::kWeights);
  t.gradients = trainer.store().read(Arena::kGradients);
  t.loss = trainer.state().loss_sum;
  return t;
}

// How often `word` begins an event.
int64_t count(const std::vector<std::string>& events, const std::string& word) {
  return std::count_if(events.begin(), events.end(),
                       [&](const std::string& e) { return e.starts_with(word); });
}

void check_same_everywhere(Communicator& ranks, const Trained& t) {
  std::string lane;
  for (const auto& step : t.lane)
    for (const std::string& event : step) lane += event + "\n";
  for (const std::string& other : gather(ranks, lane)) CHECK(other == lane);
  const std::string weights(reinterpret_cast<const char*>(t.weights.data()),
                            t.weights.size() * sizeof(float));
  for (const std::string& other : gather(ranks, weights)) CHECK((other == weights));
}

}  // namespace

TEST_CASE("nccl: a step over ranks is the step of one, and each has the same one recorded",
          "[nccl_training]") {
  if (!inside()) {
    const Ended ended = run_ranks(2, "[nccl_training]");
    INFO(ended.log);
    CHECK(ended.code == 0);
    return;
  }
  Device device, alone;
  const auto ranks = device.join();
  const Trained whole = train(alone, {});
  const Trained two = train(device, {.total = 2, .ranks = ranks.get(), .bucket = 2000});
  CHECK(two.loss == Approx(whole.loss).epsilon(1e-6));
  CHECK(relative_error(two.weights, whole.weights) < 1e-6);
  check_same_everywhere(*ranks, two);
  for (const auto& step : two.lane) {
    CHECK(step == two.lane[0]);  // that which was recorded does what the first did
    CHECK(count(step, "all_reduce") > 3);
    // Each sum begins behind what wrote its gradients; then all are waited for, and the losses.
    for (size_t i = 0; i < step.size(); ++i)
      if (step[i].starts_with("all_reduce")) CHECK(step[i - 1] == "fork");
    CHECK(std::vector<std::string>(step.end() - 4, step.end()) ==
          std::vector<std::string>{"join", "fork", "all_gather 4", "join"});
    CHECK(count(step, "join") == 2);
  }
  // Rounded: gradients of 8 bits, near the others, and the same operations between ranks.
  Parts rounded{.total = 2, .ranks = ranks.get(), .bucket = 2000, .sum_type = DType::kBF16};
  const Trained exact = train(alone, {}, 1, true), narrow = train(device, rounded, 1, true);
  const Trained wide = train(device, {.total = 2, .ranks = ranks.get(), .bucket = 2000}, 1, true);
  CHECK(relative_error(wide.gradients, exact.gradients) < 1e-6);
  for (float g : narrow.gradients) REQUIRE(to_float(to_bf16(g)) == g);
  CHECK(relative_error(narrow.gradients, exact.gradients) < 4e-3);
  CHECK(relative_error(narrow.gradients, exact.gradients) > 1e-4);
  CHECK(narrow.lane[0] == two.lane[0]);
  check_same_everywhere(*ranks, narrow);
  // In order: bytes as of one process with two parts.
  const Trained parts = train(alone, {.total = 2, .own = 2, .in_order = true});
  const Trained ordered = train(device, {.total = 2, .in_order = true, .ranks = ranks.get()});
  CHECK(ordered.weights == parts.weights);
  CHECK(ordered.loss == parts.loss);
  check_same_everywhere(*ranks, ordered);
  for (const auto& step : ordered.lane)
    CHECK(step == std::vector<std::string>{"fork", "messages 4", "join", "fork", "messages 4",
                                           "join", "fork", "all_gather 4", "join"});
}

namespace {

// What carries the host's words.
class Noted final : public Communicator {
 public:
  int rank() const override { return 0; }
  int size() const override { return 1; }
  std::string description() const override { return "noted"; }
  void broadcast(void*, size_t) override { ++broadcasts; }
  void share(void*, size_t) override { ++shares; }
  void start_sum(void*, DType, int64_t) override { FAIL("a sum of the device"); }
  void finish_sums() override { FAIL("a sum of the device"); }
  void exchange_slices(const float*, int64_t, float* const*) override { FAIL("a device's slices"); }
  void gather_slices(const float*, float*, int64_t) override { FAIL("a device's slices"); }
  void share_in_step(void*, size_t) override { FAIL("a device's values"); }
  std::optional<CommSeconds> seconds() const override { return std::nullopt; }
  void announce_failure(const std::string& what) override { failure = what; }

  int broadcasts = 0, shares = 0;
  std::string failure;
};

}  // namespace

TEST_CASE("nccl: only the device's sums go by NCCL", "[nccl_beside]") {
  if (!inside()) {
    const Ended ended = run_ranks(1, "[nccl_beside]");
    INFO(ended.log);
    CHECK(ended.code == 0);
    return;
  }
  Noted control;
  Device device;
  const auto ranks = make_nccl_communicator(*device.backend, control, leaving(30));
  CHECK(control.broadcasts == 1);  // where to meet
  int value = 3;
  ranks->broadcast(&value, sizeof value);
  ranks->share(&value, sizeof value);
  CHECK(control.broadcasts == 2);
  CHECK(control.shares == 1);
  CHECK(device.lane->take_events().empty());
  std::vector<float> sum(10, 1.0f);
  ranks->start_sum(sum.data(), DType::kF32, 10);
  ranks->finish_sums();
  CHECK(device.lane->take_events() == std::vector<std::string>{"fork", "all_reduce 10", "join"});
  CHECK(ranks->description() == nccl_library() + " and noted");
  ranks->announce_failure("because");
  CHECK(control.failure == "because");
}

// Operation 3 is found to have failed; the main thread is busy with something else.
TEST_CASE("nccl: an error that NCCL finds by itself is exit 8", "[nccl_error]") {
  if (!inside()) {
    const Ended ended = run_ranks(1, "[nccl_error]", "fail:3");
    INFO(ended.log);
    CHECK(ended.code == 8);
    CHECK(ended.log.find("NCCL: another rank: an error: planted; do this") != std::string::npos);
    // An abort that does not end is not waited for.
    const Ended slow = run_ranks(1, "[nccl_error]", "fail:3,abort:1000");
    INFO(slow.log);
    CHECK(slow.code == 8);
    CHECK(slow.seconds > 5);
    CHECK(slow.seconds < 60);
    return;
  }
  Device device;
  const auto ranks = device.join();
  int value = 0;
  for (int i = 0; i < 3; ++i) ranks->share_in_step(&value, sizeof value);
  std::this_thread::sleep_for(std::chrono::seconds(100));
}

TEST_CASE("nccl: steps that never end are a lost rank: exit 8", "[nccl_stuck]") {
  if (!inside()) {
    const Ended ended = run_ranks(1, "[nccl_stuck]");
    INFO(ended.log);
    CHECK(ended.code == 8);
    CHECK(ended.log.find("no step has ended for 1 s") != std::string::npos);
    CHECK(ended.log.find("nothing was asked for") != std::string::npos);
    return;
  }
  Device device(2);
  const auto ranks = device.join(1);
  for (int i = 0; i < 2; ++i) ranks->step_asked();
  std::this_thread::sleep_for(std::chrono::seconds(3));  // nothing is asked: nobody is missing
  std::fprintf(stderr, "nothing was asked for\n");
  ranks->step_asked();
  std::this_thread::sleep_for(std::chrono::seconds(100));
}

// Ranks that do not do the same are told so, rather than left waiting.
TEST_CASE("nccl: the stand-in finds operations that differ between ranks", "[nccl_differ]") {
  if (!inside()) {
    const Ended ended = run_ranks(2, "[nccl_differ]");
    INFO(ended.log);
    CHECK(ended.code == 8);
    CHECK(ended.log.find("all_reduce 11 where rank 0 has all_reduce 10") != std::string::npos);
    return;
  }
  Device device;
  const auto ranks = device.join();
  std::vector<float> sum(11, 1.0f);
  ranks->start_sum(sum.data(), DType::kF32, 10 + ranks->rank());
  ranks->finish_sums();
  std::this_thread::sleep_for(std::chrono::seconds(100));
}
