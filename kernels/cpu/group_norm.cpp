// Group norm with SiLU and dropout, forward and backward. Work is cut into runs of pixels of one
// image, whose partial sums are merged in order: no bit depends on threads or on the batch size.
#include <algorithm>
#include <cmath>
#include <vector>

#include "kernels/cpu/cpu_backend.h"
#include "kernels/cpu/parallel.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/group_norm.cpp"
#include <hwy/foreach_target.h>

#include "kernels/cpu/dropout-inl.h"
#include "kernels/cpu/simd-inl.h"

#ifndef DDPM_KERNELS_CPU_GROUP_NORM_ONCE_
#define DDPM_KERNELS_CPU_GROUP_NORM_ONCE_
namespace ddpm::cpu {

constexpr int64_t kRun = 64;       // pixels of a work item
constexpr int64_t kSegment = 512;  // most channels whose coefficients lie on the stack at once

// Neighbouring channels that come from one input.
struct Segment {
  int input;       // 0: x, 1: x2
  int64_t stride;  // channels of that input
  int64_t offset;  // first channel in that input
  int64_t begin;   // first channel in the concatenation
  int64_t length;  // <= kSegment
};

// What all passes over the pixels share.
struct GroupNormLoop {
  GroupNormDesc desc;
  std::vector<Segment> segments;
  int64_t pixels, runs, channels, group_channels;
  int64_t batch;  // pixels whose dropout draws are made together: they must be neighbours in memory

  explicit GroupNormLoop(const GroupNormDesc& d)
      : desc(d),
        pixels(d.x.pixels()),
        runs((pixels + kRun - 1) / kRun),
        channels(d.c()),
        group_channels(channels / d.groups) {
    for (int64_t c = 0; c < d.x.c; c += kSegment)
      segments.push_back({0, d.x.c, c, c, std::min<int64_t>(kSegment, d.x.c - c)});
    for (int64_t c = 0; c < d.c2; c += kSegment)
      segments.push_back({1, d.c2, c, d.x.c + c, std::min<int64_t>(kSegment, d.c2 - c)});
    batch = segments.size() == 1 ? std::max<int64_t>(1, kSegment / channels) : 1;
  }
  int64_t items() const { return desc.x.n * runs; }
};

// The tensors of a call.
struct GroupNormData {
  const float* x[2] = {};
  const float* scale_shift = nullptr;  // (N,C,2)
  const float* mean_rstd = nullptr;    // (N,G,2)
  const StepState* state = nullptr;
  const float* dy = nullptr;
  float* y = nullptr;
  float* dx[2] = {};
  bool accumulate[2] = {};
  float* partial = nullptr;         // (N, runs, 2, C): sums of dz, dz (x - mean)
  const float* gradient = nullptr;  // (N,G,2): see dx_row
};

}  // namespace ddpm::cpu
#endif

HWY_BEFORE_NAMESPACE();
namespace ddpm::cpu::HWY_NAMESPACE {

// Per-channel coefficients of a segment, padded to whole vectors.
struct Coefficients {
  HWY_ALIGN float scale[kSegment] = {}, shift[kSegment] = {}, mean[kSegment] = {};
  HWY_ALIGN float constant[kSegment] = {}, slope[kSegment] = {};
};

void load_scale_shift(const GroupNormLoop& loop, const GroupNormData& data, const Segment& s,
                      int64_t n, Coefficients& c) {
  const float* from = data.scale_shift + (n * loop.channels + s.begin) * 2;
  for (int64_t i = 0; i < s.length; ++i) {
    c.scale[i] = from[2 * i];
    c.shift[i] = from[2 * i + 1];
  }
}

// Copies element `index` of each group's pair in (N,G,2) to the group's channels.
void spread(const GroupNormLoop& loop, const float* pairs, int index, const Segment& s, int64_t n,
            float* to) {
  const int64_t size = loop.group_channels;
  const float* from = pairs + n * loop.desc.groups * 2 + index;
  for (int64_t g = s.begin / size, c = 0; c < s.length; ++g) {
    const int64_t end = std::min(s.length, (g + 1) * size - s.begin);
    for (; c < end; ++c) to[c] = from[2 * g];
  }
}

// The dropout draws of a batch of pixels of a segment.
class Draws {
 public:
  explicit HWY_ATTR Draws(const GroupNormLoop& loop, const GroupNormData& data)
      : channels_(loop.channels),
        threshold_(static_cast<int32_t>(loop.desc.dropout.threshold())),
        factor_(hn::Set(FloatTag(), 1.0f / (1.0f - loop.desc.dropout.p))) {
    if (data.state == nullptr) return;
    first_image_ = data.state->first_image;
    stream_ = {.seed = data.state->seed,
               .purpose = Purpose::kDropout,
               .step = static_cast<uint32_t>(data.state->step),
               .layer = loop.desc.dropout.layer};
  }
  HWY_ATTR void draw(const Segment& s, int64_t n, int64_t pixel, int64_t pixels) {
    stream_.sample = first_image_ + static_cast<uint64_t>(n);
    const int64_t first = pixel * channels_ + s.begin;
    skip_ = first % 8;
    draw16(stream_, static_cast<uint32_t>(first / 8), (skip_ + pixels * s.length + 7) / 8, draws_);
  }
  HWY_ATTR Float apply(Float v, int64_t element) const {
    return drop(v, draws_ + skip_ + element, threshold_, factor_);
  }

