// Attention in fp32 without tensor cores, for any shape: the exact mode, and bf16 heads whose rows
// are not whole 16-byte units. A block of 256 threads has 64 rows (of queries, or of keys in dk and
// dv) and sums 256 columns of one output over tiles of 64 rows of the other side. Scores are made
// again for every output and every 256 columns: 4 L^2 D operations per head forward, 16 backward
// (at D <= 256). Limited by arithmetic: 4 x 4 products per 8 values from shared memory.
#include "kernels/cuda/attention.h"
#include "kernels/cuda/vec.h"

#include <device/warp.h>

namespace ddpm::cuda {
namespace {

constexpr int kTile = 64, kThreads = 256, kDepth = 32, kColumns = 256;
// 4 more than a multiple of 32: four values of eight rows lie in different banks.
constexpr int kDepthPitch = kDepth + 4, kTilePitch = kTile + 4;
constexpr size_t kShared =
    shared_bytes<float>(kTile * kDepthPitch) + 2 * shared_bytes<float>(kTile * kTilePitch);

enum class Sum { kOutput, kQuery, kKey, kValue };  // o, dq, dk, dv

// Rows of one head in global memory, the first `count` of which exist.
template <typename T>
struct Rows {
  Global<const T> data;
  int64_t stride;
  int count;
};

// A thread's place: rows y + 16 i of a tile, columns x + 16 j of scores, 4 x + j of sums.
__device__ __forceinline__ int thread_y() { return static_cast<int>(threadIdx.x) / 16; }
__device__ __forceinline__ int thread_x() { return static_cast<int>(threadIdx.x) % 16; }

// Columns [first, first + Columns) of a tile's rows, zeros where there are none.
template <int Columns, typename T>
__device__ void load_tile(const Smem<float>& to, const Rows<T>& from, int first, int head_dim) {
#pragma unroll 2
  for (int i = static_cast<int>(threadIdx.x); i < kTile * Columns; i += kThreads) {
    const int row = i / Columns, column = i % Columns;
    const bool valid = row < from.count && first + column < head_dim;
    to[row * (Columns + 4) + column] =
        valid ? to_float(from.data[row * from.stride + first + column]) : 0.0f;
  }
}

// d[i][j] += sum over k of a[i][k] b[j][k]
__device__ __forceinline__ void multiply_add(float (&d)[4][4], const float (&a)[4][4],
                                             const float (&b)[4][4]) {
#pragma unroll
  for (int k = 0; k < 4; ++k)
#pragma unroll
    for (int i = 0; i < 4; ++i)
#pragma unroll
      for (int j = 0; j < 4; ++j) d[i][j] = fmaf(a[i][k], b[j][k], d[i][j]);
}

// x = a b^T over the head's columns; as and bs are free at the caller's next block_sync().
template <typename T>
__device__ void scores(float (&x)[4][4], const Rows<T>& a, const Rows<T>& b, int head_dim,
                       const Smem<float>& as, const Smem<float>& bs) {
#pragma unroll
  for (int i = 0; i < 4; ++i)
#pragma unroll
    for (int j = 0; j < 4; ++j) x[i][j] = 0;
  for (int first = 0; first < head_dim; first += kDepth) {
    block_sync();
    load_tile<kDepth>(as, a, first, head_dim);
    load_tile<kDepth>(bs, b, first, head_dim);
    block_sync();
    const int depth = head_dim - first < kDepth ? head_dim - first : kDepth;
    if (thread_y() >= a.count || thread_x() >= b.count) continue;
#pragma unroll 1
    for (int k = 0; k < depth; k += 4) {
      float av[4][4], bv[4][4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        load_floats<float>(as + ((thread_y() + 16 * i) * kDepthPitch + k), av[i]);
        load_floats<float>(bs + ((thread_x() + 16 * i) * kDepthPitch + k), bv[i]);
      }
      multiply_add(x, av, bv);
    }
  }
}

// sum[g][i][j] += w b over columns [first, first + kColumns) of b. ws was last read before the
// barriers of scores().
template <typename T>
__device__ void add_product(float (&sum)[kColumns / kTile][4][4], const float (&w)[4][4], int rows,
                            const Rows<T>& b, int first, int head_dim, const Smem<float>& ws,
                            const Smem<float>& bs) {
#pragma unroll
  for (int i = 0; i < 4; ++i)
#pragma unroll
    for (int j = 0; j < 4; ++j)
      ws[(thread_y() + 16 * i) * kTilePitch + thread_x() + 16 * j] = w[i][j];
#pragma unroll
  for (int g = 0; g < kColumns / kTile; ++g) {
    const int column = first + g * kTile;
    if (column >= head_dim) continue;
    block_sync();
    load_tile<kTile>(bs, b, column, head_dim);
    block_sync();
    if (thread_y() >= rows || column + 4 * thread_x() >= head_dim) continue;
#pragma unroll 1
    for (int k = 0; k < b.count; k += 4) {  // w is 0 behind b's last row
      float wv[4][4], bv[4][4], transposed[4][4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        load_floats<float>(ws + ((thread_y() + 16 * i) * kTilePitch + k), wv[i]);
        load_floats<float>(bs + ((k + i) * kTilePitch + 4 * thread_x()), bv[i]);
      }
#pragma unroll
      for (int i = 0; i < 4; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j) transposed[j][i] = bv[i][j];
      multiply_add(sum[g], wv, transposed);
    }
  }
}

// Over the 16 threads that share a row.
__device__ __forceinline__ float row_max(float v) {
#pragma unroll
  for (int mask = 1; mask < 16; mask *= 2) v = fmaxf(v, shuffle_xor(v, mask));
  return v;
}
__device__ __forceinline__ float row_sum(float v) {
#pragma unroll
  for (int mask = 1; mask < 16; mask *= 2) v += shuffle_xor(v, mask);
  return v;
}

// Forward: scores -> exp(scale (x - max)), keys from `count` on 0; the running maximum, sum and
// output follow.
struct Softmax {
  float max[4], sum[4];

