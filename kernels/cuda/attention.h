// What the files of attention share on the host: the shape as kernels see it, and the ways of
// computing it. Units are heads of images; lse and stats have a row per unit.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/bf16.h"

namespace ddpm::cuda {

struct AttentionProblem {
  int units, tokens, heads, head_dim;
  float scale;

  constexpr int width() const { return heads * head_dim; }
  // Tokens of a unit's row of stats: whole tiles of any kernel.
  constexpr int padded() const { return (tokens + 63) / 64 * 64; }
  constexpr int64_t stats_count() const { return int64_t{units} * padded() * 2; }
  constexpr unsigned blocks(int rows) const {
    return static_cast<unsigned>(units) * static_cast<unsigned>((tokens + rows - 1) / rows);
  }
  // Where a unit begins in a tensor of `columns` per token.
  constexpr int64_t at(int unit, int64_t columns) const {
    return int64_t{unit / heads} * tokens * columns + int64_t{unit % heads} * head_dim;
  }
};

// The rows of a unit that a block works on.
struct AttentionRows {
  int unit, first, count;
  constexpr AttentionRows(const AttentionProblem& p, int block, int rows)
      : unit(block / ((p.tokens + rows - 1) / rows)),
        first(block % ((p.tokens + rows - 1) / rows) * rows),
        count(p.tokens - first < rows ? p.tokens - first : rows) {}
};

inline constexpr float kLog2E = 1.44269504f, kLn2 = 0.693147181f;

// stats (units, padded, 2), per query: lse (times kLog2E for the tensor cores) and the sum over
// keys of p dp, which is do . o; (infinity, 0) behind the last token, so that p and ds are 0 there.
template <typename T>
using AttentionForward = void (*)(const AttentionProblem&, const T* qkv, T* o, float* lse,
                                  void* stream);
template <typename T>
using AttentionBackward = void (*)(const AttentionProblem&, const T* qkv, const T* d_o,
                                   const float* stats, T* dqkv, void* stream);

// On tensor cores: head_dim a multiple of 8, at most kMaxTensorHead; null where a block would need
// more than shared_bytes.
inline constexpr int kMaxTensorHead = 512;
AttentionForward<bf16> tensor_attention_forward(int head_dim, size_t shared_bytes);
AttentionBackward<bf16> tensor_attention_backward(int head_dim, size_t shared_bytes);

// In fp32 without tensor cores, any shape.
template <typename T>
void plain_attention_forward(const AttentionProblem&, const T* qkv, T* o, float* lse, void* stream);
template <typename T>
void plain_attention_backward(const AttentionProblem&, const T* qkv, const T* d_o,
                              const float* stats, T* dqkv, void* stream);

}  // namespace ddpm::cuda
