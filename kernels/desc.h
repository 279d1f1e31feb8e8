// What a call is asked for: shapes and constants, fixed at build time.
// Shape letters: N batch, H W input, P Q output, C in-channels, K out-channels, R S filter,
// G groups, L tokens, D head width. Activations are (N,H,W,C), filters (K,R,S,C).
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

#include "kernels/dtype.h"
#include "kernels/shape.h"

namespace ddpm {

// Inverted dropout: keeps an element with probability 1 - p and divides it by that. The decisions
// are Philox draws at (step state's seed and step, position in the whole batch, layer), 16 bits per
// element, so backward draws the same ones.
struct Dropout {
  float p = 0;         // 0 = none; < 1
  uint16_t layer = 0;  // number of this dropout in the network

  // An element is kept if its 16 bits are >= this.
  constexpr uint32_t threshold() const { return static_cast<uint32_t>(p * 65536.0f + 0.5f); }
  friend constexpr bool operator==(const Dropout&, const Dropout&) = default;
};

// What happens to a tensor on its way into a consumer, in this order:
// z = x * scale[n,c] + shift[n,c], SiLU(z), dropout.
struct Transform {
  bool affine = false;
  bool silu = false;
  Dropout dropout;

  constexpr bool any() const { return affine || silu || dropout.p > 0; }
  friend constexpr bool operator==(const Transform&, const Transform&) = default;
};

// 2-D convolution (cross-correlation) with everything that can be fused into it. Order: concatenate
// x and x2 along C, transform, upsample, convolve, then add what is listed below. Padding is zero
// *after* the transform.
struct ConvDesc {
  Shape x;                // first input as stored (N,H,W,C1)
  int c2 = 0;             // channels of a second input (N,H,W,c2), behind x's
  Transform transform;    // of the concatenation
  bool upsample = false;  // nearest x2 on read
  int k = 0;
  int r = 3, s = 3, stride = 1;
  int pad_top = 1, pad_left = 1, pad_bottom = 1, pad_right = 1;
  bool bias = false;  // y += bias[k]
  // y[n,:,:,k] += sample_bias[n * sample_bias_stride + sample_bias_offset + k]; stride 0 = none.
  int sample_bias_stride = 0, sample_bias_offset = 0;
  bool residual = false;  // y += residual (N,P,Q,K)
  int shortcut_c = 0,
      shortcut_c2 = 0;      // y += 1x1 convolution of (shortcut ++ shortcut2), (N,P,Q,.)
  bool statistics = false;  // also write y's statistics, see StatsDesc
  // The taps' input (behind its transform) and filter are E4M3 (Micikevicius et al. 2022): their
  // sum counts x_scale * filter_scale[k]. The place is kept; no backend takes it yet.
  bool e4m3 = false;

  constexpr int c() const { return x.c + c2; }
  constexpr int in_h() const { return upsample ? 2 * x.h : x.h; }
  constexpr int in_w() const { return upsample ? 2 * x.w : x.w; }
  constexpr int p() const { return (in_h() + pad_top + pad_bottom - r) / stride + 1; }
  constexpr int q() const { return (in_w() + pad_left + pad_right - s) / stride + 1; }
  constexpr Shape y() const { return {x.n, p(), q(), k}; }
  constexpr Shape filter() const { return {k, r, s, c()}; }
  // Taps, biases and a residual: what every backend must take.
  constexpr bool basic() const {
    return c2 == 0 && !transform.any() && !upsample && shortcut_c == 0 && !statistics && !e4m3;
  }
  friend constexpr bool operator==(const ConvDesc&, const ConvDesc&) = default;
};

enum class ConvPass { kForward, kDgrad, kWgrad };

// c (m,n) = op(a) op(b) [+ bias[n]] [+ residual (m,n)], `batch` times over consecutive matrices.
// Row-major; a is (m,k), or (k,m) when transposed; b is (k,n), or (n,k) when transposed.
struct GemmDesc {
  int m = 0, n = 0, k = 0, batch = 1;
  bool transpose_a = false, transpose_b = false;
  bool bias = false, residual = false;
  DType in = DType::kF32, out = DType::kF32;  // of a and b, of c and residual
  friend constexpr bool operator==(const GemmDesc&, const GemmDesc&) = default;
};

// Per (n, tile, c) of a tensor: mean and M2 = sum of squared deviations over a tile of `tile`
// consecutive pixels (the last may be shorter), as (N, tiles, C, 2) fp32. Never a sum of squares:
// at mean/std 1000 that loses the variance in fp32.
struct StatsDesc {
  Shape x;
  int tile = 64;

