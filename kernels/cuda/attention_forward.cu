// Attention on tensor cores, forward: online softmax over tiles of 64 keys (Dao 2023), a block per
// 64 query rows. Reads qkv once from memory, K and V again from L2 per block of 64 rows; writes o
// and lse. 4 L^2 D operations per head. Limited by shared memory, which feeds each mma at
// (A + B fragments) / 128 bytes a clock: a warp computes 32 x 32 scores at D = 256 (256 bytes an
// mma), then 32 x 128 outputs (160).
#include "kernels/cuda/attention.h"
#include "kernels/cuda/attention_tiles.h"

namespace ddpm::cuda {
namespace {

// WM x WN warps. A warp has 16 RT rows, and of these 64 / WN scores and Columns / WN outputs.
template <int Columns, int WM, int RT, int WN, int BlocksPerSm>
struct ForwardTile {
  static constexpr int kColumns = Columns, kRT = RT, kWN = WN;
  static constexpr int kThreads = 32 * WM * WN, kBlocksPerSm = BlocksPerSm;
  static constexpr int kWarpRows = 16 * RT, kRows = kWarpRows * WM;
  static constexpr int kKeys = 64, kWarpKeys = kKeys / WN, kWarpColumns = Columns / WN;
  static constexpr size_t kShared = shared_bytes<bf16>(kRows * kPitch<Columns>) +
                                    2 * shared_bytes<bf16>(kKeys * kPitch<Columns>) +
                                    shared_bytes<bf16>(kRows * kPitch<kKeys>) +
                                    shared_bytes<float>(WN * kRows);
};

// Over a row's warps: f of all of them, in order. The scratch is free again after the next
// block_sync().
template <class Tile, typename F>
__device__ __forceinline__ void combine_rows(float (&v)[Tile::kRT][2], const Smem<float>& scratch,
                                             int warp_row, int warp_column, F f) {
  if constexpr (Tile::kWN > 1) {
    const int row = warp_row * Tile::kWarpRows + lane_id() / 4;
#pragma unroll
    for (int r = 0; r < Tile::kRT; ++r)
#pragma unroll
      for (int half = 0; half < 2; ++half)
        if (lane_id() % 4 == 0)
          scratch[warp_column * Tile::kRows + row + 16 * r + 8 * half] = v[r][half];
    block_sync();
#pragma unroll
    for (int r = 0; r < Tile::kRT; ++r)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        v[r][half] = scratch[row + 16 * r + 8 * half];
#pragma unroll
        for (int w = 1; w < Tile::kWN; ++w)
          v[r][half] = f(v[r][half], scratch[w * Tile::kRows + row + 16 * r + 8 * half]);
      }
  }
}

// Scores -> exp(scale (s - max)) with the new running maximum; the running sum and o follow it.
// Sums are of this lane's columns alone.
template <class Tile, int CT, int OT>
__device__ __forceinline__ void online_softmax(float (&s)[Tile::kRT][CT][4],
                                               float (&max)[Tile::kRT][2],
                                               float (&sum)[Tile::kRT][2],
                                               float (&o)[Tile::kRT][OT][4],
                                               const float (&new_max)[Tile::kRT][2], float scale) {
#pragma unroll
  for (int r = 0; r < Tile::kRT; ++r)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float shift = new_max[r][half] * scale;
      const float decay = fast_exp2((max[r][half] - new_max[r][half]) * scale);
      max[r][half] = new_max[r][half];
      float row = 0;
#pragma unroll
      for (int c = 0; c < CT; ++c)
#pragma unroll
        for (int i = 2 * half; i < 2 * half + 2; ++i) {
          s[r][c][i] = fast_exp2(fmaf(s[r][c][i], scale, -shift));
          row += s[r][c][i];
        }
      sum[r][half] = sum[r][half] * decay + row;
#pragma unroll
      for (int c = 0; c < OT; ++c) {
        o[r][c][2 * half] *= decay;
        o[r][c][2 * half + 1] *= decay;
      }
    }
}