 private:
  int64_t channels_, skip_ = 0;
  uint64_t first_image_ = 0;
  int32_t threshold_;
  Float factor_;
  RandomStream stream_;
  // Room for a block cut at the front, a last vector of blocks, and a load behind the end.
  HWY_ALIGN uint16_t draws_[kSegment + 8 + 9 * hn::MaxLanes(FloatTag())];
};

// One pixel of a segment; `element` is its place in the draws.
template <bool Silu, bool Drop>
HWY_INLINE HWY_ATTR void apply_row(const Coefficients& c, const Draws& draws, int64_t element,
                                   const float* x, int64_t length, float* y) {
  const FloatTag d;
  for (int64_t i = 0; i < length; i += lanes()) {
    Float v =
        hn::MulAdd(load(x + i, length - i), hn::Load(d, c.scale + i), hn::Load(d, c.shift + i));
    if constexpr (Silu) v = silu(v);
    if constexpr (Drop) v = draws.apply(v, element + i);
    store(v, y + i, length - i);
  }
}

template <bool Silu, bool Drop>
HWY_ATTR void apply_items(const GroupNormLoop& loop, const GroupNormData& data, int64_t begin,
                          int64_t end) {
  Coefficients c;
  Draws draws(loop, data);
  for (int64_t item = begin; item < end; ++item) {
    const int64_t n = item / loop.runs, first = item % loop.runs * kRun;
    const int64_t last = std::min(first + kRun, loop.pixels);
    for (const Segment& s : loop.segments) {
      load_scale_shift(loop, data, s, n, c);
      for (int64_t p = first; p < last; p += loop.batch) {
        const int64_t count = std::min(loop.batch, last - p);
        if constexpr (Drop) draws.draw(s, n, p, count);
        for (int64_t i = 0; i < count; ++i) {
          const int64_t pixel = n * loop.pixels + p + i;
          apply_row<Silu, Drop>(c, draws, i * s.length,
                                data.x[s.input] + pixel * s.stride + s.offset, s.length,
                                data.y + pixel * loop.channels + s.begin);
        }
      }
    }
  }
}

// The gradient at z = x * scale + shift.
template <bool Silu, bool Drop>
HWY_INLINE HWY_ATTR Float gradient_at_z(const Coefficients& c, const Draws& draws, int64_t element,
                                        int64_t i, Float x, Float dy) {
  const FloatTag d;
  if constexpr (Drop) dy = draws.apply(dy, element + i);
  if constexpr (Silu)
    dy = hn::Mul(dy, silu_slope(hn::MulAdd(x, hn::Load(d, c.scale + i), hn::Load(d, c.shift + i))));
  return dy;
}

// sums: [0] += dz, [1] += dz (x - mean).
template <bool Silu, bool Drop>
HWY_INLINE HWY_ATTR void sum_row(const Coefficients& c, const Draws& draws, int64_t element,
                                 const float* x, const float* dy, int64_t length,
                                 float (&sums)[2][kSegment]) {
  const FloatTag d;
  for (int64_t i = 0; i < length; i += lanes()) {
    const Float v = load(x + i, length - i);
    const Float dz = gradient_at_z<Silu, Drop>(c, draws, element, i, v, load(dy + i, length - i));
    const Float centred = hn::Sub(v, hn::Load(d, c.mean + i));
    hn::Store(hn::Add(hn::Load(d, sums[0] + i), dz), d, sums[0] + i);
    hn::Store(hn::MulAdd(dz, centred, hn::Load(d, sums[1] + i)), d, sums[1] + i);
  }
}

// dx = scale dz - (constant + slope (x - mean)), where constant = rstd mean_group(gamma dz) and
// slope = rstd^2 mean_group(gamma dz xhat).
template <bool Silu, bool Drop>
HWY_INLINE HWY_ATTR void dx_row(const Coefficients& c, const Draws& draws, int64_t element,
                                const float* x, const float* dy, int64_t length, bool accumulate,
                                float* dx) {
  const FloatTag d;
  for (int64_t i = 0; i < length; i += lanes()) {
    const Float v = load(x + i, length - i);
    const Float dz = gradient_at_z<Silu, Drop>(c, draws, element, i, v, load(dy + i, length - i));
    const Float centred = hn::Sub(v, hn::Load(d, c.mean + i));
    const Float common = hn::MulAdd(centred, hn::Load(d, c.slope + i), hn::Load(d, c.constant + i));
    Float result = hn::MulSub(dz, hn::Load(d, c.scale + i), common);
    if (accumulate) result = hn::Add(load(dx + i, length - i), result);
    store(result, dx + i, length - i);
  }
}

// Second = false: the sums over each run's pixels; true: dx, from their merged values.
template <bool Second, bool Silu, bool Drop>
HWY_ATTR void backward_items(const GroupNormLoop& loop, const GroupNormData& data, int64_t begin,
                             int64_t end) {
  Coefficients c;
  Draws draws(loop, data);
  HWY_ALIGN float sums[2][kSegment];
  for (int64_t item = begin; item < end; ++item) {
    const int64_t n = item / loop.runs, first = item % loop.runs * kRun;
    const int64_t last = std::min(first + kRun, loop.pixels);
    for (const Segment& s : loop.segments) {
      load_scale_shift(loop, data, s, n, c);
      spread(loop, data.mean_rstd, 0, s, n, c.mean);
      if constexpr (Second) {
        spread(loop, data.gradient, 0, s, n, c.constant);
        spread(loop, data.gradient, 1, s, n, c.slope);
      } else {
        std::fill(sums[0], sums[0] + kSegment, 0.0f);
        std::fill(sums[1], sums[1] + kSegment, 0.0f);
      }
      for (int64_t p = first; p < last; p += loop.batch) {
        const int64_t count = std::min(loop.batch, last - p);
        if constexpr (Drop) draws.draw(s, n, p, count);
        for (int64_t i = 0; i < count; ++i) {
          const int64_t pixel = n * loop.pixels + p + i;
          const int64_t at = pixel * s.stride + s.offset;
          const float* x = data.x[s.input] + at;
          const float* dy = data.dy + pixel * loop.channels + s.begin;
          if constexpr (Second)
            dx_row<Silu, Drop>(c, draws, i * s.length, x, dy, s.length, data.accumulate[s.input],
                               data.dx[s.input] + at);
          else
            sum_row<Silu, Drop>(c, draws, i * s.length, x, dy, s.length, sums);
        }
      }
      if constexpr (!Second)
        for (int k = 0; k < 2; ++k)
          std::copy(sums[k], sums[k] + s.length,
                    data.partial + (item * 2 + k) * loop.channels + s.begin);
    }
  }
}

void apply_loop(const GroupNormLoop& loop, const GroupNormData& data, int64_t begin, int64_t end) {
  const bool dropout = loop.desc.dropout.p > 0;
  if (loop.desc.silu)
    dropout ? apply_items<true, true>(loop, data, begin, end)
            : apply_items<true, false>(loop, data, begin, end);
  else
    dropout ? apply_items<false, true>(loop, data, begin, end)
            : apply_items<false, false>(loop, data, begin, end);
}

template <bool Second>
HWY_ATTR void backward_loop(const GroupNormLoop& loop, const GroupNormData& data, int64_t begin,
                            int64_t end) {
  const bool dropout = loop.desc.dropout.p > 0;
  if (loop.desc.silu)
    dropout ? backward_items<Second, true, true>(loop, data, begin, end)
            : backward_items<Second, true, false>(loop, data, begin, end);
  else
    dropout ? backward_items<Second, false, true>(loop, data, begin, end)
            : backward_items<Second, false, false>(loop, data, begin, end);
}
void backward_sums_loop(const GroupNormLoop& loop, const GroupNormData& data, int64_t begin,
                        int64_t end) {
  backward_loop<false>(loop, data, begin, end);
}
void backward_dx_loop(const GroupNormLoop& loop, const GroupNormData& data, int64_t begin,
                      int64_t end) {
  backward_loop<true>(loop, data, begin, end);
}

}  // namespace ddpm::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace ddpm::cpu {