  __device__ void step(float (&x)[4][4], float (&out)[kColumns / kTile][4][4], int count,
                       float scale) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      float new_max = max[i];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        if (thread_x() + 16 * j >= count) x[i][j] = -INFINITY;
        new_max = fmaxf(new_max, x[i][j]);
      }
      new_max = row_max(new_max);
      const float decay = expf((max[i] - new_max) * scale);
      max[i] = new_max;
      float row = 0;
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        x[i][j] = expf((x[i][j] - new_max) * scale);
        row += x[i][j];
      }
      sum[i] = sum[i] * decay + row_sum(row);
#pragma unroll
      for (int g = 0; g < kColumns / kTile; ++g)
#pragma unroll
        for (int j = 0; j < 4; ++j) out[g][i][j] *= decay;
    }
  }
};

// Backward: x -> p or ds, from the stats of the tile's queries: rows, or columns where rows are
// keys. Rows behind the last key are not stored; what else is outside must be 0.
template <Sum S>
__device__ __forceinline__ void weigh(float (&x)[4][4], const float (&dp)[4][4],
                                      const Global<const float>& row_stats,
                                      const Global<const float>& column_stats, int columns,
                                      float scale) {
#pragma unroll
  for (int i = 0; i < 4; ++i)
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int row = thread_y() + 16 * i, column = thread_x() + 16 * j;
      float s[2];
      load_floats<float>(S == Sum::kQuery ? row_stats + 2 * row : column_stats + 2 * column, s);
      const float p = column < columns ? expf(fmaf(x[i][j], scale, -s[0])) : 0.0f;
      x[i][j] = S == Sum::kValue ? p : p * (dp[i][j] - s[1]) * scale;
    }
}

