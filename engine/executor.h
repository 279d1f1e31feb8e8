// Runs a graph's steps over memory that is bound once. Nothing is allocated after construction.
#pragma once

#include <algorithm>
#include <array>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "engine/graph.h"
#include "engine/plan.h"

namespace ddpm {

// The parameter arenas a graph runs over; what the graph does not use may be null.
struct ParamArenas {
  std::array<void*, kArenas> data{};
  void*& operator[](Arena a) { return data[static_cast<size_t>(a)]; }
  void* operator[](Arena a) const { return data[static_cast<size_t>(a)]; }
};

// The values of a tensor: the least and the largest of those that are finite (0 where none is), and
// how many are not.
struct Extent {
  float low = 0, high = 0;
  int64_t nonfinite = 0;
};

struct ExecutorOptions {
  bool poison = false;  // fill memory with NaN (all bits set) as soon as it is no longer alive
};

class Executor {
 public:
  // Takes the graph over, plans its memory and allocates it.
  Executor(Graph graph, const ParamArenas& arenas, ExecutorOptions options = {});

  // Runs the steps of a phase, one by one.
  void run(Phase phase);
  // Runs a step, with all its parts if it has some; from the second time on by one launch, where
  // the backend has that.
  void step();
  // The same `count` times; where the backend can, many steps by one launch. `progress` is told how
  // many are done, now and then; what it throws ends the steps.
  using Progress = std::function<void(int done)>;
  void steps(int count, const Progress& progress = {});
  // As run(Phase::kSetup), for weights that will not change again: those that only the setup reads
  // are given back as it goes, so that they and their packed forms never stand in memory together.
  void setup_for_good();
  // As step(), adding each step's seconds to `seconds` (one entry per step).
  void step_timed(std::vector<double>& seconds);
  // As step(), stopping at the first operation with an output that is not finite, which it names;
  // "" if there is none. `each` is told what every output holds. Slow: for finding out. Nothing
  // that waits for other ranks is run: what comes after their sum is left out.
  using Watch = std::function<void(const std::string& name, const Extent& output)>;
  std::string step_checked(const Watch& each = {});

  void upload(Tensor t, const void* host) { upload(t, host, graph_.info(t).bytes); }
  void upload(Tensor t, const void* host, size_t bytes);
  void download(void* host, Tensor t) const;
  // Gives a tensor of kHeld what it holds for good; see Backend::hold. Whether it stayed on the
  // host.
  bool hold(Tensor t, std::vector<uint8_t> bytes, size_t reserve);
  // Where the tensor lies, in the backend's memory.
  void* address(Tensor t) const { return pointers_.at(static_cast<size_t>(t.id)); }
  StepState state() const;
  void set_state(const StepState& state);

  const Graph& graph() const { return graph_; }
  const Plan& plan(Phase phase = Phase::kStep) const { return plans_[static_cast<size_t>(phase)]; }
  // Planned arena, persistent and held tensors and the weights' shadow, without the other parameter
  // arenas and what stayed on the host.
  size_t bytes() const;

 private:
  void bind(const ParamArenas& arenas);
  Plan& plan_of(Phase phase) { return plans_[static_cast<size_t>(phase)]; }
  void run(Phase phase, size_t step);
  void run_step();
  void end_part(size_t part);
  size_t parts() const { return std::max<size_t>(graph_.part_ends().size(), 1); }
  std::string run_checked(Phase phase, size_t step, const Watch& each);
  bool record();
  void loop(int done, int count, const Progress& progress);
  void poison_after(Phase phase, size_t step);
  Extent extent_of(Tensor t) const;

  Graph graph_;
  ExecutorOptions options_;
  std::array<Plan, kPhases> plans_;
  std::array<std::vector<std::string>, kPhases> range_names_;  // of each step
  std::unique_ptr<Memory> arena_;                              // of all phases, one at a time
  std::vector<std::unique_ptr<Memory>> persistent_, held_;
  std::unique_ptr<Memory> shadow_;  // Arena::kShadow, if a step reads it
  std::vector<void*> pointers_;
  // Poison mode: by phase and step.
  std::array<std::vector<std::vector<const Placement*>>, kPhases> dies_after_;
  // Last, so that it goes before the memory it works on.
  std::unique_ptr<Recording> recording_;
  bool stepped_ = false;  // the first step is run one by one: libraries load what they need then
};

}  // namespace ddpm
