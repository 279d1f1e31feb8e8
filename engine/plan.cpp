#include "engine/plan.h"

#include <algorithm>

namespace ddpm {
namespace {

constexpr size_t kAlignment = 64;

size_t aligned(size_t bytes) { return (bytes + kAlignment - 1) / kAlignment * kAlignment; }

void find_lifetimes(const std::vector<TensorSpec>& tensors, const std::vector<Step>& steps,
                    Plan& plan) {
  for (size_t s = 0; s < steps.size(); ++s) {
    const int step = static_cast<int>(s);
    const Call& call = steps[s].call;
    if (call.workspace > 0) plan.workspaces[s] = {0, aligned(call.workspace), step, step};
    for (const In& in : call.reads) {
      if (!in || tensors[static_cast<size_t>(in.slot)].kind != TensorKind::kPlanned) continue;
      Placement& p = plan.tensors[static_cast<size_t>(in.slot)];
      DDPM_CHECK(p.first >= 0, "%s:%s reads tensor %d before it is written", steps[s].scope.c_str(),
                 call.op, in.slot);
      p.last = step;
    }
    for (const Out& out : call.writes) {
      if (!out) continue;
      const TensorSpec& info = tensors[static_cast<size_t>(out.slot)];
      if (info.kind != TensorKind::kPlanned) continue;
      Placement& p = plan.tensors[static_cast<size_t>(out.slot)];
      if (p.first < 0) p.first = step;
      p.last = step;
      p.bytes = aligned(info.bytes);
    }
  }
}

bool overlap_in_time(const Placement& a, const Placement& b) {
  return a.first <= b.last && b.first <= a.last;
}

// Puts `item` into the lowest gap that fits among the placed items alive at the same time.
void place(Placement& item, const std::vector<const Placement*>& placed_by_offset) {
  size_t offset = 0;
  for (const Placement* other : placed_by_offset) {
    if (!overlap_in_time(item, *other)) continue;
    if (other->offset >= offset + item.bytes) break;
    offset = std::max(offset, other->offset + other->bytes);
  }
  item.offset = offset;
}

// Places all items in the given order; returns the arena's size.
size_t place_all(const std::vector<Placement*>& order) {
  std::vector<const Placement*> placed;
  placed.reserve(order.size());
  size_t bytes = 0;
  for (Placement* item : order) {
    place(*item, placed);
    placed.insert(std::upper_bound(
                      placed.begin(), placed.end(), item,
                      [](const Placement* a, const Placement* b) { return a->offset < b->offset; }),
                  item);
    bytes = std::max(bytes, item->offset + item->bytes);
  }
  return bytes;
}

size_t most_alive(const std::vector<Placement*>& items, size_t steps) {
  std::vector<int64_t> change(steps + 1, 0);
  for (const Placement* p : items) {
    change[static_cast<size_t>(p->first)] += static_cast<int64_t>(p->bytes);
    change[static_cast<size_t>(p->last) + 1] -= static_cast<int64_t>(p->bytes);
  }
  int64_t alive = 0, most = 0;
  for (int64_t c : change) most = std::max(most, alive += c);
  return static_cast<size_t>(most);
}

}  // namespace

Plan make_plan(const std::vector<TensorSpec>& tensors, const std::vector<Step>& steps) {
  Plan plan;
  plan.tensors.resize(tensors.size());
  plan.workspaces.resize(steps.size());
  find_lifetimes(tensors, steps, plan);

  std::vector<Placement*> items;
  for (Placement& p : plan.tensors)
    if (p.first >= 0 && p.bytes > 0) items.push_back(&p);
  for (Placement& p : plan.workspaces)
    if (p.bytes > 0) items.push_back(&p);
  plan.lower_bound = most_alive(items, steps.size());

  // Largest first, and longest-lived first: neither wins always, both are cheap, keep the better.
  const auto larger = [](const Placement* a, const Placement* b) {
    if (a->bytes != b->bytes) return a->bytes > b->bytes;
    return a->first < b->first;
  };
  const auto longer = [&](const Placement* a, const Placement* b) {
    const int la = a->last - a->first, lb = b->last - b->first;
    return la != lb ? la > lb : larger(a, b);
  };
  std::stable_sort(items.begin(), items.end(), longer);
  const size_t by_length = place_all(items);
  std::stable_sort(items.begin(), items.end(), larger);
  plan.bytes = place_all(items);
  if (by_length < plan.bytes) {
    std::stable_sort(items.begin(), items.end(), longer);
    plan.bytes = place_all(items);
  }
  return plan;
}

}  // namespace ddpm
