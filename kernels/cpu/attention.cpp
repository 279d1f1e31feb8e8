// Self-attention over tokens, forward and backward. The unit of work is a head of an image; scores
// are made for a block of query rows at a time. No bit depends on how rows are cut into blocks, so
// none depends on threads or on the batch size.
#include <algorithm>
#include <cmath>
#include <vector>

#include "kernels/cpu/cpu_backend.h"
#include "kernels/cpu/parallel.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/attention.cpp"
#include <hwy/foreach_target.h>

#include "kernels/cpu/matmul-inl.h"
#include "kernels/cpu/simd-inl.h"

#ifndef DDPM_KERNELS_CPU_ATTENTION_ONCE_
#define DDPM_KERNELS_CPU_ATTENTION_ONCE_
namespace ddpm::cpu {

constexpr int64_t kMaxQueries = 256;  // most query rows whose scores are held at once

// One head of one image. Rows of q, k, v and their gradients are 3 * width apart, of o width.
struct Head {
  const float *q, *k, *v;
  const float *o, *d_o, *lse;
  float *out, *lse_out, *dq, *dk, *dv;
  // Backward only: scores of up to kMaxQueries query rows, score_stride apart.
  float *probability, *d_score;
};

struct AttentionLoop {
  AttentionDesc desc;
  int64_t tokens, head_dim, width, units;
  // An odd number of cache lines, so that a column of scores does not fall into a few cache sets.
  int64_t score_stride;
  int64_t queries;  // rows of a full block of queries

  explicit AttentionLoop(const AttentionDesc& d)
      : desc(d),
        tokens(d.tokens),
        head_dim(d.head_dim),
        width(d.width()),
        units(int64_t{d.n} * d.heads),
        score_stride(((tokens + 15) / 16 | 1) * 16),
        queries(std::min(tokens, kMaxQueries)) {}
  int64_t row() const { return 3 * width; }
  // Where a unit's part begins in tensors of `columns` per token.
  int64_t at(int64_t unit, int64_t columns) const {
    return unit / desc.heads * tokens * columns + unit % desc.heads * head_dim;
  }
  // Threads worth starting: `products` matrix products of tokens x tokens x head_dim per unit, a
  // vector's worth of which takes as long as an element of a pointwise loop.
  int workers(int threads, int64_t products) const {
    return threads_for(threads, units * products * tokens * tokens * head_dim / 8);
  }
};

}  // namespace ddpm::cpu
#endif

