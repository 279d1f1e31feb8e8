// Attention on tensor cores, backward, without atomics: two launches that each recompute the
// probabilities from lse (Dao 2023). One has a block per tile of queries, which sums dq over the
// keys; the other a block per tile of keys, which sums dk and dv over the queries. Both are one
// kernel: rows of two resident matrices against rows of two streamed ones.
//                 resident    streamed    x = a b^T   dp = a2 b2^T    sums
//     queries     q, do       k, v        q k^T       do v^T          ds b -> dq
//     keys        k, v        q, do       (q k^T)^T   (do v^T)^T      ds b -> dk, p b2 -> dv
// 14 L^2 D operations per head, where one pass with atomics needs 10. Reads qkv and do once from
// memory per launch, the streamed pair again from L2 per block; writes dqkv. Limited by shared
// memory: 160 to 512 bytes of fragments an mma.
#include "kernels/cuda/attention.h"
#include "kernels/cuda/attention_tiles.h"

namespace ddpm::cuda {
namespace {

// WM x WN warps. A warp has 16 RT rows, and of these Streamed / WN scores and Columns / WN sums.
template <bool Keys, int Columns, int WM, int RT, int WN, int Streamed, int Stages>
struct BackwardTile {
  static constexpr bool kOfKeys = Keys;
  static constexpr int kColumns = Columns, kRT = RT, kWN = WN, kStages = Stages;
  static constexpr int kThreads = 32 * WM * WN, kWarpRows = 16 * RT, kRows = kWarpRows * WM;
  static constexpr int kStreamed = Streamed, kWarpStreamed = Streamed / WN;
  static constexpr int kWarpColumns = Columns / WN;
  static constexpr size_t kShared = 2 * shared_bytes<bf16>(kRows * kPitch<Columns>) +
                                    2 * shared_bytes<bf16>(Stages * Streamed * kPitch<Columns>) +
                                    (Keys ? 2 : 1) * shared_bytes<bf16>(kRows * kPitch<Streamed>) +
                                    shared_bytes<float>(2 * (Keys ? Stages * Streamed : kRows));
};

// x -> ds / scale and dp -> p, in place. stats: of the tile's queries, for this warp's first row
// (column, where rows are keys); lse * kLog2E and delta, see kernels/cuda/attention.h.
template <class Tile, int CT>
__device__ __forceinline__ void score_gradients(float (&x)[Tile::kRT][CT][4],
                                                float (&dp)[Tile::kRT][CT][4],
                                                const Smem<float>& stats, float scale) {
#pragma unroll
  for (int r = 0; r < Tile::kRT; ++r)
#pragma unroll
    for (int c = 0; c < CT; ++c)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        Words<4> s;  // of the two columns
        if constexpr (Tile::kOfKeys) {
          s = load_words<4>(stats + 2 * (8 * c + lane_id() % 4 * 2));
        } else {
          const Words<2> row = load_words<2>(stats + 2 * (16 * r + 8 * half + lane_id() / 4));
          s = {{row.w[0], row.w[1], row.w[0], row.w[1]}};
        }
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const float lse = std::bit_cast<float>(s.w[2 * i]);
          const float delta = std::bit_cast<float>(s.w[2 * i + 1]);
          float& score = x[r][c][2 * half + i];
          float& gradient = dp[r][c][2 * half + i];
          const float p = fast_exp2(fmaf(score, scale, -lse));
          score = p * (gradient - delta);
          gradient = p;
        }
      }
}