// Two blocks share an SM but for dq, whose pointers and stats would not fit the registers.
template <typename T, Sum S>
__global__ void __launch_bounds__(kThreads, S == Sum::kQuery ? 1 : 2)
    attention_plain_kernel(Global<const T> qkv, Global<const T> d_o, Global<const float> stats,
                           Global<T> to, Global<float> lse, AttentionProblem p) {
  constexpr bool kOfKeys = S == Sum::kKey || S == Sum::kValue;
  SharedMemory shared;
  const Smem<float> as = shared.take<float>(kTile * kDepthPitch);
  const Smem<float> bs = shared.take<float>(kTile * kTilePitch);
  const Smem<float> ws = shared.take<float>(kTile * kTilePitch);
  const AttentionRows mine(p, static_cast<int>(blockIdx.x), kTile);
  const int64_t width = p.width(), stride = 3 * width;
  const int column0 = static_cast<int>(blockIdx.y) * kColumns;
  const auto part = [&](int which, int first, int count) {
    return Rows<T>{qkv + (p.at(mine.unit, stride) + first * stride + which * width), stride, count};
  };
  const auto gradient = [&](int first, int count) {
    return Rows<T>{d_o + (p.at(mine.unit, width) + first * width), width, count};
  };

  float sum[kColumns / kTile][4][4] = {};
  Softmax softmax{{-INFINITY, -INFINITY, -INFINITY, -INFINITY}, {}};
  for (int first = 0; first < p.tokens; first += kTile) {
    const int count = p.tokens - first < kTile ? p.tokens - first : kTile;
    float x[4][4], dp[4][4] = {};
    scores(x, part(kOfKeys ? 1 : 0, mine.first, mine.count), part(kOfKeys ? 0 : 1, first, count),
           p.head_dim, as, bs);
    if constexpr (S == Sum::kQuery)
      scores(dp, gradient(mine.first, mine.count), part(2, first, count), p.head_dim, as, bs);
    if constexpr (S == Sum::kKey)
      scores(dp, part(2, mine.first, mine.count), gradient(first, count), p.head_dim, as, bs);
    if constexpr (S == Sum::kOutput) {
      softmax.step(x, sum, count, p.scale);
    } else {
      const Global<const float> unit_stats = stats + int64_t{mine.unit} * p.padded() * 2;
      weigh<S>(x, dp, unit_stats + 2 * mine.first, unit_stats + 2 * first, count, p.scale);
    }
    const Rows<T> from = S == Sum::kOutput  ? part(2, first, count)
                         : S == Sum::kQuery ? part(1, first, count)
                         : S == Sum::kKey   ? part(0, first, count)
                                            : gradient(first, count);
    add_product(sum, x, mine.count, from, column0, p.head_dim, ws, bs);
  }

  const int64_t to_stride = S == Sum::kOutput ? width : stride;
  const int64_t to_part = S == Sum::kKey ? width : S == Sum::kValue ? 2 * width : 0;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int row = thread_y() + 16 * i;
    if (row >= mine.count) continue;
    const Global<T> to_row =
        to + (p.at(mine.unit, to_stride) + (mine.first + row) * to_stride + to_part);
    const float factor = S == Sum::kOutput ? 1.0f / softmax.sum[i] : 1.0f;
#pragma unroll
    for (int g = 0; g < kColumns / kTile; ++g)
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int column = column0 + g * kTile + 4 * thread_x() + j;
        const float value[1] = {sum[g][i][j] * factor};
        if (column < p.head_dim) store_floats<T>(to_row + column, value);
      }
    if (S == Sum::kOutput && lse != nullptr && column0 == 0 && thread_x() == 0)
      lse[int64_t{mine.unit} * p.tokens + mine.first + row] =
          softmax.max[i] * p.scale + logf(softmax.sum[i]);
  }
}

template <typename T, Sum S>
void run(const AttentionProblem& p, const T* qkv, const T* d_o, const float* stats, T* to,
         float* lse, void* stream) {
  launch<attention_plain_kernel<T, S>>(
      {.grid_x = p.blocks(kTile),
       .grid_y = static_cast<unsigned>((p.head_dim + kColumns - 1) / kColumns),
       .block = kThreads,
       .shared = kShared},
      stream, qkv, d_o, stats, to, lse, p);
}

}  // namespace

template <typename T>
void plain_attention_forward(const AttentionProblem& p, const T* qkv, T* o, float* lse,
                             void* stream) {
  run<T, Sum::kOutput>(p, qkv, nullptr, nullptr, o, lse, stream);
}
template <typename T>
void plain_attention_backward(const AttentionProblem& p, const T* qkv, const T* d_o,
                              const float* stats, T* dqkv, void* stream) {
  run<T, Sum::kQuery>(p, qkv, d_o, stats, dqkv, nullptr, stream);
  run<T, Sum::kKey>(p, qkv, d_o, stats, dqkv, nullptr, stream);
  run<T, Sum::kValue>(p, qkv, d_o, stats, dqkv, nullptr, stream);
}

template void plain_attention_forward(const AttentionProblem&, const float*, float*, float*, void*);
template void plain_attention_forward(const AttentionProblem&, const bf16*, bf16*, float*, void*);
template void plain_attention_backward(const AttentionProblem&, const float*, const float*,
                                       const float*, float*, void*);
template void plain_attention_backward(const AttentionProblem&, const bf16*, const bf16*,
                                       const float*, bf16*, void*);

}  // namespace ddpm::cuda