HWY_EXPORT(apply_loop);
HWY_EXPORT(backward_sums_loop);
HWY_EXPORT(backward_dx_loop);

namespace {

void check(const char* op, const GroupNormDesc& d, In x2, In state) {
  if (!d.x.positive() || d.c2 < 0 || d.groups <= 0 || d.c() % d.groups != 0 || d.tile <= 0)
    fail(Status::kBug, "%s: x %s and %d channels in %d groups, tile %d", op, to_string(d.x).c_str(),
         d.c2, d.groups, d.tile);
  if (static_cast<bool>(x2) != (d.c2 > 0))
    fail(Status::kBug, "%s: %d channels of a second input, which is %s", op, d.c2,
         x2 ? "there" : "absent");
  if (!(d.dropout.p >= 0 && d.dropout.p < 1) || (d.dropout.p > 0 && !state))
    fail(Status::kBug, "%s: dropout %g needs a state and 0 <= p < 1", op,
         static_cast<double>(d.dropout.p));
}

template <typename Slot>
std::vector<Slot> present(std::initializer_list<Slot> slots) {
  std::vector<Slot> v(slots);
  std::erase_if(v, [](Slot s) { return !s; });
  return v;
}

// Statistics (tiles, C, 2) of one image and of one input, as far as a group reaches into it.
struct GroupPart {
  const float* stats;
  int64_t channels, begin, end;
};

struct Moments {
  double mean, variance;
};

// Chan, Golub & LeVeque's merge, for all tiles and channels of a group at once:
// M2 = sum(M2_i + count_i (mean_i - mean)^2).
Moments merge(const GroupNormDesc& d, const GroupPart (&parts)[2]) {
  const int64_t pixels = d.x.pixels(), tiles = (pixels + d.tile - 1) / d.tile;
  const double count = static_cast<double>(pixels) * (d.c() / d.groups);
  // Sum of f(mean_i, M2_i, pixels of the tile) over the group, tile by tile.
  const auto sum = [&](const auto& f) {
    double all = 0;
    for (int64_t t = 0; t < tiles; ++t) {
      const double weight = static_cast<double>(std::min<int64_t>(d.tile, pixels - t * d.tile));
      double tile = 0;
      for (const GroupPart& p : parts)
        for (int64_t c = p.begin; c < p.end; ++c) {
          const float* pair = p.stats + (t * p.channels + c) * 2;
          tile += f(pair[0], pair[1], weight);
        }
      all += tile;
    }
    return all;
  };
  const double mean = sum([](double m, double, double weight) { return weight * m; }) / count;
  const double m2 = sum([mean](double m, double deviations, double weight) {
    return deviations + weight * (m - mean) * (m - mean);
  });
  return {mean, m2 / count};
}

}  // namespace

