// Convolution with everything around it. The backend is asked for the whole; where it declines, the
// composite of plain calls is listed instead.
#include "engine/ops.h"
#include "kernels/conv_composite.h"

namespace ddpm::ops {
namespace {

struct Filter {
  Tensor weight, bias;
};

// Of one pass over a convolution with this filter.
int64_t multiply_adds(Graph& g, const Filter& f, Tensor y) {
  return g.shape(y).count() * (g.shape(f.weight).count() / g.shape(f.weight).n);
}

Filter define_filter(Graph& g, const std::string& name, const Shape& shape, Init init) {
  const Graph::Scope scope(g, name);
  const std::string key = g.scope();
  Filter f;
  f.weight = g.parameter("weight", shape, 4, {{key + ".weight", shape.n, init}});
  f.bias = g.parameter("bias", {1, 1, 1, shape.n}, 1, {{key + ".bias", shape.n, Init::kZeros}});
  return f;
}

// The filter as this pass of the backend reads it. In inference it is packed once, at setup.
Tensor packed_filter(Graph& g, const ConvDesc& d, ConvPass pass, Tensor weight) {
  const size_t bytes = g.backend().packed_bytes(d, pass);
  weight = g.compute_weight(weight);
  if (bytes == 0) return weight;
  if (g.training()) {
    const Tensor packed = g.bytes(bytes);
    g.add(g.backend().conv_pack(d, pass, weight, packed));
    return packed;
  }
  const Tensor packed = g.persistent_bytes(bytes, "packed");
  g.add(g.backend().conv_pack(d, pass, weight, packed), Phase::kSetup);
  return packed;
}

ConvDesc plain_desc(Graph& g, const View& x, const ConvOptions& o) {
  ConvDesc d;
  d.x = g.shape(x.value);
  d.k = o.k;
  d.r = o.kernel;
  d.s = o.width();
  d.stride = o.stride;
  d.pad_top = o.pad[0];
  d.pad_left = o.pad[1];
  d.pad_bottom = o.pad[2];
  d.pad_right = o.pad[3];
  d.bias = true;
  return d;
}

void describe_addends(Graph& g, const ConvOptions& o, ConvDesc& d, ConvSlots& slots) {
  if (o.sample_bias.table) {
    d.sample_bias_stride = g.shape(o.sample_bias.table).c;
    d.sample_bias_offset = o.sample_bias.offset;
    slots.sample_bias = o.sample_bias.table;
  }
  d.residual = static_cast<bool>(o.residual);
  slots.residual = o.residual;
}

// One call for everything, if the backend has it; else a written-out input, bias and what is added,
// the shortcut as a convolution of its own.
void add_forward(Graph& g, const View& x, const Filter& f, const Filter& shortcut,
                 const ConvOptions& o, Tensor y) {
  ConvDesc d = plain_desc(g, x, o);
  ConvSlots slots;
  describe_input(g, x, d, slots);
  describe_addends(g, o, d, slots);
  if (o.shortcut.value) {
    const View& s = o.shortcut;
    const bool written = s.norm || s.upsampled;  // a desc cannot say that of a shortcut
    const View from = written ? View(materialize(g, s)) : s;
    d.shortcut_c = g.shape(from.x).c;
    d.shortcut_c2 = from.x2 ? g.shape(from.x2).c : 0;
    slots.shortcut = from.x;
    slots.shortcut2 = from.x2;
    slots.shortcut_filter = g.compute_weight(shortcut.weight);
    slots.shortcut_bias = shortcut.bias;
  }
  d.statistics = o.statistics;
  slots.bias = f.bias;
  slots.filter = f.weight;
  Tensor stats;
  if (o.statistics) stats = g.tensor({1, 1, 1, static_cast<int>(StatsDesc{d.y()}.count())});
  if (!g.backend().conv_forward(d, slots, y, stats)) {
    if (shortcut.weight) slots.shortcut_filter = shortcut.weight;
    const ConvLister lister{[&](const Shape& s) -> Out { return g.activation(s); },
                            [&](Call call) { g.add(std::move(call)); },
                            [&](const ConvDesc& plain, In filter) -> In {
                              return packed_filter(g, plain, ConvPass::kForward, {filter.slot});
                            }};
    list_forward(g.backend(), d, slots, y, lister);
    return;
  }
  slots.filter = packed_filter(g, d, ConvPass::kForward, f.weight);
  g.add_product(*g.backend().conv_forward(d, slots, y, stats),
                multiply_adds(g, f, y) + (shortcut.weight ? multiply_adds(g, shortcut, y) : 0));
  if (stats) g.set_statistics(y, stats);
}

// The gradient by a group norm's output, led on to before its SiLU and dropout, if the backend has
// it and nobody else adds to it.
bool add_gradient_at_norm(Graph& g, const View& x, const Filter& f, const ConvOptions& o,
                          Tensor dy) {
  if (!x.norm || g.grad(x.value)) return false;
  ConvDesc d = plain_desc(g, x, o);
  ConvSlots slots;
  describe_input(g, x, d, slots);
  slots.filter = g.compute_weight(f.weight);
  const Tensor dz = g.activation(x.norm->desc.shape());
  const Tensor sums =
      g.tensor({1, 1, 1, static_cast<int>(StatsDesc{x.norm->desc.shape()}.count())});
  const auto call =
      g.backend().conv_dgrad_norm(d, slots, x.norm->desc, x.norm->mean_rstd, dy, dz, sums);
  if (!call) return false;
  g.add_product(*call, multiply_adds(g, f, dy));
  g.set_grad(x.value, dz);
  x.norm->gradient_sums = sums;
  return true;
}

// Where the sums of dy over each image's pixels go.
struct PixelSums {
  Tensor tensor;
  int stride = 0, offset = 0;
};

// dw = sum over pixels of dy x, and dy's own sums where they are asked for. `x` is written out
// again where the backend cannot read it so.
void add_filter_gradient(Graph& g, const View& x, const Filter& f, const ConvOptions& o, Tensor dy,
                         const PixelSums& sums) {
  Backend& backend = g.backend();
  ConvDesc d = plain_desc(g, x, o);
  ConvSlots slots;
  describe_input(g, x, d, slots);
  const GradOut dw = g.grad_out(f.weight);
  std::optional<Call> call;
  if (sums.tensor) {
    call = backend.conv_wgrad_sums(d, slots, dy, dw.tensor, dw.write, sums.tensor, sums.stride,
                                   sums.offset);
    if (!call) g.add(backend.pixel_sum(g.shape(dy), dy, sums.tensor, sums.stride, sums.offset));
  }
  if (!call) call = backend.conv_wgrad(d, slots, dy, dw.tensor, dw.write);
  if (!call) {
    slots = {};
    slots.x = materialize(g, x);
    call = backend.conv_wgrad(plain_desc(g, x, o), slots, dy, dw.tensor, dw.write);
  }
  DDPM_CHECK(call.has_value(), "the backend declines a plain weight gradient");
  g.add_product(*call, multiply_adds(g, f, dy));
}

// dx = conv^T(dy).
void add_input_gradient(Graph& g, const View& x, const Filter& f, const ConvOptions& o, Tensor dy) {
  if (!g.requires_grad(x.value) || add_gradient_at_norm(g, x, f, o, dy)) return;
  const ConvDesc d = plain_desc(g, x, o);
  ConvSlots slots;
  slots.filter = packed_filter(g, d, ConvPass::kDgrad, f.weight);
  const GradOut dx = g.grad_out(x.value);
  const auto call = g.backend().conv_dgrad(d, slots, dy, dx.tensor, dx.write);
  DDPM_CHECK(call.has_value(), "the backend declines a plain input gradient");
  g.add_product(*call, multiply_adds(g, f, dy));
}

// dsample_bias[n,k] = sum over pixels of dy: every convolution writes its own columns of the
// table's gradient, so nobody accumulates.
PixelSums place_of_sums(Graph& g, const ConvOptions& o, const Shape& y) {
  if (!o.sample_bias.table) return {g.tensor({y.n, 1, 1, y.c}), y.c, 0};
  return {g.grad_buffer(o.sample_bias.table), g.shape(o.sample_bias.table).c, o.sample_bias.offset};
}

// db[k] = sum over n and pixels of dy.
void add_bias_gradients(Graph& g, const Filter& f, const Filter& shortcut, const Shape& y,
                        const PixelSums& sums) {
  for (const Tensor& bias : {f.bias, shortcut.bias}) {
    if (!bias) continue;
    const GradOut db = g.grad_out(bias);
    g.add(g.backend().row_sum(y.n, y.c, sums.stride, sums.offset, DType::kF32, sums.tensor,
                              db.tensor, db.write));
  }
}

}  // namespace

Tensor conv(Graph& g, const View& x, const std::string& name, const ConvOptions& o) {
  const Shape in = g.shape(x.value);
  const Filter f = define_filter(g, name, {o.k, o.kernel, o.width(), in.c}, o.init);
  Filter shortcut;
  if (o.shortcut.value)
    shortcut =
        define_filter(g, o.shortcut_name, {o.k, 1, 1, g.shape(o.shortcut.value).c}, Init::kGlorot);
  const Graph::Scope scope(g, name);
  const Shape out = plain_desc(g, x, o).y();
  const Tensor y = g.activation(out);
  g.set_requires_grad(y, true);
  for (Tensor addend : {o.residual, o.shortcut.value})
    DDPM_CHECK(!addend || g.shape(addend).pixels() == out.pixels(), "conv %s: addend %s on %s",
               name.c_str(), to_string(g.shape(addend)).c_str(), to_string(out).c_str());

  add_forward(g, x, f, shortcut, o, y);

  g.on_backward([=](Graph& g) {
    const Tensor dy = g.grad(y);
    const PixelSums sums = place_of_sums(g, o, out);
    add_filter_gradient(g, x, f, o, dy, sums);
    add_bias_gradients(g, f, shortcut, out, sums);
    add_input_gradient(g, x, f, o, dy);
    if (o.shortcut.value) {
      const ConvOptions one{.k = o.k, .kernel = 1, .pad = {0, 0, 0, 0}};
      add_filter_gradient(g, o.shortcut, shortcut, one, dy, {});
      add_input_gradient(g, o.shortcut, shortcut, one, dy);
    }
    if (o.residual) g.pass_grad(y, o.residual);
  });
  return y;
}

}  // namespace ddpm::ops