template <class Tile>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kBlocksPerSm)
    attention_forward_kernel(Global<const bf16> qkv, Global<bf16> o, Global<float> lse,
                             AttentionProblem p) {
  constexpr int kD = Tile::kColumns, kRT = Tile::kRT, kKeys = Tile::kKeys, kT = Tile::kThreads;
  SharedMemory shared;
  const Smem<bf16> q = shared.take<bf16>(Tile::kRows * kPitch<kD>);
  const Smem<bf16> k = shared.take<bf16>(kKeys * kPitch<kD>);
  const Smem<bf16> v = shared.take<bf16>(kKeys * kPitch<kD>);
  const Smem<bf16> weights = shared.take<bf16>(Tile::kRows * kPitch<kKeys>);
  const Smem<float> scratch = shared.take<float>(Tile::kWN * Tile::kRows);
  const int warp_row = warp_id() / Tile::kWN, warp_column = warp_id() % Tile::kWN;
  const int row = warp_row * Tile::kWarpRows;  // of the block's, this warp's first

  const AttentionRows mine(p, static_cast<int>(blockIdx.x), Tile::kRows);
  const int64_t stride = 3 * int64_t{p.width()};
  const Global<const bf16> queries = qkv + p.at(mine.unit, stride);
  const auto load_keys = [&](const Smem<bf16>& to, int part, int first) {
    copy_rows<kKeys, kD, kT>(to, queries + (first * stride + part * int64_t{p.width()}), stride,
                             p.tokens - first, p.head_dim);
    copy_async_commit();
  };
  copy_rows<Tile::kRows, kD, kT>(q, queries + mine.first * stride, stride, mine.count, p.head_dim);
  load_keys(k, 1, 0);

  const float scale = p.scale * kLog2E;
  float out[kRT][Tile::kWarpColumns / 8][4], max[kRT][2], sum[kRT][2];
  clear(out);
#pragma unroll
  for (int r = 0; r < kRT; ++r) {
    max[r][0] = max[r][1] = -INFINITY;
    sum[r][0] = sum[r][1] = 0;
  }
  for (int first = 0; first < p.tokens; first += kKeys) {
    copy_async_wait<0>();
    block_sync();  // k is here; v and weights are free
    load_keys(v, 2, first);
    float s[kRT][Tile::kWarpKeys / 8][4];
    clear(s);
    const int key = warp_column * Tile::kWarpKeys;
    multiply_transposed<kD>(s, q + row * kPitch<kD>, k + key * kPitch<kD>);
    if (p.tokens - first < kKeys) mask_columns(s, p.tokens - first - key);
    float new_max[kRT][2];
#pragma unroll
    for (int r = 0; r < kRT; ++r)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float m = max[r][half];
#pragma unroll
        for (int c = 0; c < Tile::kWarpKeys / 8; ++c)
          m = fmaxf(m, fmaxf(s[r][c][2 * half], s[r][c][2 * half + 1]));
        new_max[r][half] = row_max(m);
      }
    combine_rows<Tile>(new_max, scratch, warp_row, warp_column,
                       [](float a, float b) { return fmaxf(a, b); });
    online_softmax<Tile>(s, max, sum, out, new_max, scale);
    put<kKeys>(weights + (row * kPitch<kKeys> + key), s);
    copy_async_wait<0>();
    block_sync();  // v and weights are here; k is free
    if (first + kKeys < p.tokens) load_keys(k, 1, first + kKeys);
    multiply<kKeys, kD>(out, weights + row * kPitch<kKeys>, v + warp_column * Tile::kWarpColumns);
  }

#pragma unroll
  for (int r = 0; r < kRT; ++r)
    for (int half = 0; half < 2; ++half) sum[r][half] = row_sum(sum[r][half]);
  combine_rows<Tile>(sum, scratch, warp_row, warp_column, [](float a, float b) { return a + b; });
#pragma unroll
  for (int r = 0; r < kRT; ++r)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int at = row + 16 * r + 8 * half + lane_id() / 4;
      if (lse != nullptr && warp_column == 0 && lane_id() % 4 == 0 && at < mine.count)
        lse[int64_t{mine.unit} * p.tokens + mine.first + at] =
            fmaf(max[r][half], p.scale, logf(sum[r][half]));
      const float inverse = 1.0f / sum[r][half];
#pragma unroll
      for (int c = 0; c < Tile::kWarpColumns / 8; ++c) {
        out[r][c][2 * half] *= inverse;
        out[r][c][2 * half + 1] *= inverse;
      }
    }
  put<kD>(q + (row * kPitch<kD> + warp_column * Tile::kWarpColumns), out);
  block_sync();
  store_rows<Tile::kRows, kD, kT>(
      o + (p.at(mine.unit, p.width()) + mine.first * int64_t{p.width()}), p.width(), q, mine.count,
      p.head_dim);
}

template <class Tile>
void run(const AttentionProblem& p, const bf16* qkv, bf16* o, float* lse, void* stream) {
  launch<attention_forward_kernel<Tile>>(
      {.grid_x = p.blocks(Tile::kRows), .block = Tile::kThreads, .shared = Tile::kShared}, stream,
      qkv, o, lse, p);
}

template <class Tile>
AttentionForward<bf16> if_it_fits(size_t shared_bytes) {
  return Tile::kShared <= shared_bytes ? run<Tile> : nullptr;
}

}  // namespace

// 64 rows each: 4 warps with 32 x 128 outputs each at 256 columns, two blocks on an SM, so that one
// computes while the other waits; at 512, 8 warps.
AttentionForward<bf16> tensor_attention_forward(int head_dim, size_t shared_bytes) {
  if (head_dim <= 64) return if_it_fits<ForwardTile<64, 4, 1, 1, 4>>(shared_bytes);
  if (head_dim <= 128) return if_it_fits<ForwardTile<128, 4, 1, 1, 3>>(shared_bytes);
  if (head_dim <= 256) return if_it_fits<ForwardTile<256, 2, 2, 2, 2>>(shared_bytes);
  return if_it_fits<ForwardTile<512, 2, 2, 4, 1>>(shared_bytes);
}

}  // namespace ddpm::cuda