HWY_BEFORE_NAMESPACE();
namespace ddpm::cpu::HWY_NAMESPACE {

HWY_INLINE HWY_ATTR Float keep_first(Float v, int64_t count, Float other) {
  if (count >= lanes()) return v;
  return hn::IfThenElse(hn::FirstN(FloatTag(), static_cast<size_t>(count)), v, other);
}

// exp of what is never above 0 but for rounding.
HWY_INLINE HWY_ATTR Float exp_negative(Float x) {
  return exp_small(hn::Max(x, hn::Set(FloatTag(), -87.0f)));
}

// In place: s[j] = exp(scale (s[j] - max)). Returns the sum and log-sum-exp, NaN if any score is
// not finite (the exponential's range check would hide it).
struct RowSum {
  float sum, lse;
};
inline HWY_ATTR RowSum softmax_row(float* s, int64_t count, float scale) {
  const FloatTag d;
  const Float lowest = hn::Set(d, -HUGE_VALF), zero = hn::Zero(d);
  Float max = lowest, poison = zero, sum = zero;
  for (int64_t j = 0; j < count; j += lanes()) {
    const Float v = load(s + j, count - j);
    max = hn::Max(max, keep_first(v, count - j, lowest));
    poison = hn::Add(poison, hn::Sub(v, v));
  }
  max = hn::MaxOfLanes(d, max);
  for (int64_t j = 0; j < count; j += lanes()) {
    const Float v = hn::Mul(hn::Sub(load(s + j, count - j), max), hn::Set(d, scale));
    const Float p = exp_negative(v);
    store(p, s + j, count - j);
    sum = hn::Add(sum, keep_first(p, count - j, zero));
  }
  const float bad = hn::GetLane(hn::SumOfLanes(d, poison));
  const float total = hn::GetLane(hn::SumOfLanes(d, sum)) + bad;
  return {total, scale * hn::GetLane(max) + std::log(total)};
}

inline HWY_ATTR void scale_row(float* x, int64_t count, float factor) {
  for (int64_t j = 0; j < count; j += lanes())
    store(hn::Mul(load(x + j, count - j), hn::Set(FloatTag(), factor)), x + j, count - j);
}

// o = softmax(q k^T scale) v for query rows [begin, end); scores is scratch for their rows.
void forward_rows_loop(const AttentionLoop& l, const Head& h, int64_t begin, int64_t end,
                       float* scores) {
  const int64_t rows = end - begin;
  const MatrixView q{h.q + begin * l.row(), l.row(), 1};
  matmul(rows, l.tokens, l.head_dim, q, {h.k, 1, l.row()}, false, scores, l.score_stride);
  float* out = h.out + begin * l.width;
  HWY_ALIGN float inverse[kMaxQueries];
  for (int64_t i = 0; i < rows; ++i) {
    const RowSum sum = softmax_row(scores + i * l.score_stride, l.tokens, l.desc.scale());
    inverse[i] = 1 / sum.sum;
    if (h.lse_out != nullptr) h.lse_out[begin + i] = sum.lse;
  }
  matmul(rows, l.head_dim, l.tokens, {scores, l.score_stride, 1}, {h.v, l.row(), 1}, false, out,
         l.width);
  for (int64_t i = 0; i < rows; ++i) scale_row(out + i * l.width, l.head_dim, inverse[i]);
}

inline HWY_ATTR float dot(const float* a, const float* b, int64_t count) {
  const FloatTag d;
  Float sum = hn::Zero(d);
  for (int64_t i = 0; i < count; i += lanes())
    sum = hn::MulAdd(load(a + i, count - i), load(b + i, count - i), sum);
  return hn::GetLane(hn::SumOfLanes(d, sum));
}

// In place: s = the probability exp(scale s - lse), ds = the gradient at q k^T, which is
// p (ds - delta) scale for delta = sum over keys of p ds = dot(do, o).
inline HWY_ATTR void backward_row(float* s, float* ds, int64_t count, float scale, float lse,
                                  float delta) {
  const FloatTag d;
  for (int64_t j = 0; j < count; j += lanes()) {
    const int64_t left = count - j;
    const Float logit = hn::MulSub(load(s + j, left), hn::Set(d, scale), hn::Set(d, lse));
    const Float p = exp_negative(logit);
    store(p, s + j, left);
    const Float g = hn::Sub(load(ds + j, left), hn::Set(d, delta));
    store(hn::Mul(hn::Mul(p, g), hn::Set(d, scale)), ds + j, left);
  }
}

// Probabilities, gradients of the scores and dq of query rows [begin, end), of which `first` is row
// 0 of the score buffers.
void backward_queries_loop(const AttentionLoop& l, const Head& h, int64_t first, int64_t begin,
                           int64_t end) {
  const int64_t rows = end - begin;
  float* p = h.probability + (begin - first) * l.score_stride;
  float* ds = h.d_score + (begin - first) * l.score_stride;
  matmul(rows, l.tokens, l.head_dim, {h.q + begin * l.row(), l.row(), 1}, {h.k, 1, l.row()}, false,
         p, l.score_stride);
  matmul(rows, l.tokens, l.head_dim, {h.d_o + begin * l.width, l.width, 1}, {h.v, 1, l.row()},
         false, ds, l.score_stride);
  for (int64_t i = 0; i < rows; ++i) {
    const int64_t at = (begin + i) * l.width;
    backward_row(p + i * l.score_stride, ds + i * l.score_stride, l.tokens, l.desc.scale(),
                 h.lse[begin + i], dot(h.d_o + at, h.o + at, l.head_dim));
  }
  matmul(rows, l.head_dim, l.tokens, {ds, l.score_stride, 1}, {h.k, l.row(), 1}, false,
         h.dq + begin * l.row(), l.row());
}

// What query rows [first, last) add to dk and dv of key rows [begin, end).
void backward_keys_loop(const AttentionLoop& l, const Head& h, int64_t first, int64_t last,
                        int64_t begin, int64_t end) {
  const bool accumulate = first > 0;
  matmul(end - begin, l.head_dim, last - first, {h.probability + begin, 1, l.score_stride},
         {h.d_o + first * l.width, l.width, 1}, accumulate, h.dv + begin * l.row(), l.row());
  matmul(end - begin, l.head_dim, last - first, {h.d_score + begin, 1, l.score_stride},
         {h.q + first * l.row(), l.row(), 1}, accumulate, h.dk + begin * l.row(), l.row());
}

}  // namespace ddpm::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace ddpm::cpu {

HWY_EXPORT(forward_rows_loop);
HWY_EXPORT(backward_queries_loop);
HWY_EXPORT(backward_keys_loop);