  constexpr int tiles() const { return static_cast<int>((x.pixels() + tile - 1) / tile); }
  constexpr int64_t count() const { return int64_t{x.n} * tiles() * x.c * 2; }
};

// GroupNorm (Wu & He 2018) of the concatenation of x and x2 (channels of one group may come from
// both), biased variance, affine; then Transform::silu and dropout.
struct GroupNormDesc {
  Shape x;
  int c2 = 0;
  int groups = 1;
  float epsilon = 1e-6f;
  bool silu = false;
  Dropout dropout;
  int tile = 64;  // of the statistics it reads

  constexpr int c() const { return x.c + c2; }
  constexpr Shape shape() const { return {x.n, x.h, x.w, c()}; }
};

// Where a result of C channels goes: columns [offset, offset + C) of a tensor of `channels`
// channels, which other calls fill beside it.
struct Columns {
  int channels = 0, offset = 0;

  constexpr bool hold(int c) const { return c > 0 && offset >= 0 && c <= channels - offset; }
};

// The largest value, or the mean, of each window's pixels that lie in the image: padding is no
// value.
struct PoolDesc {
  Shape x;
  bool average = false;
  int r = 3, s = 3, stride = 1, pad = 0;  // pad < r, s: no window is empty

  constexpr int p() const { return (x.h + 2 * pad - r) / stride + 1; }
  constexpr int q() const { return (x.w + 2 * pad - s) / stride + 1; }
  constexpr Shape y() const { return {x.n, p(), q(), x.c}; }
  constexpr bool valid() const {
    return x.positive() && r > 0 && s > 0 && stride > 0 && pad >= 0 && pad < r && pad < s &&
           x.h + 2 * pad >= r && x.w + 2 * pad >= s;
  }
};

// Self-attention over tokens: o = softmax(q k^T scale) v per image and head. qkv is (N, L,
// 3*heads*D), a token's row being q, k, v, each heads*D wide; o is (N, L, heads*D).
struct AttentionDesc {
  int n = 1, tokens = 1, heads = 1, head_dim = 1;
  constexpr int width() const { return heads * head_dim; }
  float scale() const { return static_cast<float>(1.0 / std::sqrt(static_cast<double>(head_dim))); }
};

// Sinusoidal embedding of a timestep (Vaswani et al. 2017; DDPM's halves): freq_i =
// exp(-ln(10000) i / (half - freq_shift)), [sin, cos], or [cos, sin] if flip_sin_to_cos; an odd
// dim ends in a zero.
struct TimeEmbeddingDesc {
  int n = 1, dim = 0, timesteps = 1000;
  bool flip_sin_to_cos = false;
  float freq_shift = 1;
};

// Training batch from a resident uint8 data set (count,H,W,C): position p = step * step_images +
// first_image + i of the endless sequence of epochs, each a keyed permutation; flipped horizontally
// with probability 1/2 if asked; x0 = u8 / 127.5 - 1. A label becomes null_label with probability
// label_dropout, for guidance (Ho & Salimans 2022).
struct GatherDesc {
  Shape batch;
  int64_t count = 0;  // images in the data set
  bool flip = false;
  int step_images = 0;  // of the whole step, of which the batch is a part; 0 = batch.n
  double label_dropout = 0;
  int32_t null_label = 0;

