// How the executor has a device run many steps: what is launched, what progress is told, and how a
// chain ends early.
#include <catch2/catch.hpp>

#include <stdexcept>
#include <utility>

#include "engine/executor.h"
#include "tests/recording_backend.h"

using namespace ddpm;

namespace {

// A device that finishes a step each time it is asked how far it is.
struct Device {
  std::vector<int> loops;
  int launches = 0, stops = 0;
  int64_t queued = 0, run = 0;
};

class Loops final : public Recording {
 public:
  explicit Loops(Device& device) : device_(device) {}
  void launch() override { ++device_.launches; }
  void launch_loop(int times) override {
    device_.loops.push_back(times);
    device_.queued += times;
  }
  int64_t loop_runs() const override {
    device_.run = std::min(device_.run + 1, device_.queued);
    return device_.run;
  }
  void stop_loops() override {
    ++device_.stops;
    device_.queued = device_.run;
  }

 private:
  Device& device_;
};

class LoopingBackend : public test::RecordingBackend {
 public:
  std::unique_ptr<Recording> record(const std::function<void()>&) override {
    return std::make_unique<Loops>(device);
  }
  void synchronize() override { device.run = device.queued; }
  Device device;
};

// Writes down every range that begins, below those that are open then.
class NamingBackend final : public LoopingBackend {
 public:
  void begin_range(const char* name) override {
    path.push_back(name);
    seen.emplace_back();
    for (const std::string& part : path) seen.back() += "/" + part;
  }
  void end_range() override { path.pop_back(); }
  std::vector<std::string> take_seen() { return std::exchange(seen, {}); }
  std::vector<std::string> path, seen;
};

Graph one_step(Backend& backend) {
  Graph g(backend, Mode::kInference);
  g.add(backend.advance_state(g.state()));
  return g;
}

}  // namespace

TEST_CASE("executor: many steps are launched in loops, and progress follows the device",
          "[executor]") {
  LoopingBackend backend;
  Executor executor(one_step(backend), {});
  std::vector<int> told;
  backend.take_events();
  executor.steps(120, [&](int done) { told.push_back(done); });
  // The first is run as it is, so that libraries load what they need outside a recording.
  CHECK(backend.take_events().size() == 1);
  CHECK(backend.device.loops == std::vector<int>{50, 50, 19});
  REQUIRE(told.size() >= 2);
  CHECK(told.front() == 1);
  CHECK(told.back() == 120);
  CHECK(std::is_sorted(told.begin(), told.end()));

  SECTION("the next steps count from their own start") {
    told.clear();
    executor.steps(3, [&](int done) { told.push_back(done); });
    CHECK(told == std::vector<int>{1, 2, 3});
    CHECK(backend.device.loops.back() == 3);
  }
  SECTION("nobody waits without progress") {
    const int64_t run = backend.device.run;
    executor.steps(60);
    CHECK(backend.device.run <= run + 1);
    // What follows with progress begins behind it.
    told.clear();
    executor.steps(2, [&](int done) { told.push_back(done); });
    CHECK(told == std::vector<int>{1, 2});
  }
  SECTION("no steps are no launch") {
    executor.steps(0, [&](int) { FAIL("nothing is done"); });
    CHECK(backend.device.loops.size() == 3);
  }
  CHECK(backend.device.launches == 0);
  CHECK(backend.device.stops == 0);
}

TEST_CASE("executor: what progress throws ends the loops", "[executor]") {
  LoopingBackend backend;
  Executor executor(one_step(backend), {});
  int last = 0;
  CHECK_THROWS_WITH(executor.steps(200,
                                   [&](int done) {
                                     last = done;
                                     if (done >= 60) throw std::runtime_error("enough");
                                   }),
                    "enough");
  CHECK(last == 60);
  CHECK(backend.device.stops == 1);
  CHECK(backend.device.run < 199);
  executor.step();
  CHECK(backend.device.launches == 1);
}

TEST_CASE("executor: a profiler is told what runs, and that it ended when it throws",
          "[executor]") {
  using Names = std::vector<std::string>;
  NamingBackend backend;
  Graph g(backend, Mode::kInference);
  bool broken = false;
  Call call = backend.advance_state(g.state());
  call.run = [&broken](const Run&) {
    if (broken) throw std::runtime_error("broken");
  };
  {
    const Graph::Scope scope(g, "block");
    g.add(call);
    g.add(call, Phase::kSetup);
  }
  Executor executor(std::move(g), {});
  executor.run(Phase::kSetup);
  CHECK(backend.take_seen() == Names{"/setup", "/setup/block:advance_state"});
  executor.setup_for_good();
  CHECK(backend.take_seen() == Names{"/setup", "/setup/block:advance_state"});
  broken = true;
  CHECK_THROWS_WITH(executor.run(Phase::kStep), "broken");
  CHECK(backend.path.empty());
  broken = false;
  backend.take_seen();
  executor.step();
  CHECK(backend.take_seen() == Names{"/step", "/step/block:advance_state"});
  // From now on a launch, whose steps have no ranges of their own.
  executor.step();
  executor.steps(2);
  CHECK(backend.take_seen() == Names{"/step", "/steps"});
  CHECK(backend.path.empty());
}

TEST_CASE("executor: a held tensor is given exactly its bytes", "[executor]") {
  LoopingBackend backend;
  Graph g(backend, Mode::kInference);
  const Tensor images = g.held({3, 2, 2, 1}, DType::kU8, "images");
  const Tensor other = g.persistent({1, 1, 1, 12}, DType::kU8, "other");
  g.add(backend.copy(12, DType::kF32, images, other, Write::kOverwrite));
  Executor executor(std::move(g), {});
  const size_t before = executor.bytes();
  CHECK(executor.address(images) == nullptr);
  CHECK_THROWS_WITH(executor.hold(images, std::vector<uint8_t>(11), 0), Catch::Contains("images"));
  CHECK_THROWS_AS(executor.hold(other, std::vector<uint8_t>(12), 0), Error);
  CHECK_FALSE(executor.hold(images, std::vector<uint8_t>(12), 0));
  CHECK(executor.address(images) != nullptr);
  CHECK(executor.bytes() == before + 12);
}
