#include "engine/executor.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstring>
#include <utility>

#include "kernels/bf16.h"

namespace ddpm {

Executor::Executor(Graph graph, const ParamArenas& arenas, ExecutorOptions options)
    : graph_(std::move(graph)), options_(options) {
  size_t bytes = 0;
  for (Phase phase : kAllPhases) {
    plan_of(phase) = make_plan(graph_.tensors(), graph_.steps(phase));
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
    } else {
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
  const size_t workspace = plan(phase).workspaces[step].offset;
  graph_.steps(phase)[step].call.run(Run{
      pointers_.data(), static_cast<char*>(arena_->data()) + workspace, graph_.backend().stream()});
}

void Executor::step() {
  if (stepped_ && !recording_ && !options_.poison)
    recording_ = graph_.backend().record([this] { run(Phase::kStep); });
  stepped_ = true;
  if (recording_)
    recording_->launch();
  else
    run(Phase::kStep);
}

void Executor::run(Phase phase) {
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

std::string Executor::step_checked() {
  const std::vector<Step>& steps = graph_.steps();
  for (size_t i = 0; i < steps.size(); ++i) {
    run(Phase::kStep, i);
    for (const Out& out : steps[i].call.writes) {
      if (!out) continue;
      if (!all_finite({out.slot})) return steps[i].scope + ":" + steps[i].call.op;
    }
  }
  return {};
}

bool Executor::all_finite(Tensor t) const {
  const TensorSpec& info = graph_.info(t);
  if (info.dtype != DType::kF32 && info.dtype != DType::kBF16) return true;
  std::vector<uint8_t> bytes(info.bytes);
  download(bytes.data(), t);
  const auto finite = [&]<typename T>(T value) {
    for (size_t i = 0; i + sizeof value <= bytes.size(); i += sizeof value) {
      std::memcpy(&value, &bytes[i], sizeof value);
      if (!std::isfinite(to_float(value))) return false;
    }
    return true;
  };
  return info.dtype == DType::kF32 ? finite(0.0f) : finite(bf16{});
}

void Executor::poison_after(Phase phase, size_t step) {
  for (const Placement* p : dies_after_[static_cast<size_t>(phase)][step])
    graph_.backend().fill(static_cast<char*>(arena_->data()) + p->offset, 0xFF, p->bytes);
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
  return total;
}

}  // namespace ddpm