Call CpuBackend::group_norm_scale_shift(const GroupNormDesc& d, In stats, In stats2, In gamma,
                                        In beta, Out scale_shift, Out mean_rstd) {
  GroupNormDesc plain = d;
  plain.dropout = {};
  check("group_norm_scale_shift", plain, stats2, {});
  const auto run = [=, threads = threads_](const Run& r) {
    const int64_t size = d.c() / d.groups, c1 = d.x.c;
    const int64_t tiles = (d.x.pixels() + d.tile - 1) / d.tile;
    parallel_for(threads_for(threads, d.x.n * (tiles * d.c() + 64 * d.groups)),
                 int64_t{d.x.n} * d.groups, [&](int64_t begin, int64_t end) {
                   for (int64_t i = begin; i < end; ++i) {
                     const int64_t n = i / d.groups, first = i % d.groups * size;
                     const int64_t middle = std::clamp(c1, first, first + size);
                     const GroupPart parts[2] = {
                         {r.in<float>(stats) + n * tiles * c1 * 2, c1, first, middle},
                         {d.c2 > 0 ? r.in<float>(stats2) + n * tiles * d.c2 * 2 : nullptr, d.c2,
                          middle - c1, first + size - c1}};
                     const Moments m = merge(d, parts);
                     const double rstd = 1 / std::sqrt(m.variance + d.epsilon);
                     float* pair = r.out<float>(mean_rstd) + i * 2;
                     pair[0] = static_cast<float>(m.mean);
                     pair[1] = static_cast<float>(rstd);
                     for (int64_t c = first; c < first + size; ++c) {
                       // The shift belongs to the rounded scale: their errors cancel where mean >>
                       // std.
                       float* to = r.out<float>(scale_shift) + (n * d.c() + c) * 2;
                       to[0] = static_cast<float>(rstd * r.in<float>(gamma)[c]);
                       to[1] = static_cast<float>(r.in<float>(beta)[c] - m.mean * to[0]);
                     }
                   }
                 });
  };
  return {"group_norm_scale_shift",
          present({stats, stats2, gamma, beta}),
          {scale_shift, mean_rstd},
          0,
          run};
}

