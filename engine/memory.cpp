#include "engine/memory.h"

#include <algorithm>

#include "engine/plan.h"

namespace ddpm {

size_t planned_bytes(const Graph& g) {
  size_t total = 0;
  for (Phase phase : kAllPhases)
    total = std::max(total, make_plan(g.tensors(), g.steps(phase)).bytes);
  bool shadow = false;
  for (const TensorSpec& t : g.tensors()) {
    if (t.kind == TensorKind::kPersistent) total += t.bytes;
    shadow |= t.kind == TensorKind::kArena && t.arena == Arena::kShadow;
  }
  if (shadow)
    total += static_cast<size_t>(g.params().arena_size()) * size_of(g.backend().compute_type());
  return total;
}

void require_memory(const Graph& g, size_t fixed, int batch) {
  const size_t planned = planned_bytes(g), available = g.backend().available_bytes();
  if (planned <= available && fixed <= available - planned) return;
  const auto gib = [](size_t bytes) { return static_cast<double>(bytes) / (size_t{1} << 30); };
  // Almost all of what is planned grows with the batch.
  const size_t room = available > fixed ? available - fixed : 0;
  const double fits = static_cast<double>(room) / static_cast<double>(planned) * batch;
  const std::string advice =
      fits >= 1 && batch > 1
          ? format("; use --batch-size %d", std::min(static_cast<int>(fits), batch - 1))
          : "; no batch fits: free memory or use a smaller model";
  fail(Status::kMemory,
       "out of memory: %.2f GiB are needed (%.2f of them whatever the batch), %.2f GiB are free%s",
       gib(planned + fixed), gib(fixed), gib(available), advice.c_str());
}

}  // namespace ddpm
