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

void require_memory(const Graph& g, size_t fixed, int batch,
                    const std::function<size_t(int)>& planned_at, int parts) {
  const size_t available = g.backend().available_bytes();
  const auto fits = [&](size_t planned) {
    return planned <= available && fixed <= available - planned;
  };
  const size_t planned = planned_bytes(g);
  if (fits(planned)) return;
  int good = 0;  // the largest batch that is known to fit; `batch` does not
  for (int bad = batch; bad - good > 1;) {
    const int middle = good + (bad - good) / 2;
    (fits(planned_at(middle)) ? good : bad) = middle;
  }
  const auto gib = [](size_t bytes) { return static_cast<double>(bytes) / (size_t{1} << 30); };
  const std::string advice = good > 0
                                 ? format("use --batch-size %d", good * parts)
                                 : std::string("no batch fits: free memory or use a smaller model");
  fail(Status::kMemory, "out of memory: %.2f GiB are needed, %.2f GiB are free; %s",
       gib(planned + fixed), gib(available), advice.c_str());
}

}  // namespace ddpm