Call CpuBackend::group_norm_apply(const GroupNormDesc& d, In x, In x2, In scale_shift, In state,
                                  Out y) {
  check("group_norm_apply", d, x2, state);
  const GroupNormLoop loop(d);
  const auto run = [=, threads = threads_](const Run& r) {
    GroupNormData data;
    data.x[0] = r.in<float>(x);
    data.x[1] = r.in<float>(x2);
    data.scale_shift = r.in<float>(scale_shift);
    data.state = d.dropout.p > 0 ? r.in<StepState>(state) : nullptr;
    data.y = r.out<float>(y);
    parallel_for(threads_for(threads, d.shape().count()), loop.items(),
                 [&](int64_t begin, int64_t end) {
                   HWY_DYNAMIC_DISPATCH(apply_loop)(loop, data, begin, end);
                 });
  };
  return {"group_norm_apply", present({x, x2, scale_shift, state}), {y}, 0, run};
}

namespace {

// Workspace of the backward pass: doubles first, so that all are aligned.
struct BackwardSpace {
  double* sums;    // (N,2,C): sums over an image of dz, dz (x - mean)
  float* group;    // (N,G,2): GroupNormData::gradient
  float* partial;  // (N,runs,2,C)

  static size_t bytes(const GroupNormLoop& l) {
    const size_t n = static_cast<size_t>(l.desc.x.n), c = static_cast<size_t>(l.channels);
    return n * (c * 2 * sizeof(double) + l.desc.groups * 2 * sizeof(float) +
                static_cast<size_t>(l.runs) * c * 2 * sizeof(float));
  }
  BackwardSpace(const GroupNormLoop& l, void* workspace) {
    sums = static_cast<double*>(workspace);
    group = reinterpret_cast<float*>(sums + l.desc.x.n * l.channels * 2);
    partial = group + int64_t{l.desc.x.n} * l.desc.groups * 2;
  }
};

void merge_runs(const GroupNormLoop& l, int threads, const BackwardSpace& space) {
  const int64_t columns = 2 * l.channels;
  parallel_for(threads_for(threads, l.items() * columns), l.desc.x.n * columns,
               [&](int64_t begin, int64_t end) {
                 std::fill(space.sums + begin, space.sums + end, 0.0);
                 for (int64_t n = begin / columns; n * columns < end; ++n) {
                   const int64_t first = std::max(begin - n * columns, int64_t{0});
                   const int64_t last = std::min(end - n * columns, columns);
                   for (int64_t run = 0; run < l.runs; ++run) {
                     const float* from = space.partial + (n * l.runs + run) * columns;
                     for (int64_t i = first; i < last; ++i) space.sums[n * columns + i] += from[i];
                   }
                 }
               });
}

void merge_groups(const GroupNormLoop& l, const float* mean_rstd, const float* gamma,
                  const BackwardSpace& space) {
  const double count = static_cast<double>(l.pixels * l.group_channels);
  for (int64_t i = 0; i < int64_t{l.desc.x.n} * l.desc.groups; ++i) {
    const int64_t n = i / l.desc.groups, first = i % l.desc.groups * l.group_channels;
    const double* sums = space.sums + n * 2 * l.channels;
    double dz = 0, centred = 0;
    for (int64_t c = first; c < first + l.group_channels; ++c) {
      dz += gamma[c] * sums[c];
      centred += gamma[c] * sums[l.channels + c];
    }
    const double rstd = mean_rstd[2 * i + 1];
    space.group[2 * i] = static_cast<float>(rstd * dz / count);
    space.group[2 * i + 1] = static_cast<float>(rstd * rstd * rstd * centred / count);
  }
}

void merge_images(const GroupNormLoop& l, const float* mean_rstd, const BackwardSpace& space,
                  Write write, float* dgamma, float* dbeta) {
  const bool accumulate = write == Write::kAccumulate;
  for (int64_t c = 0; c < l.channels; ++c) {
    double gamma = accumulate ? dgamma[c] : 0, beta = accumulate ? dbeta[c] : 0;
    for (int64_t n = 0; n < l.desc.x.n; ++n) {
      const double* sums = space.sums + n * 2 * l.channels + c;
      const float* pair = mean_rstd + (n * l.desc.groups + c / l.group_channels) * 2;
      beta += sums[0];
      gamma += pair[1] * sums[l.channels];
    }
    dgamma[c] = static_cast<float>(gamma);
    dbeta[c] = static_cast<float>(beta);
  }
}

}  // namespace

