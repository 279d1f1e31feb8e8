#include "engine/parts.h"

#include <algorithm>
#include <utility>
#include <vector>

namespace ddpm {
namespace {

// Gradients of parts that wait for their neighbours: a binary counter, whose digit k holds the sum
// of 2^k parts. The last part's gradient, and so the whole sum, stays in the arena of gradients.
class PartialSums {
 public:
  PartialSums(Graph& g, Tensor gradients)
      : graph_(g), gradients_(gradients), count_(g.params().arena_size()) {}

  void end_part(size_t part, bool last) {
    size_t level = 0;
    for (; level < waiting_.size() && waiting_[level]; ++level) add_to_gradients(part, level);
    if (last) {
      for (; level < waiting_.size(); ++level)
        if (waiting_[level]) add_to_gradients(part, level);
      return;
    }
    if (level == waiting_.size()) {
      waiting_.push_back(false);
      sums_.push_back(
          graph_.persistent({1, 1, 1, static_cast<int>(count_)}, DType::kF32, "partial_sum"));
    }
    graph_.add_part_end(part, graph_.backend().copy(count_, DType::kF32, gradients_, sums_[level],
                                                    Write::kOverwrite));
    waiting_[level] = true;
  }

 private:
  void add_to_gradients(size_t part, size_t level) {
    graph_.add_part_end(part, graph_.backend().copy(count_, DType::kF32, sums_[level], gradients_,
                                                    Write::kAccumulate));
    waiting_[level] = false;
  }

  Graph& graph_;
  Tensor gradients_;
  int64_t count_;
  std::vector<bool> waiting_;
  std::vector<Tensor> sums_;
};

Call collective(const char* op, Tensor t, std::function<void(float*)> f) {
  Call call{op, {}, {t}, 0, [t, f = std::move(f)](const Run& r) { f(r.out<float>(t)); }};
  call.collective = true;
  return call;
}

struct Bucket {
  int64_t begin = 0, end = 0;  // of the arena
  size_t closed = 0;           // calls of the step after which its last gradient is written
};

// In the arena's order, which is that in which the backward pass finishes gradients.
std::vector<Bucket> buckets(const Graph& g, int64_t size) {
  std::vector<size_t> written(g.params().all().size(), 0);
  for (size_t i = 0; i < g.steps().size(); ++i)
    for (Out out : g.steps()[i].call.writes)
      if (out && g.info({out.slot}).arena == Arena::kGradients && g.info({out.slot}).param >= 0)
        written[static_cast<size_t>(g.info({out.slot}).param)] = i + 1;
  std::vector<Bucket> all;
  for (size_t i = written.size(); i-- > 0;) {
    const int64_t begin = g.params()[static_cast<int>(i)].offset;
    if (all.empty() || begin - all.back().begin >= size) all.push_back({begin, 0, 0});
    all.back().closed = std::max(all.back().closed, written[i]);
  }
  for (size_t b = 0; b < all.size(); ++b)
    all[b].end = b + 1 < all.size() ? all[b + 1].begin : g.params().arena_size();
  return all;
}

Call start_sum(const Bucket& b, Tensor gradients, Communicator* ranks) {
  return collective("start_sum", gradients,
                    [=](float* arena) { ranks->start_sum(arena + b.begin, b.end - b.begin); });
}

void sum_gradients(Graph& g, const Parts& parts, Tensor gradients) {
  Communicator* ranks = parts.ranks;
  if (parts.in_order) {
    g.add(collective("sum_in_order", gradients, [=, count = g.params().arena_size()](float* arena) {
      ranks->sum_in_order(arena, count);
    }));
    return;
  }
  const std::vector<Bucket> all = buckets(g, parts.bucket);
  if (parts.own > 1) {
    for (const Bucket& b : all) g.add(start_sum(b, gradients, ranks));
  } else {
    std::vector<Bucket> from_behind(all.rbegin(), all.rend());
    std::stable_sort(from_behind.begin(), from_behind.end(),
                     [](const Bucket& a, const Bucket& b) { return a.closed > b.closed; });
    for (const Bucket& b : from_behind) g.insert(b.closed, start_sum(b, gradients, ranks));
  }
  g.add(collective("finish_sums", gradients, [=](float*) { ranks->finish_sums(); }));
}

}  // namespace

void add_parts(Graph& g, const Parts& parts, int images_per_part) {
  const Graph::Scope scope(g, "parts");
  const Graph::PhaseScope phase(g, Phase::kUpdate);
  const Tensor gradients = g.arena(Arena::kGradients);
  const Tensor losses = g.persistent({1, 1, 1, parts.total}, DType::kF32, "losses");
  const int first = parts.first();
  PartialSums sums(g, gradients);
  for (int i = 0; i < parts.own; ++i) {
    const int next = first + (i + 1) % parts.own;
    g.add_part_end(static_cast<size_t>(i),
                   g.backend().end_part(first + i, next * images_per_part, losses, g.state()));
    sums.end_part(static_cast<size_t>(i), i + 1 == parts.own);
  }
  if (parts.ranks != nullptr && parts.ranks->size() > 1) {
    sum_gradients(g, parts, gradients);
    g.add(collective("share_losses", losses, [ranks = parts.ranks, own = parts.own](float* all) {
      ranks->share(all, sizeof(float) * static_cast<size_t>(own));
    }));
  }
  g.add(g.backend().sum_losses(parts.total, losses, g.state()));
}

}  // namespace ddpm
