// Group norm with SiLU and dropout, forward and backward, over the concatenation of x and x2, which
// is never written together. All is limited by memory; dropout's draws (Philox, 8 elements a call)
// are made again wherever they are needed.
//   scale and shift  reads the statistics, 1/16 of x at bf16
//   apply            reads x and writes y, once: the least there is
//   backward         sums: reads x and dy; then dx: reads them again and writes dx. A tensor that
//                    the L2 cache holds is read from memory once: the second pass goes backwards.
//                    Where a convolution has left dz and its sums, only dx is left to do.
#include <cmath>

#include "kernels/cuda/block.h"
#include "kernels/cuda/channel_tile.h"
#include "kernels/cuda/silu.h"

namespace ddpm::cuda {
namespace {

// What all kernels need to know; a run of pixels is a block's.
struct Norm {
  Tiling t;
  int c1, c2, groups, group_channels;
  bool silu;
  uint16_t layer;
  uint32_t threshold;  // of dropout; 0: none
  float factor;        // what dropout multiplies kept elements by

  // run: pixels of a block; 0: as many as give each thread `per_thread`.
  Norm(const GroupNormDesc& d, int v, int per_thread, int run = 0)
      : t(d.x.n, d.x.pixels(), d.c(), v, per_thread, run),
        c1(d.x.c),
        c2(d.c2),
        groups(d.groups),
        group_channels(d.c() / d.groups),
        silu(d.silu),
        layer(d.dropout.layer),
        threshold(d.dropout.p > 0 ? d.dropout.threshold() : 0),
        factor(1.0f / (1.0f - d.dropout.p)) {}
};

// A thread's channels of x or of x2: the address of those of pixel 0 of the run, and the step from
// pixel to pixel.
template <typename Pointer, int V>
__device__ __forceinline__ Pointer own_part(const Norm& s, const Stand<V>& at, const Pointer& x,
                                            const Pointer& x2) {
  const int64_t pixel = at.pixel(s.t);
  return at.channel < s.c1 ? x + (pixel * s.c1 + at.channel)
                           : x2 + (pixel * s.c2 + (at.channel - s.c1));
}
template <int V>
__device__ __forceinline__ int own_stride(const Norm& s, const Stand<V>& at) {
  return at.channel < s.c1 ? s.c1 : s.c2;
}

template <int V>
__device__ __forceinline__ void load_scale_shift(const Norm& s, const Stand<V>& at,
                                                 const Global<const float>& from, float (&scale)[V],
                                                 float (&shift)[V]) {
  float pairs[2 * V];
  load_floats<float>(from + (int64_t{at.n} * s.t.channels + at.channel) * 2, pairs);
#pragma unroll
  for (int j = 0; j < V; ++j) {
    scale[j] = pairs[2 * j];
    shift[j] = pairs[2 * j + 1];
  }
}

// A pair of each of the groups that a thread's channels belong to, from (N,G,2). Slots is 2 where
// groups are of a multiple of 4 channels, so that a run of 8 meets two of them at most; else V.
template <int V, int Slots>
struct GroupPairs {
  float first[Slots], second[Slots];