  // `bits`: of the image's label.
  constexpr int32_t label(int32_t own, uint32_t bits) const {
    return static_cast<double>(bits) < label_dropout * 0x1p32 ? null_label : own;
  }
  constexpr uint64_t images_per_step() const {
    return static_cast<uint64_t>(step_images > 0 ? step_images : batch.n);
  }
};

// DDPM eq. 4: x_t = sqrt_ab[t] x0 + sqrt_1mab[t] eps. The table (timesteps, 2) holds both factors.
struct NoiseDesc {
  Shape x;
  int timesteps = 0;
  DType out = DType::kF32;  // of x_t
};

// A training batch and its noising at once.
struct NoisyBatchDesc {
  GatherDesc gather;
  int timesteps = 0;
};

// What a network is trained for: the mean square of its error (DDPM, eq. 14), the variational bound
// (eq. 5), or both, the bound by the variance alone (Nichol & Dhariwal 2021, eq. 16).
enum class LossKind { kSimple, kKl, kHybrid };

// Of a timestep. The mean of p(x_{t-1} | x_t) misses the true one by mean (output - target); its
// log-variance is log_variance + excess + excess_slope v, with v the output's second half.
struct LossFactors {
  float mean = 0;
  float log_variance = 0;  // of q(x_{t-1} | x_t, x_0)
  float excess = 0, excess_slope = 0;
};
static_assert(sizeof(LossFactors) == 16);

struct DiffusionLossDesc {
  Shape x;  // of the images
  LossKind loss = LossKind::kSimple;
  bool variance = false;  // the prediction has 2 C channels: mean and variance
  int timesteps = 0;
  int step_images = 0;  // of the whole step, of which these are a part
};

// Losses of a timestep that are kept for drawing timesteps by them, the latest in turn; behind them
// stands their number, which goes on from 2 kLossHistory - 1 at kLossHistory.
inline constexpr int kLossHistory = 10;
inline constexpr int kLossHistoryRow = kLossHistory + 1;

// One row of a sampler: every sampler is this with other numbers. The host computes rows in double.
//   x0 = clamp(x0_x x + x0_out out, -clip, clip)
//   x' = x_x x + x_x0 x0 + x_out out + x_previous previous + sigma z,   previous = x0 of the row
//   before; sigma = x_z, times exp(z_log + z_out v) where the output has a second half, v
// z is drawn only where x_z != 0.
struct SamplerRow {
  int32_t t = 0;  // what the network is told, and the noise's address
  float x0_x = 0, x0_out = 0, clip = std::numeric_limits<float>::infinity();
  float x_x = 0, x_x0 = 0, x_out = 0, x_previous = 0, x_z = 0;
  float z_log = 0, z_out = 0;
};

// The image in a slot of a sampled batch, in the backend's memory. Slots need not be in the same
// row, or of one chain: each takes rows first_row, ..., first_row + rows - 1 of the table in the
// steps from `start` on, and is idle before and after.
struct ChainSlot {
  uint64_t seed = 0, image = 0;  // what its noise is addressed by
  int64_t start = 0;             // the state's step of its first row
  int32_t first_row = 0, rows = 0;
  float guidance = 1;  // of a guided batch: see SamplerDesc

  // Its row in a step, -1: idle.
  constexpr int64_t row(uint64_t step) const {
    const int64_t done = static_cast<int64_t>(step) - start;
    return done >= 0 && done < rows ? first_row + done : -1;
  }
};
static_assert(sizeof(ChainSlot) == 40);

struct SamplerDesc {
  Shape x;
  bool variance = false;  // the output has 2 C channels, of which the first half is `out`
  // The output is that of 2 N images, the second N without their classes, and `out` is theirs +
  // guidance (the first N's - theirs) by the slot's guidance, while v is the first N's (Ho &
  // Salimans 2022, eq. 6 with guidance = 1 + w). At 1 `out` is the first N's, to the bit.
  bool guided = false;
  bool watch = true;  // a value that is not finite sets the state's flag
};

// torch.optim.Adam with eps after the bias correction, one clip of the gradient's norm as
// clip_grad_norm_, linear warm-up and cool-down, then EMA of the updated weights.
struct AdamDesc {
  int64_t count = 0;
  // lr(n) = learning_rate * min(n / warmup_steps, 1) * min((steps - n) / cooldown_steps, 1) for
  // n = 0 .. steps - 1, then 0.
  float learning_rate = 2e-4f;
  int64_t warmup_steps = 0;               // 0 = none
  int64_t steps = 0, cooldown_steps = 0;  // 0 cooldown_steps = none; `steps` is then not read
  // In double: 1 - 0.9999f is off by 2e-4 of itself.
  double beta1 = 0.9, beta2 = 0.999, epsilon = 1e-8;
  float grad_clip = 1;  // 0 = none
  double ema_decay = 0.9999;
};

}  // namespace ddpm