template <class Tile>
__global__ void __launch_bounds__(Tile::kThreads)
    attention_backward_kernel(Global<const bf16> qkv, Global<const bf16> d_o,
                              Global<const float> stats, Global<bf16> dqkv, AttentionProblem p) {
  constexpr bool kOfKeys = Tile::kOfKeys;
  constexpr int kD = Tile::kColumns, kRT = Tile::kRT, kRows = Tile::kRows, kT = Tile::kThreads;
  constexpr int kC = Tile::kStreamed, kTile = kC * kPitch<kD>, kStages = Tile::kStages;
  SharedMemory shared;
  const Smem<bf16> a = shared.take<bf16>(kRows * kPitch<kD>);
  const Smem<bf16> a2 = shared.take<bf16>(kRows * kPitch<kD>);
  const Smem<bf16> b = shared.take<bf16>(kStages * kTile), b2 = shared.take<bf16>(kStages * kTile);
  const Smem<bf16> ds = shared.take<bf16>(kRows * kPitch<kC>);
  const Smem<bf16> weights = shared.take<bf16>(kOfKeys ? kRows * kPitch<kC> : 0);
  const Smem<float> query = shared.take<float>(2 * (kOfKeys ? kStages * kC : kRows));
  const int row = warp_id() / Tile::kWN * Tile::kWarpRows;
  const int column = warp_id() % Tile::kWN * Tile::kWarpColumns;  // of the sums

  const AttentionRows mine(p, static_cast<int>(blockIdx.x), kRows);
  const int64_t width = p.width(), stride = 3 * width;
  const Global<const bf16> tokens = qkv + p.at(mine.unit, stride);
  const Global<const bf16> gradients = d_o + p.at(mine.unit, width);
  const Global<const float> unit_stats = stats + int64_t{mine.unit} * p.padded() * 2;
  const auto load_stats = [&](const Smem<float>& to, int first, int count) {
    const int i = 4 * static_cast<int>(threadIdx.x);
    if (i < 2 * count) copy_async(to + i, unit_stats + (2 * first + i));
  };
  const auto load_streamed = [&](int first) {
    const int stage = first / kC % kStages, count = p.tokens - first;
    copy_rows<kC, kD, kT>(b + stage * kTile, tokens + (first * stride + (kOfKeys ? 0 : width)),
                          stride, count, p.head_dim);
    if constexpr (kOfKeys) {
      copy_rows<kC, kD, kT>(b2 + stage * kTile, gradients + first * width, width, count,
                            p.head_dim);
      load_stats(query + 2 * stage * kC, first, kC);
    } else {
      copy_rows<kC, kD, kT>(b2 + stage * kTile, tokens + (first * stride + 2 * width), stride,
                            count, p.head_dim);
    }
    copy_async_commit();
  };
  copy_rows<kRows, kD, kT>(a, tokens + (mine.first * stride + (kOfKeys ? width : 0)), stride,
                           mine.count, p.head_dim);
  if constexpr (kOfKeys) {
    copy_rows<kRows, kD, kT>(a2, tokens + (mine.first * stride + 2 * width), stride, mine.count,
                             p.head_dim);
  } else {
    copy_rows<kRows, kD, kT>(a2, gradients + mine.first * width, width, mine.count, p.head_dim);
    load_stats(query, mine.first, kRows);
  }
  load_streamed(0);

  float sum[kRT][Tile::kWarpColumns / 8][4], sum2[kOfKeys ? kRT : 1][Tile::kWarpColumns / 8][4];
  clear(sum);
  clear(sum2);
  for (int first = 0; first < p.tokens; first += kC) {
    const int stage = first / kC % kStages;
    copy_async_wait<0>();
    block_sync();  // this stage is here; ds, weights and the other stage are free
    if (kStages > 1 && first + kC < p.tokens) load_streamed(first + kC);
    float x[kRT][Tile::kWarpStreamed / 8][4], dp[kRT][Tile::kWarpStreamed / 8][4];
    clear(x);
    clear(dp);
    const int score = warp_id() % Tile::kWN * Tile::kWarpStreamed;
    multiply_transposed<kD>(x, a + row * kPitch<kD>, b + (stage * kTile + score * kPitch<kD>));
    multiply_transposed<kD>(dp, a2 + row * kPitch<kD>, b2 + (stage * kTile + score * kPitch<kD>));
    if (!kOfKeys && p.tokens - first < kC) mask_columns(x, p.tokens - first - score);
    score_gradients<Tile>(x, dp, query + 2 * (kOfKeys ? stage * kC + score : row),
                          p.scale * kLog2E);
    put<kC>(ds + (row * kPitch<kC> + score), x);
    if constexpr (kOfKeys) put<kC>(weights + (row * kPitch<kC> + score), dp);
    block_sync();
    multiply<kC, kD>(sum, ds + row * kPitch<kC>, b + (stage * kTile + column));
    if constexpr (kOfKeys)
      multiply<kC, kD>(sum2, weights + row * kPitch<kC>, b2 + (stage * kTile + column));
    if (kStages == 1 && first + kC < p.tokens) {
      block_sync();  // b and b2 are free
      load_streamed(first + kC);
    }
  }

#pragma unroll
  for (int r = 0; r < kRT; ++r)
#pragma unroll
    for (int c = 0; c < Tile::kWarpColumns / 8; ++c)
#pragma unroll
      for (int i = 0; i < 4; ++i) sum[r][c][i] *= p.scale;
  // a and a2 were last read before the loop's last barrier.
  put<kD>(a + (row * kPitch<kD> + column), sum);
  if constexpr (kOfKeys) put<kD>(a2 + (row * kPitch<kD> + column), sum2);
  block_sync();
  const Global<bf16> to = dqkv + (p.at(mine.unit, stride) + mine.first * stride);
  store_rows<kRows, kD, kT>(to + (kOfKeys ? width : 0), stride, a, mine.count, p.head_dim);
  if constexpr (kOfKeys)
    store_rows<kRows, kD, kT>(to + 2 * width, stride, a2, mine.count, p.head_dim);
}