  __device__ __forceinline__ GroupPairs(const Norm& s, const Stand<V>& at,
                                        const Global<const float>& from) {
#pragma unroll
    for (int k = 0; k < Slots; ++k) {
      const int group = (at.channel + k * (V / Slots)) / s.group_channels;
      float pair[2];
      load_floats<float>(from + (int64_t{at.n} * s.groups + group) * 2, pair);
      first[k] = pair[0];
      second[k] = pair[1];
    }
  }
  // Of channel j of the thread.
  static constexpr int slot(int j) { return j * Slots / V; }
};

// RandomStream::block() with its rounds in a loop: unrolled, the keys of all rounds are kept beside
// everything else that a thread holds, which halves the threads there can be.
__device__ __forceinline__ Philox4 draw_block(const RandomStream& stream, uint32_t index) {
  Philox4 words = stream.counter(index);
  uint32_t low = static_cast<uint32_t>(stream.seed);
  uint32_t high = static_cast<uint32_t>(stream.seed >> 32);
#pragma unroll 2
  for (int round = 0; round < 10; ++round) philox_round(words, low, high);
  return words;
}

// Which of the thread's channels dropout keeps, in pixels p, p + rows, ... of the run: V bits each.
template <int Hold, int V>
__device__ __forceinline__ uint32_t draw_kept(const Norm& s, const Stand<V>& at,
                                              const Global<const StepState>& state, int p) {
  static_assert(Hold * V <= 32);
  if (s.threshold == 0) return 0xFFFFFFFFu;
  const StepState now = state[0];
  const RandomStream stream{.seed = now.seed,
                            .purpose = Purpose::kDropout,
                            .sample = now.first_image + static_cast<uint64_t>(at.n),
                            .step = static_cast<uint32_t>(now.step),
                            .layer = s.layer};
  const auto first_pixel = static_cast<uint32_t>(at.first_pixel) + static_cast<uint32_t>(p);
  uint32_t kept = 0;
#pragma unroll 1
  for (int i = 0; i < Hold; ++i) {
    const uint32_t pixel = first_pixel + static_cast<uint32_t>(i * at.rows);
    const uint32_t element =
        pixel * static_cast<uint32_t>(s.t.channels) + static_cast<uint32_t>(at.channel);
    const Philox4 words = draw_block(stream, element / 8);
    uint32_t bits = 0;
#pragma unroll
    for (int j = 0; j < 8; ++j) bits |= (dropout_bits(words, j) >= s.threshold ? 1u : 0u) << j;
    if constexpr (V == 1) bits = bits >> (element % 8) & 1u;
    kept |= bits << (i * V);
  }
  return kept;
}

// v, or what dropout makes of it; bit: its place in draw_kept's bits.
__device__ __forceinline__ float drop(const Norm& s, uint32_t kept, int bit, float v) {
  return kept >> bit & 1u ? v * s.factor : 0.0f;
}

// z sigmoid(z) is SiLU; 1 without it. Not branched on, so that all pixels of a batch are one
// stretch of code.
__device__ __forceinline__ float gate(const Norm& s, float z) {
  return fast_divide(1.0f, 1.0f + (s.silu ? fast_exp(-z) : 0.0f));
}

// ---- forward ----

// Channels of one group and rows of them, over the threads of a block.
struct Team {
  int width, rows, column, row;
  __device__ __forceinline__ Team(int channels) {
    const int block = static_cast<int>(blockDim.x), thread = static_cast<int>(threadIdx.x);
    int bits = 0;
    while ((1 << bits) < channels && (2 << bits) <= block) ++bits;
    width = 1 << bits;
    rows = block >> bits;
    column = thread & (width - 1);
    row = thread >> bits;
  }
};

// A block: a group of an image. Chan, Golub & LeVeque's merge of all its tiles and channels at
// once: M2 = sum(M2_i + count_i (mean_i - mean)^2).
__global__ void scale_shift_kernel(Norm s, int tile, float epsilon, Global<const float> stats,
                                   Global<const float> stats2, Global<const float> gamma,
                                   Global<const float> beta, Global<float> scale_shift,
                                   Global<float> mean_rstd) {
  SharedMemory shared;
  const int warps = static_cast<int>(blockDim.x / 32);
  const Smem<double> scratch = shared.take<double>(warps), scratch2 = shared.take<double>(warps);
  const int n = static_cast<int>(blockIdx.x) / s.groups;
  const int first = static_cast<int>(blockIdx.x) % s.groups * s.group_channels;
  const int tiles = static_cast<int>((s.t.pixels + tile - 1) / tile);
  const Team team(s.group_channels);
  // Sum of f(mean_i, M2_i, pixels of the tile).
  const auto own_sum = [&](auto f) {
    double sum = 0;
    for (int c = first + team.column; c < first + s.group_channels; c += team.width)
      for (int t = team.row; t < tiles; t += team.rows) {
        const int64_t row = int64_t{n} * tiles + t, left = s.t.pixels - int64_t{t} * tile;
        float pair[2];
        if (c < s.c1)
          load_floats<float>(stats + (row * s.c1 + c) * 2, pair);
        else
          load_floats<float>(stats2 + (row * s.c2 + c - s.c1) * 2, pair);
        sum += f(pair[0], pair[1], static_cast<double>(left < tile ? left : tile));
      }
    return sum;
  };
  const double count = static_cast<double>(s.t.pixels) * s.group_channels;
  const double mean =
      block_sum(own_sum([](double m, double, double weight) { return weight * m; }), scratch) /
      count;
  const double m2 = block_sum(own_sum([mean](double m, double squares, double weight) {
                                return squares + weight * (m - mean) * (m - mean);
                              }),
                              scratch2);
  const double rstd = 1 / sqrt(m2 / count + static_cast<double>(epsilon));
  const int thread = static_cast<int>(threadIdx.x);
  if (thread == 0) {
    const float pair[2] = {static_cast<float>(mean), static_cast<float>(rstd)};
    store_floats<float>(mean_rstd + int64_t{blockIdx.x} * 2, pair);
  }
  for (int c = first + thread; c < first + s.group_channels; c += static_cast<int>(blockDim.x)) {
    // The shift belongs to the rounded scale: their errors cancel where mean >> std.
    const float scale = static_cast<float>(rstd * static_cast<double>(gamma[c]));
    const float pair[2] = {scale, static_cast<float>(static_cast<double>(beta[c]) -
                                                     mean * static_cast<double>(scale))};
    store_floats<float>(scale_shift + (int64_t{n} * s.t.channels + c) * 2, pair);
  }
}

template <typename T, int V>
__global__ void __launch_bounds__(kTileThreads, 4)
    apply_kernel(Norm s, Global<const T> x, Global<const T> x2, Global<const float> scale_shift,
                 Global<const StepState> state, Global<T> y) {
  const Stand<V> at(s.t, static_cast<int>(gridDim.x - 1 - blockIdx.x));
  if (!at.inside) return;
  float scale[V], shift[V];
  load_scale_shift(s, at, scale_shift, scale, shift);
  const Global<const T> from = own_part(s, at, x, x2);
  const int stride = own_stride(s, at);
  const Global<T> to = y + (at.pixel(s.t) * s.t.channels + at.channel);
  for_pixels<4 / sizeof(T)>(at, [&]<int Hold>(int p) {
    const uint32_t kept = draw_kept<Hold>(s, at, state, p);
    float v[Hold][V];
#pragma unroll
    for (int i = 0; i < Hold; ++i) load_floats<T>(from + (p + i * at.rows) * stride, v[i]);
#pragma unroll
    for (int i = 0; i < Hold; ++i) {
#pragma unroll
      for (int j = 0; j < V; ++j) {
        const float z = v[i][j] * scale[j] + shift[j];
        v[i][j] = drop(s, kept, i * V + j, z * gate(s, z));
      }
      store_floats<T>(to + (p + i * at.rows) * s.t.channels, v[i]);
    }
  });
}

// ---- backward ----

// Blocks that a multiprocessor should hold at once.
template <int Slots>
constexpr int kBlocks = Slots == 2 ? 3 : 1;

// The gradient at z = x scale + shift.
__device__ __forceinline__ float gradient_at_z(const Norm& s, float z, float dy) {
  const float g = gate(s, z);
  return dy * (s.silu ? g * (1.0f + z * (1.0f - g)) : 1.0f);
}

// partial (N, runs, 2, C): sums of dz and of dz (x - mean) over a run of pixels.
template <typename T, int V, int Slots>
__global__ void __launch_bounds__(kTileThreads, kBlocks<Slots>)
    backward_sums_kernel(Norm s, Global<const T> x, Global<const T> x2,
                         Global<const float> scale_shift, Global<const float> mean_rstd,
                         Global<const StepState> state, Global<const T> dy, Global<float> partial) {
  SharedMemory shared;
  const Smem<float> parts = shared.take<float>(2 * kTileThreads * V);
  const Stand<V> at(s.t, static_cast<int>(blockIdx.x));
  float sum[V] = {}, centred[V] = {};
  if (at.inside) {
    float scale[V], shift[V];
    load_scale_shift(s, at, scale_shift, scale, shift);
    const GroupPairs<V, Slots> mean(s, at, mean_rstd);
    const Global<const T> from = own_part(s, at, x, x2);
    const int stride = own_stride(s, at);
    const Global<const T> gradient = dy + (at.pixel(s.t) * s.t.channels + at.channel);
    for_pixels<4 / sizeof(T)>(at, [&]<int Hold>(int p) {
      const uint32_t kept = draw_kept<Hold>(s, at, state, p);
      float v[Hold][V], d[Hold][V];
#pragma unroll
      for (int i = 0; i < Hold; ++i) {
        load_floats<T>(from + (p + i * at.rows) * stride, v[i]);
        load_floats<T>(gradient + (p + i * at.rows) * s.t.channels, d[i]);
      }
#pragma unroll
      for (int i = 0; i < Hold; ++i) {
#pragma unroll
        for (int j = 0; j < V; ++j) {
          const float z = v[i][j] * scale[j] + shift[j];
          const float dz = gradient_at_z(s, z, drop(s, kept, i * V + j, d[i][j]));
          sum[j] += dz;
          centred[j] += dz * (v[i][j] - mean.first[mean.slot(j)]);
        }
      }
    });
  }
  const int slab = at.lanes * V;
  store_floats<float>(parts + at.row * slab + at.lane * V, sum);
  store_floats<float>(parts + (at.rows + at.row) * slab + at.lane * V, centred);
  block_sync();
  const int width = at.width(s.t);
  for (int i = static_cast<int>(threadIdx.x); i < 2 * width; i += kTileThreads) {
    const int which = i >= width, c = which ? i - width : i;
    float all = 0;
    for (int r = 0; r < at.rows; ++r) all += parts[(which * at.rows + r) * slab + c];
    partial[((int64_t{at.n} * s.t.runs + at.run) * 2 + which) * s.t.channels + at.first_channel +
            c] = all;
  }
}

// A block: a group of an image. sums (N,2,C): of an image, dz and dz xhat. group (N,G,2): the slope
// and offset in dx = dz scale - (x slope + offset), where
//   slope = rstd^2 mean(gamma dz xhat), offset = rstd mean(gamma dz) - mean slope.
__global__ void backward_merge_kernel(Norm s, Global<const float> partial,
                                      Global<const float> mean_rstd, Global<const float> gamma,
                                      Global<float> sums, Global<float> group) {
  SharedMemory shared;
  const int threads = static_cast<int>(blockDim.x), thread = static_cast<int>(threadIdx.x);
  const Smem<double> column = shared.take<double>(threads), column2 = shared.take<double>(threads);
  const Smem<double> scratch = shared.take<double>(threads / 32);
  const Smem<double> scratch2 = shared.take<double>(threads / 32);
  const int n = static_cast<int>(blockIdx.x) / s.groups;
  const int first = static_cast<int>(blockIdx.x) % s.groups * s.group_channels;
  const double mean = static_cast<double>(mean_rstd[int64_t{blockIdx.x} * 2]);
  const double rstd = static_cast<double>(mean_rstd[int64_t{blockIdx.x} * 2 + 1]);
  const Team team(s.group_channels);
  double dz = 0, product = 0;  // of this thread's channels, times gamma
  for (int begin = 0; begin < s.group_channels; begin += team.width) {
    const int c = first + begin + team.column;
    const bool inside = begin + team.column < s.group_channels;
    double sum = 0, centred = 0;
    if (inside) {
#pragma unroll 4
      for (int run = team.row; run < s.t.runs; run += team.rows) {
        const int64_t from = (int64_t{n} * s.t.runs + run) * 2 * s.t.channels + c;
        sum += static_cast<double>(partial[from]);
        centred += static_cast<double>(partial[from + s.t.channels]);
      }
    }
    column[thread] = sum;
    column2[thread] = centred;
    block_sync();  // the only one: where there is a second turn, there is one row and no reading
    if (team.row == 0 && inside) {
      for (int r = 1; r < team.rows; ++r) {
        sum += column[r * team.width + team.column];
        centred += column2[r * team.width + team.column];
      }
      sums[int64_t{n} * 2 * s.t.channels + c] = static_cast<float>(sum);
      sums[(int64_t{n} * 2 + 1) * s.t.channels + c] = static_cast<float>(centred * rstd);
      dz += static_cast<double>(gamma[c]) * sum;
      product += static_cast<double>(gamma[c]) * centred;
    }
  }
  const double all = block_sum(dz, scratch), all_products = block_sum(product, scratch2);
  if (thread != 0) return;
  const double count = static_cast<double>(s.t.pixels) * s.group_channels;
  const float slope = static_cast<float>(rstd * rstd * rstd * all_products / count);
  const float pair[2] = {
      slope, static_cast<float>(rstd * all / count - mean * static_cast<double>(slope))};
  store_floats<float>(group + int64_t{blockIdx.x} * 2, pair);
}

// Blocks of the kernel below that sum over the images.
__host__ __device__ constexpr int parameter_blocks(int channels) {
  return (2 * channels + 31) / 32;
}

// dbeta (+)= the images' sums of dz, dgamma (+)= those of dz xhat, 32 columns a block.
__device__ __forceinline__ void sum_images(const Norm& s, bool accumulate,
                                           const Global<const float>& sums,
                                           const Global<float>& dgamma, const Global<float>& dbeta,
                                           const Smem<double>& scratch) {
  const int column = static_cast<int>(blockIdx.x) * 32 + lane_id();
  const bool inside = column < 2 * s.t.channels;
  double sum =
      column_total(sums + (inside ? column : 0), 2 * s.t.channels, s.t.images, inside, scratch);
  if (warp_id() > 0 || !inside) return;
  const int c = column < s.t.channels ? column : column - s.t.channels;
  const Global<float> to = (column < s.t.channels ? dbeta : dgamma) + c;
  if (accumulate) sum += static_cast<double>(to[0]);
  to[0] = static_cast<float>(sum);
}

struct Accumulate {
  bool dx, dx2, parameters;
};

// dy may be dx's memory: a thread reads an element before it writes the same one.
template <typename T, int V, int Slots>
__global__ void __launch_bounds__(kTileThreads, kBlocks<Slots>)
    backward_dx_kernel(Norm s, Accumulate accumulate, Global<const T> x, Global<const T> x2,
                       Global<const float> scale_shift, Global<const float> sums,
                       Global<const float> group, Global<const StepState> state,
                       GlobalAliased<const T> dy, GlobalAliased<T> dx, GlobalAliased<T> dx2,
                       Global<float> dgamma, Global<float> dbeta) {
  SharedMemory shared;
  const Smem<double> scratch = shared.take<double>(kTileThreads);
  if (static_cast<int>(blockIdx.x) < parameter_blocks(s.t.channels)) {
    sum_images(s, accumulate.parameters, sums, dgamma, dbeta, scratch);
    return;
  }
  // From the end: what the sums read last is still in the cache.
  const Stand<V> at(s.t, static_cast<int>(gridDim.x - 1 - blockIdx.x));
  if (!at.inside) return;
  float scale[V], shift[V];
  load_scale_shift(s, at, scale_shift, scale, shift);
  const GroupPairs<V, Slots> line(s, at, group);
  const Global<const T> from = own_part(s, at, x, x2);
  const GlobalAliased<T> to = own_part(s, at, dx, dx2);
  const int stride = own_stride(s, at);
  const GlobalAliased<const T> gradient = dy + (at.pixel(s.t) * s.t.channels + at.channel);
  const bool add = at.channel < s.c1 ? accumulate.dx : accumulate.dx2;
  for_pixels<4 / sizeof(T)>(at, [&]<int Hold>(int p) {
    const uint32_t kept = draw_kept<Hold>(s, at, state, p);
    float v[Hold][V], d[Hold][V];
#pragma unroll
    for (int i = 0; i < Hold; ++i) {
      load_floats<T>(from + (p + i * at.rows) * stride, v[i]);
      load_floats<T>(gradient + (p + i * at.rows) * s.t.channels, d[i]);
    }
#pragma unroll
    for (int i = 0; i < Hold; ++i) {
      float old[V] = {};
      if (add) load_floats<T>(to + (p + i * at.rows) * stride, old);
#pragma unroll
      for (int j = 0; j < V; ++j) {
        const float z = v[i][j] * scale[j] + shift[j];
        const float dz = gradient_at_z(s, z, drop(s, kept, i * V + j, d[i][j]));
        const float common = v[i][j] * line.first[line.slot(j)] + line.second[line.slot(j)];
        d[i][j] = old[j] + (dz * scale[j] - common);
      }
      store_floats<T>(to + (p + i * at.rows) * stride, d[i]);
    }
  });
}

// ---- calls ----

void check(const char* op, const GroupNormDesc& d, In x2, In state) {
  DDPM_CHECK(d.x.positive() && d.c2 >= 0 && d.groups > 0 && d.c() % d.groups == 0 && d.tile > 0,
             "%s: x %s and %d channels in %d groups, tile %d", op, to_string(d.x).c_str(), d.c2,
             d.groups, d.tile);
  DDPM_CHECK(static_cast<bool>(x2) == (d.c2 > 0),
             "%s: x %s and %d channels of a second input, which is %s", op, to_string(d.x).c_str(),
             d.c2, x2 ? "there" : "absent");
  DDPM_CHECK(d.dropout.p >= 0 && d.dropout.p < 1 && (d.dropout.p == 0 || state),
             "%s: x %s, dropout %g needs a state and 0 <= p < 1", op, to_string(d.x).c_str(),
             static_cast<double>(d.dropout.p));
}

template <typename Slot>
std::vector<Slot> present(std::initializer_list<Slot> slots) {
  std::vector<Slot> v(slots);
  std::erase_if(v, [](Slot s) { return !s; });
  return v;
}

bool wide(const GroupNormDesc& d) { return d.x.c % 8 == 0 && d.c2 % 8 == 0; }

// Of a block that merges `entries` values of a group: up to four per thread.
unsigned merge_block(int64_t entries) {
  unsigned block = 32;
  while (block < 256 && int64_t{block} * 4 < entries) block *= 2;
  return block;
}

constexpr int kApplyPixels = 4, kSumPixels = 8, kDxPixels = 4;  // of a thread

// Workspace of the backward pass.
struct BackwardSpace {
  size_t sums, group, partial, bytes;  // where they begin