namespace {

void check(const char* op, const AttentionDesc& d) {
  if (d.n <= 0 || d.tokens <= 0 || d.heads <= 0 || d.head_dim <= 0)
    fail(Status::kBug, "%s: %d images of %d tokens, %d heads of %d", op, d.n, d.tokens, d.heads,
         d.head_dim);
}

// Calls body(worker, item) for every item; `workers` threads, each with its own number.
template <typename Body>
void parallel_items(int workers, int64_t items, const Body& body) {
  parallel_for(workers, workers, [&](int64_t first, int64_t last) {
    for (int64_t w = first; w < last; ++w)
      for (int64_t i = items * w / workers; i < items * (w + 1) / workers; ++i) body(w, i);
  });
}

}  // namespace

Call CpuBackend::attention_forward(const AttentionDesc& d, In qkv, Out o, Out lse) {
  check("attention_forward", d);
  const AttentionLoop l(d);
  const int workers = l.workers(threads_, 2);
  // Blocks of query rows per unit: enough that every thread has work.
  const int64_t blocks = std::clamp((workers + l.units - 1) / l.units,
                                    (l.tokens + kMaxQueries - 1) / kMaxQueries, l.tokens);
  const int64_t scratch = (l.tokens + blocks - 1) / blocks * l.score_stride;
  const auto run = [=](const Run& r) {
    parallel_items(workers, l.units * blocks, [&](int64_t worker, int64_t item) {
      const int64_t unit = item / blocks, block = item % blocks;
      Head h{};
      h.q = r.in<float>(qkv) + l.at(unit, l.row());
      h.k = h.q + l.width;
      h.v = h.k + l.width;
      h.out = r.out<float>(o) + l.at(unit, l.width);
      h.lse_out = lse ? r.out<float>(lse) + unit * l.tokens : nullptr;
      HWY_DYNAMIC_DISPATCH(forward_rows_loop)
      (l, h, l.tokens * block / blocks, l.tokens * (block + 1) / blocks,
       static_cast<float*>(r.workspace) + worker * scratch);
    });
  };
  std::vector<Out> writes{o};
  if (lse) writes.push_back(lse);
  return {"attention_forward", {qkv}, writes, sizeof(float) * workers * scratch, run};
}

// Units are taken in waves whose scores fit the workspace. For each kMaxQueries query rows of a
// wave: first their scores and dq, then their share of dk and dv.
Call CpuBackend::attention_backward(const AttentionDesc& d, In qkv, In o, In lse, In d_o,
                                    Out dqkv) {
  check("attention_backward", d);
  const AttentionLoop l(d);
  const int workers = l.workers(threads_, 5);
  const int64_t scores = l.queries * l.score_stride;  // floats of one score buffer
  constexpr int64_t kScoresPerWorker = 128 * 1024;    // stays in a core's L2 cache
  const int64_t wave =
      std::min(l.units, workers * std::max<int64_t>(1, kScoresPerWorker / (2 * scores)));
  const auto run = [=](const Run& r) {
    const auto head = [&](int64_t unit, int64_t place) {
      Head h{};
      h.q = r.in<float>(qkv) + l.at(unit, l.row());
      h.k = h.q + l.width;
      h.v = h.k + l.width;
      h.o = r.in<float>(o) + l.at(unit, l.width);
      h.d_o = r.in<float>(d_o) + l.at(unit, l.width);
      h.lse = r.in<float>(lse) + unit * l.tokens;
      h.dq = r.out<float>(dqkv) + l.at(unit, l.row());
      h.dk = h.dq + l.width;
      h.dv = h.dk + l.width;
      h.probability = static_cast<float*>(r.workspace) + 2 * place * scores;
      h.d_score = h.probability + scores;
      return h;
    };
    for (int64_t first_unit = 0; first_unit < l.units; first_unit += wave) {
      const int64_t units = std::min(wave, l.units - first_unit);
      const int64_t parts = (workers + units - 1) / units;  // of a unit, so that no thread idles
      for (int64_t first = 0; first < l.tokens; first += l.queries) {
        const int64_t last = std::min(first + l.queries, l.tokens), rows = last - first;
        parallel_items(workers, units * parts, [&](int64_t, int64_t item) {
          const int64_t place = item / parts, part = item % parts;
          HWY_DYNAMIC_DISPATCH(backward_queries_loop)
          (l, head(first_unit + place, place), first, first + rows * part / parts,
           first + rows * (part + 1) / parts);
        });
        parallel_items(workers, units * parts, [&](int64_t, int64_t item) {
          const int64_t place = item / parts, part = item % parts;
          HWY_DYNAMIC_DISPATCH(backward_keys_loop)
          (l, head(first_unit + place, place), first, last, l.tokens * part / parts,
           l.tokens * (part + 1) / parts);
        });
      }
    }
  };
  return {"attention_backward",
          {qkv, o, lse, d_o},
          {dqkv},
          sizeof(float) * static_cast<size_t>(2 * wave * scores),
          run};
}

}  // namespace ddpm::cpu
#endif
