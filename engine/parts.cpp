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

Call collective(const char* op, Tensor t, std::function<void(void*)> f) {
  Call call{op, {}, {t}, 0, [t, f = std::move(f)](const Run& r) { f(r.out<void>(t)); }};
  call.collective = true;
  return call;
}

// Slices of the arena go to a rank each, which sums them as a binary tree in the ranks' order,
// (r0 + r1) + (r2 + r3), and sends the sum back to all.
void sum_in_order(Graph& g, Communicator* ranks, Tensor gradients) {
  const int64_t count = g.params().arena_size(), slice = ranks->slice_of(count);
  std::vector<Tensor> parts;
  for (int r = 0; r < ranks->size(); ++r)
    parts.push_back(
        g.persistent({1, 1, 1, static_cast<int>(slice)}, DType::kF32, "slice_of_gradients"));
  Call exchange{"exchange_slices", {gradients}, {parts.begin(), parts.end()}, 0, {}};
  exchange.run = [=, slots = exchange.writes,
                  to = std::vector<float*>(parts.size())](const Run& r) mutable {
    for (size_t i = 0; i < slots.size(); ++i) to[i] = r.out<float>(slots[i]);
    ranks->exchange_slices(r.in<float>(gradients), count, to.data());
  };
  exchange.collective = true;
  g.add(std::move(exchange));
  for (size_t step = 1; step < parts.size(); step *= 2)
    for (size_t r = 0; r + step < parts.size(); r += 2 * step)
      g.add(g.backend().copy(slice, DType::kF32, parts[r + step], parts[r], Write::kAccumulate));
  Call gather{"gather_slices", {parts[0]}, {gradients}, 0, {}};
  gather.run = [=, part = parts[0]](const Run& r) {
    ranks->gather_slices(r.in<float>(part), r.out<float>(gradients), count);
  };
  gather.collective = true;
  g.add(std::move(gather));
}

// The calls that begin a bucket's sum; behind all sums, `after` brings it back to the gradients.
std::vector<Call> begin_sum(Graph& g, const Bucket& b, const Parts& parts, Tensor gradients,
                            std::vector<Call>& after) {
  const int64_t count = b.end - b.begin;
  Communicator* ranks = parts.ranks;
  if (parts.sum_type == DType::kF32)
    return {collective("start_sum", gradients, [=, begin = b.begin](void* arena) {
      ranks->start_sum(static_cast<float*>(arena) + begin, DType::kF32, count);
    })};
  const DType type = parts.sum_type;
  const Tensor rounded =
      g.persistent({1, 1, 1, static_cast<int>(count)}, type, "rounded_gradients");
  after.push_back(g.backend().cast(count, type, rounded, DType::kF32, b.first));
  return {g.backend().cast(count, DType::kF32, b.first, type, rounded),
          collective("start_sum", rounded, [=](void* sum) { ranks->start_sum(sum, type, count); })};
}

void sum_gradients(Graph& g, const Parts& parts, Tensor gradients) {
  const std::vector<Bucket> all = gradient_buckets(g, parts.bucket);
  std::vector<Call> after;
  if (parts.own > 1) {
    for (const Bucket& b : all)
      for (Call& call : begin_sum(g, b, parts, gradients, after)) g.add(std::move(call));
  } else {
    std::vector<Bucket> from_behind(all.rbegin(), all.rend());
    std::stable_sort(from_behind.begin(), from_behind.end(),
                     [](const Bucket& a, const Bucket& b) { return a.closed > b.closed; });
    for (const Bucket& b : from_behind) {
      size_t at = b.closed;
      for (Call& call : begin_sum(g, b, parts, gradients, after)) g.insert(at++, std::move(call));
    }
  }
  g.add(
      collective("finish_sums", gradients, [ranks = parts.ranks](void*) { ranks->finish_sums(); }));
  for (Call& call : after) g.add(std::move(call));
}

}  // namespace

std::vector<Bucket> gradient_buckets(const Graph& g, int64_t size) {
  std::vector<size_t> written(g.params().all().size(), 0);
  std::vector<Tensor> gradients(written.size());
  for (size_t i = 0; i < g.steps().size(); ++i)
    for (Out out : g.steps()[i].call.writes)
      if (out && g.info({out.slot}).arena == Arena::kGradients && g.info({out.slot}).param >= 0) {
        const auto param = static_cast<size_t>(g.info({out.slot}).param);
        written[param] = i + 1;
        gradients[param] = {out.slot};
      }
  std::vector<Bucket> all;
  for (size_t i = written.size(); i-- > 0;) {
    const int64_t begin = g.params()[static_cast<int>(i)].offset;
    if (all.empty() || begin - all.back().begin >= size) all.push_back({begin, 0, 0, gradients[i]});
    all.back().closed = std::max(all.back().closed, written[i]);
  }
  for (size_t b = 0; b < all.size(); ++b)
    all[b].end = b + 1 < all.size() ? all[b + 1].begin : g.params().arena_size();
  return all;
}

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
    if (parts.in_order)
      sum_in_order(g, parts.ranks, gradients);
    else
      sum_gradients(g, parts, gradients);
    g.add(collective("share_losses", losses, [ranks = parts.ranks, own = parts.own](void* all) {
      ranks->share_in_step(all, sizeof(float) * static_cast<size_t>(own));
    }));
  }
  g.add(g.backend().sum_losses(parts.total, losses, g.state()));
}

}  // namespace ddpm
