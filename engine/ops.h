// The operations a model is written in. Each appends its forward steps to the graph and puts its
// backward on the tape; its shape rule and both directions stand in one file of engine/ops/.
// Parameters are named by the graph's scope and the given name, as in diffusers' checkpoints.
#pragma once

#include <array>
#include <memory>
#include <string>
#include <vector>

#include "engine/graph.h"

namespace ddpm::ops {

// A group norm that has been worked out but not written: z = x * scale + shift.
struct Norm {
  GroupNormDesc desc;
  Tensor scale_shift;  // (N,C,2)
  Tensor mean_rstd;    // (N,G,2)
  // Set by the consumer's backward where the gradient of the view's value is that at z, before SiLU
  // and dropout, and summed: Backend::conv_dgrad_norm.
  Tensor gradient_sums;
};

// What a consumer reads: up to two stored tensors, concatenated along C, normalised, upsampled.
// Only a consumer that cannot read it so has it written out (materialize).
struct View {
  Tensor x, x2;
  // Stands for the viewed value in gradients; has no memory. x itself where nothing is done to x.
  Tensor value;
  std::shared_ptr<Norm> norm;
  bool upsampled = false;

  View() = default;
  View(Tensor t) : x(t), value(t) {}  // NOLINT: a tensor is a view of itself
  bool plain() const { return value == x; }
};

// (h ++ skip) along channels; h first.
View concat(Graph& g, Tensor h, Tensor skip);

// Nearest, x2.
View upsample(Graph& g, Tensor x);

struct GroupNormOptions {
  int groups = 32;
  float epsilon = 1e-6f;
  bool silu = true;
  float dropout = 0;  // in training only
};
// GroupNorm, SiLU, dropout: paper appendix B; Wu & He 2018.
View group_norm_silu(Graph& g, const View& x, const std::string& name, const GroupNormOptions&);

// x in another type; x itself if it is of that type.
Tensor cast(Graph& g, Tensor x, DType);

// y (2N,H,W,C) = x, and x again. Sampling only.
Tensor twice(Graph& g, Tensor x);

// Writes the view out, if it is not a plain tensor. In the backward pass call it again rather than
// keep the result: the activated copy is cheaper to recompute than to hold.
Tensor materialize(Graph& g, const View& v);

// What a convolution reads in the view's place: d's input, and the slots of the stored tensors.
void describe_input(Graph& g, const View& v, ConvDesc& d, ConvSlots& slots);

// A (N, stride) table of which columns [offset, offset + K) are added to every pixel of image n.
struct SampleBias {
  Tensor table;
  int offset = 0;
};

struct ConvOptions {
  int k = 0;
  int kernel = 3, kernel_w = 0, stride = 1;  // kernel_w 0: a square
  std::array<int, 4> pad{1, 1, 1, 1};        // top, left, bottom, right
  bool statistics = true;                    // of y, for a group norm
  Init init = Init::kGlorot;
  SampleBias sample_bias;
  Tensor residual;  // (N,P,Q,K), added to the output
  View shortcut;    // (N,P,Q,.), added through a 1x1 convolution of its own, `shortcut_name`
  std::string shortcut_name;

  int width() const { return kernel_w > 0 ? kernel_w : kernel; }
};
// y (N,P,Q,K)
Tensor conv(Graph& g, const View& x, const std::string& name, const ConvOptions&);

// Layers that are computed as one product: consecutive rows of one weight.
struct LinearPart {
  std::string name;
  int rows = 0;
};
struct LinearOptions {
  Init init = Init::kGlorot;
  Tensor residual;  // of the output's shape
};
// y (N,H,W,K) = x (N,H,W,C) w^T + b, K the rows of all parts.
Tensor linear(Graph& g, const View& x, const std::string& name, const std::vector<LinearPart>&,
              const LinearOptions& = {});

// softmax(q k^T / sqrt(D)) v over the pixels of each image. qkv (N,H,W,3C) -> (N,H,W,C).
Tensor attention(Graph& g, Tensor qkv, int heads);

Tensor silu(Graph& g, Tensor x);

// Channels [offset, offset + C) of a tensor that several results are written into side by side:
// their concatenation.
struct Part {
  Tensor tensor;
  int offset = 0;
};
// max(x, 0), and the largest or mean value of windows (d.x is the graph's), as a tensor of their
// own or as `to`. Inference only.
Tensor relu(Graph& g, Tensor x, const Part& to = {});
Tensor pool(Graph& g, Tensor x, PoolDesc d, const Part& to = {});
// x F32 (N,H,W,C) -> (N,h,w,C), bilinear. Inference only.
Tensor resize(Graph& g, Tensor x, int h, int w);

// t I32 (N) -> (N,1,1,dim); paper section 4, Vaswani et al. 2017.
Tensor time_embedding(Graph& g, Tensor t, const TimeEmbeddingDesc&);

// y (n,1,1,C) = table[state.step] for all n images; table (rows,1,1,C). Sampling only.
Tensor step_row(Graph& g, Tensor table, int n);

// y (n,1,1,C) = table[index]; index I32 (n), table (rows,1,1,C). Sampling only.
Tensor table_rows(Graph& g, Tensor table, Tensor index);

// y = x + table[index]: adds a learned row to x (N,1,1,dim), in place.
Tensor add_embedding(Graph& g, Tensor x, Tensor index, int rows, const std::string& name);

// Squared error of prediction and target into the state's loss, its mean over the images of the
// whole step, of which these are a part; starts the backward pass. Returns each image's loss (N).
Tensor mse_loss(Graph& g, Tensor prediction, Tensor target, int step_images);
// The same against this step's noise, which is drawn again where the backend can or `noise` is
// absent.
Tensor noise_loss(Graph& g, Tensor prediction, Tensor noise, int step_images);

// What a loss compares a prediction with, see Backend::diffusion_loss.
struct LossInputs {
  Tensor target, x0, timestep, factors, weight;
};
// Any loss into the state's, and the start of the backward pass. Returns each image's loss (N).
Tensor diffusion_loss(Graph& g, const DiffusionLossDesc&, Tensor prediction, const LossInputs&);

}  // namespace ddpm::ops