// dx may be dy's memory where there is no second input and dx is overwritten.
Call CpuBackend::group_norm_backward(const GroupNormDesc& d, In x, In x2, In scale_shift,
                                     In mean_rstd, In gamma, In state, In dy, In sums, Out dx,
                                     Write write, Out dx2, Write write2, Out dgamma, Out dbeta,
                                     Write write_parameters) {
  check("group_norm_backward", d, x2, state);
  DDPM_CHECK(!sums, "group_norm_backward: sums, which no convolution of the CPU gives");
  if (!dx || static_cast<bool>(dx2) != (d.c2 > 0))
    fail(Status::kBug, "group_norm_backward: needs dx, and dx2 with a second input only");
  const GroupNormLoop loop(d);
  const auto run = [=, threads = threads_](const Run& r) {
    const BackwardSpace space(loop, r.workspace);
    GroupNormData data;
    data.x[0] = r.in<float>(x);
    data.x[1] = r.in<float>(x2);
    data.scale_shift = r.in<float>(scale_shift);
    data.mean_rstd = r.in<float>(mean_rstd);
    data.state = d.dropout.p > 0 ? r.in<StepState>(state) : nullptr;
    data.dy = r.in<float>(dy);
    data.dx[0] = r.out<float>(dx);
    data.dx[1] = r.out<float>(dx2);
    data.accumulate[0] = write == Write::kAccumulate;
    data.accumulate[1] = write2 == Write::kAccumulate;
    data.partial = space.partial;
    data.gradient = space.group;
    const int workers = threads_for(threads, d.shape().count());
    parallel_for(workers, loop.items(), [&](int64_t begin, int64_t end) {
      HWY_DYNAMIC_DISPATCH(backward_sums_loop)(loop, data, begin, end);
    });
    merge_runs(loop, threads, space);
    merge_groups(loop, data.mean_rstd, r.in<float>(gamma), space);
    merge_images(loop, data.mean_rstd, space, write_parameters, r.out<float>(dgamma),
                 r.out<float>(dbeta));
    parallel_for(workers, loop.items(), [&](int64_t begin, int64_t end) {
      HWY_DYNAMIC_DISPATCH(backward_dx_loop)(loop, data, begin, end);
    });
  };
  std::vector<Out> writes = present({dx, dx2, dgamma, dbeta});
  return {"group_norm_backward", present({x, x2, scale_shift, mean_rstd, gamma, state, dy}), writes,
          BackwardSpace::bytes(loop), run};
}

}  // namespace ddpm::cpu
#endif
