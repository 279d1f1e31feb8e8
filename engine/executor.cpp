#include "engine/executor.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstring>
#include <limits>
#include <thread>
#include <utility>

#include "kernels/bf16.h"

namespace ddpm {
namespace {

class Range {
 public:
  Range(Backend& backend, const char* name) : backend_(backend) { backend_.begin_range(name); }
  ~Range() { backend_.end_range(); }
  Range(const Range&) = delete;
  Range& operator=(const Range&) = delete;

 private:
  Backend& backend_;
};

constexpr const char* kPhaseNames[kPhases] = {"setup", "start of a chain", "step", "update"};

}  // namespace

Executor::Executor(Graph graph, const ParamArenas& arenas, ExecutorOptions options)
    : graph_(std::move(graph)), options_(options) {
  size_t bytes = 0;
  for (Phase phase : kAllPhases) {
    plan_of(phase) = make_plan(graph_.tensors(), graph_.steps(phase));
    for (const Step& s : graph_.steps(phase))
      range_names_[static_cast<size_t>(phase)].push_back(s.scope + ":" + s.call.op);
    bytes = std::max(bytes, plan(phase).bytes);
  }
  arena_ = graph_.backend().allocate(bytes);
  bind(arenas);
  for (const auto& [id, values] : graph_.constants()) upload({id}, values.data());
  if (!options_.poison) return;
  graph_.backend().fill(arena_->data(), 0xFF, arena_->size());
  for (Phase phase : kAllPhases) {
    auto& dies_after = dies_after_[static_cast<size_t>(phase)];
    dies_after.resize(graph_.steps(phase).size());
    for (const std::vector<Placement>* placements : {&plan(phase).tensors, &plan(phase).workspaces})
      for (const Placement& p : *placements)
        if (p.first >= 0 && p.bytes > 0) dies_after[static_cast<size_t>(p.last)].push_back(&p);
  }
}

void Executor::bind(const ParamArenas& arenas) {
  const std::vector<TensorSpec>& tensors = graph_.tensors();
  pointers_.assign(tensors.size(), nullptr);
  for (size_t i = 0; i < tensors.size(); ++i) {
    const TensorSpec& t = tensors[i];
    if (t.kind == TensorKind::kPersistent) {
      persistent_.push_back(graph_.backend().allocate(t.bytes));
      pointers_[i] = persistent_.back()->data();
    } else if (t.kind == TensorKind::kArena) {
      const size_t element = size_of(t.dtype);
      if (t.arena == Arena::kShadow && !shadow_)
        shadow_ =
            graph_.backend().allocate(static_cast<size_t>(graph_.params().arena_size()) * element);
      char* base =
          static_cast<char*>(t.arena == Arena::kShadow ? shadow_->data() : arenas[t.arena]);
      const int64_t offset = t.param < 0 ? 0 : graph_.params()[t.param].offset;
      pointers_[i] = base == nullptr ? nullptr : base + offset * static_cast<int64_t>(element);
    } else if (t.kind == TensorKind::kPlanned) {
      for (Phase phase : kAllPhases) {
        const Placement& p = plan(phase).tensors[i];
        if (p.first < 0) continue;
        DDPM_CHECK(pointers_[i] == nullptr, "tensor %zu is written in two phases", i);
        pointers_[i] = static_cast<char*>(arena_->data()) + p.offset;
      }
    }
  }
}

void Executor::run(Phase phase, size_t step) {
  const Range range(graph_.backend(), range_names_[static_cast<size_t>(phase)][step].c_str());
  const size_t workspace = plan(phase).workspaces[step].offset;
  graph_.steps(phase)[step].call.run(Run{
      pointers_.data(), static_cast<char*>(arena_->data()) + workspace, graph_.backend().stream()});
}

void Executor::end_part(size_t part) {
  if (graph_.part_ends().empty()) return;
  for (const Call& call : graph_.part_ends()[part])
    call.run(Run{pointers_.data(), nullptr, graph_.backend().stream()});
}

void Executor::run_step() {
  for (size_t part = 0; part < parts(); ++part) {
    run(Phase::kStep);
    end_part(part);
  }
  if (!graph_.steps(Phase::kUpdate).empty()) run(Phase::kUpdate);
}

// Whether the step is recorded, from the second one on.
bool Executor::record() {
  if (stepped_ && !recording_ && !options_.poison)
    recording_ = graph_.backend().record([this] { run_step(); });
  stepped_ = true;
  return recording_ != nullptr;
}

void Executor::step() {
  if (!record()) {
    run_step();
    return;
  }
  const Range range(graph_.backend(), "step");
  recording_->launch();
}

void Executor::steps(int count, const Progress& progress) {
  int done = 0;
  while (done < count && !record()) {
    run_step();
    ++done;
    if (progress) progress(done);
  }
  if (done < count) loop(done, count, progress);
}

// Steps done + 1 to count. All are launched at once; without progress to tell nobody waits.
void Executor::loop(int done, int count, const Progress& progress) {
  constexpr int kStepsPerLaunch = 50;
  constexpr auto kPause = std::chrono::milliseconds(1);
  if (progress) graph_.backend().synchronize();  // earlier loops without progress have ended then
  const Range range(graph_.backend(), "steps");
  const int64_t before = recording_->loop_runs() - done;
  for (int i = done; i < count; i += kStepsPerLaunch)
    recording_->launch_loop(std::min(count - i, kStepsPerLaunch));
  if (!progress) return;
  try {
    while (done < count) {
      const int now = static_cast<int>(recording_->loop_runs() - before);
      if (now > done)
        progress(done = now);
      else
        std::this_thread::sleep_for(kPause);
    }
  } catch (...) {
    recording_->stop_loops();
    throw;
  }
}

void Executor::run(Phase phase) {
  const Range range(graph_.backend(), kPhaseNames[static_cast<size_t>(phase)]);
  for (size_t i = 0; i < graph_.steps(phase).size(); ++i) {
    run(phase, i);
    if (options_.poison) poison_after(phase, i);
  }
}

void Executor::setup_for_good() {
  std::vector<int> readers(pointers_.size(), 0);  // steps to come that read a tensor
  for (Phase phase : {Phase::kSetup, Phase::kStep})
    for (const Step& s : graph_.steps(phase))
      for (In in : s.call.reads)
        if (in) ++readers[static_cast<size_t>(in.slot)];
  const Range range(graph_.backend(), kPhaseNames[static_cast<size_t>(Phase::kSetup)]);
  const std::vector<Step>& steps = graph_.steps(Phase::kSetup);
  for (size_t i = 0; i < steps.size(); ++i) {
    run(Phase::kSetup, i);
    for (In in : steps[i].call.reads)
      if (in && --readers[static_cast<size_t>(in.slot)] == 0 && graph_.info({in.slot}).param >= 0)
        graph_.backend().discard(pointers_[static_cast<size_t>(in.slot)],
                                 graph_.info({in.slot}).bytes);
  }
}

void Executor::step_timed(std::vector<double>& seconds) {
  using Clock = std::chrono::steady_clock;
  const std::vector<Step>& steps = graph_.steps();
  seconds.resize(steps.size(), 0.0);
  for (size_t i = 0; i < steps.size(); ++i) {
    const Clock::time_point start = Clock::now();
    run(Phase::kStep, i);
    graph_.backend().synchronize();
    seconds[i] += std::chrono::duration<double>(Clock::now() - start).count();
  }
}

std::string Executor::step_checked(const Watch& each) {
  for (size_t part = 0; part < parts(); ++part) {
    for (size_t i = 0; i < graph_.steps().size(); ++i) {
      if (graph_.steps()[i].call.collective) continue;
      if (const std::string bad = run_checked(Phase::kStep, i, each); !bad.empty()) return bad;
    }
    end_part(part);
  }
  const std::vector<Step>& update = graph_.steps(Phase::kUpdate);
  for (size_t i = 0; i < update.size() && !update[i].call.collective; ++i)
    if (const std::string bad = run_checked(Phase::kUpdate, i, each); !bad.empty()) return bad;
  return {};
}

// The step's name if an output is not finite.
std::string Executor::run_checked(Phase phase, size_t step, const Watch& each) {
  run(phase, step);
  const Step& s = graph_.steps(phase)[step];
  const std::string name = s.scope + ":" + s.call.op;
  for (const Out& out : s.call.writes) {
    if (!out) continue;
    const DType type = graph_.info({out.slot}).dtype;
    if (type != DType::kF32 && type != DType::kBF16) continue;
    const Extent extent = extent_of({out.slot});
    if (each) each(name, extent);
    if (extent.nonfinite > 0) return name;
  }
  return {};
}

Extent Executor::extent_of(Tensor t) const {
  const TensorSpec& info = graph_.info(t);
  std::vector<uint8_t> bytes(info.bytes);
  download(bytes.data(), t);
  Extent extent{std::numeric_limits<float>::max(), std::numeric_limits<float>::lowest(), 0};
  const auto visit = [&]<typename T>(T value) {
    for (size_t i = 0; i + sizeof value <= bytes.size(); i += sizeof value) {
      std::memcpy(&value, &bytes[i], sizeof value);
      const float v = to_float(value);
      if (!std::isfinite(v)) {
        ++extent.nonfinite;
        continue;
      }
      extent.low = std::min(extent.low, v);
      extent.high = std::max(extent.high, v);
    }
  };
  if (info.dtype == DType::kF32)
    visit(0.0f);
  else
    visit(bf16{});
  if (extent.low > extent.high) extent.low = extent.high = 0;
  return extent;
}

void Executor::poison_after(Phase phase, size_t step) {
  for (const Placement* p : dies_after_[static_cast<size_t>(phase)][step])
    graph_.backend().fill(static_cast<char*>(arena_->data()) + p->offset, 0xFF, p->bytes);
}

bool Executor::hold(Tensor t, std::vector<uint8_t> bytes, size_t reserve) {
  const TensorSpec& info = graph_.info(t);
  DDPM_CHECK(info.kind == TensorKind::kHeld && bytes.size() == info.bytes,
             "%s: %zu bytes to hold, %zu given", info.name.c_str(), info.bytes, bytes.size());
  held_.push_back(graph_.backend().hold(std::move(bytes), reserve));
  pointers_[static_cast<size_t>(t.id)] = held_.back()->data();
  return held_.back()->on_host();
}

void Executor::upload(Tensor t, const void* host, size_t bytes) {
  DDPM_CHECK(bytes <= graph_.info(t).bytes, "upload of %zu bytes into %zu", bytes,
             graph_.info(t).bytes);
  graph_.backend().upload(pointers_.at(static_cast<size_t>(t.id)), host, bytes);
}

void Executor::download(void* host, Tensor t) const {
  graph_.backend().download(host, pointers_.at(static_cast<size_t>(t.id)), graph_.info(t).bytes);
}

StepState Executor::state() const {
  StepState s;
  download(&s, graph_.state());
  return s;
}

void Executor::set_state(const StepState& s) { upload(graph_.state(), &s); }

size_t Executor::bytes() const {
  size_t total = arena_->size() + (shadow_ ? shadow_->size() : 0);
  for (const auto& m : persistent_) total += m->size();
  for (const auto& m : held_) total += m->on_host() ? 0 : m->size();
  return total;
}

}  // namespace ddpm