template <class Tile>
void run_tile(const AttentionProblem& p, const bf16* qkv, const bf16* d_o, const float* stats,
              bf16* dqkv, void* stream) {
  launch<attention_backward_kernel<Tile>>(
      {.grid_x = p.blocks(Tile::kRows), .block = Tile::kThreads, .shared = Tile::kShared}, stream,
      qkv, d_o, stats, dqkv, p);
}

template <class Queries, class Keys>
void run(const AttentionProblem& p, const bf16* qkv, const bf16* d_o, const float* stats,
         bf16* dqkv, void* stream) {
  run_tile<Queries>(p, qkv, d_o, stats, dqkv, stream);
  run_tile<Keys>(p, qkv, d_o, stats, dqkv, stream);
}

template <class Queries, class Keys>
AttentionBackward<bf16> if_they_fit(size_t shared_bytes) {
  const bool fit = Queries::kShared <= shared_bytes && Keys::kShared <= shared_bytes;
  return fit ? run<Queries, Keys> : nullptr;
}

}  // namespace

// At 256 columns, queries: 4 warps and 105 KB, so that two blocks share an SM; keys: the sums of 64
// rows fill the registers of 8 warps, so the next tile is fetched behind this one instead, where
// there is room for two (217 KB; an A100 has 163).
AttentionBackward<bf16> tensor_attention_backward(int head_dim, size_t shared_bytes) {
  if (head_dim <= 64)
    return if_they_fit<BackwardTile<false, 64, 4, 1, 1, 64, 1>,
                       BackwardTile<true, 64, 4, 1, 1, 64, 1>>(shared_bytes);
  if (head_dim <= 128)
    return if_they_fit<BackwardTile<false, 128, 4, 1, 1, 64, 1>,
                       BackwardTile<true, 128, 4, 1, 2, 64, 1>>(shared_bytes);
  if (head_dim <= 256) {
    using Queries = BackwardTile<false, 256, 2, 2, 2, 32, 1>;
    const auto ahead = if_they_fit<Queries, BackwardTile<true, 256, 2, 2, 4, 64, 2>>(shared_bytes);
    if (ahead != nullptr) return ahead;
    return if_they_fit<Queries, BackwardTile<true, 256, 2, 2, 4, 64, 1>>(shared_bytes);
  }
  return if_they_fit<BackwardTile<false, 512, 4, 1, 2, 32, 1>,
                     BackwardTile<true, 512, 2, 1, 4, 64, 1>>(shared_bytes);
}

}  // namespace ddpm::cuda
