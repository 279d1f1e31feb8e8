// What the three passes share on the host: checks, and kernel arguments from descs and slots.
#pragma once

#include <initializer_list>
#include <limits>

#include "kernels/cuda/conv.h"
#include "kernels/cuda/conv_epilogue.h"
#include "kernels/cuda/conv_tile.h"

namespace ddpm::cuda {

inline void check_conv(const ConvDesc& d, const char* op) {
  DDPM_CHECK(d.x.positive() && d.c2 >= 0 && d.k > 0, "%s: x %s, c2 %d, k %d", op,
             to_string(d.x).c_str(), d.c2, d.k);
  DDPM_CHECK(d.r > 0 && d.s > 0 && d.stride > 0 && d.pad_top >= 0 && d.pad_left >= 0 &&
                 d.pad_bottom >= 0 && d.pad_right >= 0,
             "%s: filter %dx%d, stride %d, pads %d %d %d %d", op, d.r, d.s, d.stride, d.pad_top,
             d.pad_left, d.pad_bottom, d.pad_right);
  DDPM_CHECK(
      d.in_h() + d.pad_top + d.pad_bottom >= d.r && d.in_w() + d.pad_left + d.pad_right >= d.s,
      "%s: a %dx%d filter does not fit %s", op, d.r, d.s, to_string(d.x).c_str());
  DDPM_CHECK(d.x.n * d.x.pixels() * 4 <= std::numeric_limits<int>::max() &&
                 d.x.n * d.y().pixels() <= std::numeric_limits<int>::max(),
             "%s: %s has too many pixels", op, to_string(d.x).c_str());
  DDPM_CHECK(d.filter().count() <= std::numeric_limits<int>::max() / 2, "%s: filter %s", op,
             to_string(d.filter()).c_str());
  DDPM_CHECK(d.sample_bias_stride == 0 ||
                 (d.sample_bias_offset >= 0 && d.sample_bias_offset + d.k <= d.sample_bias_stride),
             "%s: sample bias %d + %d of stride %d", op, d.sample_bias_offset, d.k,
             d.sample_bias_stride);
  DDPM_CHECK(d.shortcut_c >= 0 && d.shortcut_c2 >= 0 && (d.shortcut_c > 0 || d.shortcut_c2 == 0),
             "%s: shortcut of %d and %d channels", op, d.shortcut_c, d.shortcut_c2);
}

// The input's slots are those of the desc.
inline void check_input(const ConvDesc& d, const ConvSlots& s, const char* op) {
  const Transform& t = d.transform;
  DDPM_CHECK(s.x && (d.c2 > 0) == static_cast<bool>(s.x2) && (!t.affine || s.scale_shift) &&
                 (t.dropout.p <= 0 || s.state),
             "%s: x, x2, scale_shift and state must be present as the desc says", op);
  DDPM_CHECK(t.dropout.p >= 0 && t.dropout.p < 1, "%s: dropout %g", op,
             static_cast<double>(t.dropout.p));
}

inline void add_input_reads(const ConvDesc& d, const ConvSlots& s, Call& call) {
  call.reads.push_back(s.x);
  if (d.c2 > 0) call.reads.push_back(s.x2);
  if (d.transform.affine) call.reads.push_back(s.scale_shift);
  if (d.transform.dropout.p > 0) call.reads.push_back(s.state);
}

// From x to y.
inline ConvTiles forward_tiles(const ConvDesc& d, int rows) {
  ConvTiles t;
  t.images = d.x.n;
  t.p = d.p();
  t.q = d.q();
  t.h = d.x.h;
  t.w = d.x.w;
  t.in_h = d.in_h();
  t.in_w = d.in_w();
  t.shrink = d.upsample ? 2 : 1;
  t.r = d.r;
  t.s = d.s;
  t.stride = d.stride;
  t.pad_top = d.pad_top;
  t.pad_left = d.pad_left;
  lay_tiles(t, rows);
  return t;
}

// From dy to dx: a convolution of dy, spread out by the stride, with the filter turned round.
inline ConvTiles dgrad_tiles(const ConvDesc& d, int rows) {
  ConvTiles t;
  t.images = d.x.n;
  t.p = d.x.h;
  t.q = d.x.w;
  t.h = d.p();
  t.w = d.q();
  t.in_h = (d.p() - 1) * d.stride + 1;
  t.in_w = (d.q() - 1) * d.stride + 1;
  t.shrink = d.stride;
  t.dilated = d.stride > 1;
  t.r = d.r;
  t.s = d.s;
  t.pad_top = d.r - 1 - d.pad_top;
  t.pad_left = d.s - 1 - d.pad_left;
  lay_tiles(t, rows);
  return t;
}

template <typename T>
ConvInput<T> make_input(const ConvDesc& d, const ConvSlots& s, const Run& r) {
  ConvInput<T> in;
  in.x = r.in<T>(s.x);
  in.c1 = d.x.c;
  in.c2 = d.c2;
  in.pixels = static_cast<int>(d.x.pixels());
  in.aligned = in.c1 % 8 == 0 && in.c2 % 8 == 0;
  if (d.c2 > 0) in.x2 = r.in<T>(s.x2);
  in.affine = d.transform.affine;
  in.silu = d.transform.silu;
  if (in.affine) in.scale_shift = r.in<float>(s.scale_shift);
  if (d.transform.dropout.p > 0) {
    in.state = r.in<StepState>(s.state);
    in.threshold = d.transform.dropout.threshold();
    in.factor = 1.0f / (1.0f - d.transform.dropout.p);
    in.layer = d.transform.dropout.layer;
  }
  return in;
}

// A tensor read as it is.
template <typename T>
ConvInput<T> plain_input(const T* x, int channels, int64_t pixels) {
  ConvInput<T> in;
  in.x = x;
  in.c1 = channels;
  in.pixels = static_cast<int>(pixels);
  in.aligned = channels % 8 == 0;
  return in;
}

template <typename T>
ConvInput<T> make_shortcut(const ConvDesc& d, const ConvSlots& s, const Run& r) {
  ConvInput<T> in = plain_input(r.in<T>(s.shortcut), d.shortcut_c, d.y().pixels());
  in.c2 = d.shortcut_c2;
  if (in.c2 > 0) in.x2 = r.in<T>(s.shortcut2);
  in.aligned = in.c1 % 8 == 0 && in.c2 % 8 == 0;
  return in;
}

template <typename T>
ConvOutput<T> make_output(const ConvDesc& d, const ConvSlots& s, const Run& r, Out y,
                          Out statistics) {
  ConvOutput<T> o;
  o.y = r.out<T>(y);
  o.k = d.k;
  if (d.bias) o.bias = r.in<float>(s.bias);
  if (d.shortcut_c > 0 && s.shortcut_bias) o.shortcut_bias = r.in<float>(s.shortcut_bias);
  if (d.sample_bias_stride > 0) {
    o.sample_bias = r.in<float>(s.sample_bias) + d.sample_bias_offset;
    o.sample_bias_stride = d.sample_bias_stride;
  }
  if (d.residual) o.residual = r.in<T>(s.residual);
  if (d.statistics) o.statistics = r.out<float>(statistics);
  return o;
}

// Where a gradient by the input goes. With a norm it is led back to before that.
struct GradientSlots {
  Out dx;
  Write write = Write::kOverwrite;
  int groups = 0;  // of the norm; 0 = none
  In mean_rstd;
  Out sums;
};

template <typename T>
ConvOutput<T> gradient_output(const ConvDesc& d, const ConvSlots& s, const GradientSlots& to,
                              const Run& r) {
  ConvOutput<T> o;
  o.y = r.out<T>(to.dx);
  o.k = d.c();
  o.accumulate = to.write == Write::kAccumulate;
  if (to.groups == 0) return o;
  o.norm.in = make_input<T>(d, s, r);
  o.norm.mean_rstd = r.in<float>(to.mean_rstd);
  o.norm.groups = to.groups;
  o.norm.group_channels = d.c() / to.groups;
  o.norm.sums = r.out<float>(to.sums);
  return o;
}

// Where the sums of dy over each image's pixels go: slot[n * stride + offset + k].
struct GradientSums {
  Out slot;  // absent: nowhere
  int stride = 0, offset = 0;
};

// What conv_forward, dgrad and wgrad ask of the tensor cores' and of the plain kernels. A Call's
// run and workspace are set here; nullptr where the kernel does not take it.
// How the blocks of the tensor cores' forward kernel lie.
struct ConvGrid {
  int blocks = 0, splits = 1;
  int columns = 0;  // output channels of a block
  size_t shared = 0;
};
struct ConvPlan {
  size_t workspace = 0;
  std::function<void(const Run&)> run;
  ConvGrid grid{};
};
ConvPlan tensor_forward(size_t shared_bytes, const ConvDesc&, const ConvSlots&, Out y,
                        Out statistics, bool batch_invariant);
ConvPlan tensor_dgrad(size_t shared_bytes, const ConvDesc&, const ConvSlots&, In dy,
                      const GradientSlots&);
ConvPlan tensor_wgrad(size_t shared_bytes, const ConvDesc&, const ConvSlots&, In dy, Out dfilter,
                      Write, const GradientSums& = {});
// Nothing where chip.wgmma_blocks is 0.
ConvPlan hopper_forward(const ConvChip& chip, const ConvDesc&, const ConvSlots&, Out y,
                        Out statistics);
ConvPlan hopper_dgrad(const ConvChip& chip, const ConvDesc&, const ConvSlots&, In dy,
                      const GradientSlots&);
ConvPlan direct_forward(DType, const ConvDesc&, const ConvSlots&, Out y, Out statistics);
ConvPlan direct_dgrad(DType, const ConvDesc&, const ConvSlots&, In dy, const GradientSlots&);
ConvPlan direct_wgrad(DType, const ConvDesc&, const ConvSlots&, In dy, Out dfilter, Write);

// dfilter (+)= the sum over splits of partial (splits, count), in order.
void launch_filter_sum(void* stream, const float* partial, float* dfilter, int64_t count,
                       int splits, Write write);
// sums[n * stride + c] = the sum over runs of partial (images, runs, channels); reduce.cu.
void launch_merge_sums(void* stream, int images, int runs, int channels, const float* partial,
                       float* sums, int stride);

}  // namespace ddpm::cuda