  // `summed`: the partial sums lie elsewhere.
  BackwardSpace(const Norm& s, bool summed) {
    const auto floats = [](int64_t count) {
      return (static_cast<size_t>(count) * sizeof(float) + 63) / 64 * 64;
    };
    const int64_t n = s.t.images;
    sums = 0;
    group = floats(n * 2 * s.t.channels);
    partial = group + floats(n * s.groups * 2);
    bytes = partial + (summed ? 0 : floats(n * s.t.runs * 2 * s.t.channels));
  }
};

struct BackwardSlots {
  In x, x2, scale_shift, mean_rstd, gamma, state, dy, sums;
  Out dx, dx2, dgamma, dbeta;
};

template <typename T, int V, int Slots>
Call backward(const GroupNormDesc& d, const BackwardSlots& b, const Accumulate& accumulate) {
  const bool summed = static_cast<bool>(b.sums);
  const Norm sums_of = summed ? Norm(d, V, 0, d.tile) : Norm(d, V, kSumPixels);
  GroupNormDesc rest = d;  // what lies between dy and dx
  if (summed) {
    rest.silu = false;
    rest.dropout = {};
  }
  const Norm dx_of(rest, V, kDxPixels);
  const BackwardSpace space(sums_of, summed);
  const unsigned merge = merge_block(int64_t{sums_of.t.runs} * sums_of.group_channels);
  const unsigned sum_blocks = sums_of.t.blocks(),
                 dx_blocks =
                     dx_of.t.blocks() + static_cast<unsigned>(parameter_blocks(dx_of.t.channels));
  const auto run = [=](const Run& r) {
    char* workspace = static_cast<char*>(r.workspace);
    float* sums = reinterpret_cast<float*>(workspace + space.sums);
    float* group = reinterpret_cast<float*>(workspace + space.group);
    const float* partial =
        summed ? r.in<float>(b.sums) : reinterpret_cast<float*>(workspace + space.partial);
    const T *x = r.in<T>(b.x), *x2 = r.in<T>(b.x2), *dy = r.in<T>(b.dy);
    const float* scale_shift = r.in<float>(b.scale_shift);
    const float* mean_rstd = r.in<float>(b.mean_rstd);
    const StepState* state = r.in<StepState>(b.state);
    if (!summed)
      launch<backward_sums_kernel<T, V, Slots>>(
          {.grid_x = sum_blocks,
           .block = kTileThreads,
           .shared = shared_bytes<float>(2 * kTileThreads * V)},
          r.stream, sums_of, x, x2, scale_shift, mean_rstd, state, dy,
          reinterpret_cast<float*>(workspace + space.partial));
    launch<backward_merge_kernel>(
        {.grid_x = static_cast<unsigned>(d.x.n * d.groups),
         .block = merge,
         .shared = 2 * shared_bytes<double>(merge) + 2 * shared_bytes<double>(merge / 32)},
        r.stream, sums_of, partial, mean_rstd, r.in<float>(b.gamma), sums, group);
    launch<backward_dx_kernel<T, V, Slots>>(
        {.grid_x = dx_blocks, .block = kTileThreads, .shared = shared_bytes<double>(kTileThreads)},
        r.stream, dx_of, accumulate, x, x2, scale_shift, sums, group, state, dy, r.out<T>(b.dx),
        r.out<T>(b.dx2), r.out<float>(b.dgamma), r.out<float>(b.dbeta));
  };
  return {"group_norm_backward",
          present({b.x, b.x2, b.scale_shift, b.mean_rstd, b.gamma, b.state, b.dy, b.sums}),
          present({b.dx, b.dx2, b.dgamma, b.dbeta}), space.bytes, run};
}

}  // namespace

Call CudaBackend::group_norm_scale_shift(const GroupNormDesc& d, In stats, In stats2, In gamma,
                                         In beta, Out scale_shift, Out mean_rstd) {
  GroupNormDesc plain = d;
  plain.dropout = {};
  check("group_norm_scale_shift", plain, stats2, {});
  const Norm s(plain, 1, 1);
  const unsigned block = merge_block((d.x.pixels() + d.tile - 1) / d.tile * s.group_channels);
  const LaunchShape shape{.grid_x = static_cast<unsigned>(d.x.n * d.groups),
                          .block = block,
                          .shared = 2 * shared_bytes<double>(block / 32)};
  return {"group_norm_scale_shift",
          present({stats, stats2, gamma, beta}),
          {scale_shift, mean_rstd},
          0,
          [=, tile = d.tile, epsilon = d.epsilon](const Run& r) {
            launch<scale_shift_kernel>(shape, r.stream, s, tile, epsilon, r.in<float>(stats),
                                       r.in<float>(stats2), r.in<float>(gamma), r.in<float>(beta),
                                       r.out<float>(scale_shift), r.out<float>(mean_rstd));
          }};
}

Call CudaBackend::group_norm_apply(const GroupNormDesc& d, In x, In x2, In scale_shift, In state,
                                   Out y) {
  check("group_norm_apply", d, x2, state);
  const auto call = [&]<typename T, int V>(T, std::integral_constant<int, V>) -> Call {
    const Norm s(d, V, kApplyPixels);
    const LaunchShape shape{.grid_x = s.t.blocks(), .block = kTileThreads};
    return {"group_norm_apply", present({x, x2, scale_shift, state}), {y}, 0, [=](const Run& r) {
              launch<apply_kernel<T, V>>(shape, r.stream, s, r.in<T>(x), r.in<T>(x2),
                                         r.in<float>(scale_shift), r.in<StepState>(state),
                                         r.out<T>(y));
            }};
  };
  return dispatch_width(type_, wide(d), call);
}

// dx may be dy's memory where there is no second input and dx is overwritten.
Call CudaBackend::group_norm_backward(const GroupNormDesc& d, In x, In x2, In scale_shift,
                                      In mean_rstd, In gamma, In state, In dy, In sums, Out dx,
                                      Write write, Out dx2, Write write2, Out dgamma, Out dbeta,
                                      Write write_parameters) {
  check("group_norm_backward", d, x2, state);
  DDPM_CHECK(dx && static_cast<bool>(dx2) == (d.c2 > 0) && dgamma && dbeta,
             "group_norm_backward: x %s: needs dx, dgamma, dbeta, and dx2 with a second input only",
             to_string(d.x).c_str());
  const BackwardSlots slots{x,  x2,   scale_shift, mean_rstd, gamma,  state,
                            dy, sums, dx,          dx2,       dgamma, dbeta};
  const Accumulate accumulate{write == Write::kAccumulate, write2 == Write::kAccumulate,
                              write_parameters == Write::kAccumulate};
  return dispatch_width(type_, wide(d), [&]<typename T, int V>(T, std::integral_constant<int, V>) {
    if constexpr (V == 8)
      if (d.c() / d.groups % 4 == 0) return backward<T, V, 2>(d, slots, accumulate);
    return backward<T, V, V>(d, slots, accumulate);
  });
}

}  // namespace ddpm::cuda
