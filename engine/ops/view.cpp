// Views that only read elsewhere: concatenation and upsampling, and writing a view out.
#include "engine/ops.h"
#include "kernels/conv_composite.h"

namespace ddpm::ops {

// value = (h, skip); dh = dvalue[.., :C1], dskip = dvalue[.., C1:]
View concat(Graph& g, Tensor h, Tensor skip) {
  const Shape a = g.shape(h), b = g.shape(skip);
  DDPM_CHECK(a.n == b.n && a.h == b.h && a.w == b.w, "concat of %s and %s", to_string(a).c_str(),
             to_string(b).c_str());
  View v;
  v.x = h;
  v.x2 = skip;
  v.value = g.activation({a.n, a.h, a.w, a.c + b.c});
  g.set_requires_grad(v.value, g.requires_grad(h) || g.requires_grad(skip));
  g.on_backward([v, a, b](Graph& g) {
    const Tensor dy = g.grad(v.value);
    if (!dy) return;  // every consumer went around the concatenation
    const GradOut dx = g.grad_out(v.x), dx2 = g.grad_out(v.x2);
    g.add(g.backend().split(a, b.c, dy, dx.tensor, dx.write, dx2.tensor, dx2.write));
  });
  return v;
}

// value[i,j] = x[i/2, j/2]; dx[i,j] = the sum of dvalue over its 2x2 pixels
View upsample(Graph& g, Tensor x) {
  const Shape s = g.shape(x);
  View v;
  v.x = x;
  v.upsampled = true;
  v.value = g.activation({s.n, 2 * s.h, 2 * s.w, s.c});
  g.set_requires_grad(v.value, g.requires_grad(x));
  g.on_backward([v, s](Graph& g) {
    if (!g.requires_grad(v.x)) return;
    const GradOut dx = g.grad_out(v.x);
    g.add(g.backend().upsample_backward(s, g.grad(v.value), dx.tensor, dx.write));
  });
  return v;
}

Tensor cast(Graph& g, Tensor x, DType type) {
  const DType from = g.info(x).dtype;
  if (from == type) return x;
  const Tensor y = g.tensor(g.shape(x), type);
  g.add(g.backend().cast(g.shape(x).count(), from, x, type, y));
  return y;
}

// All of x as one pixel, concatenated with itself.
Tensor twice(Graph& g, Tensor x) {
  const Shape s = g.shape(x);
  DDPM_CHECK(s.count() < int64_t{1} << 30, "%s twice", to_string(s).c_str());
  const Tensor y = g.activation({2 * s.n, s.h, s.w, s.c});
  const int count = static_cast<int>(s.count());
  g.add(g.backend().concat({1, 1, 1, count}, count, x, x, y));
  return y;
}

void describe_input(Graph& g, const View& v, ConvDesc& d, ConvSlots& slots) {
  d.x = g.shape(v.x);
  d.c2 = v.x2 ? g.shape(v.x2).c : 0;
  d.upsample = v.upsampled;
  slots.x = v.x;
  slots.x2 = v.x2;
  if (!v.norm) return;
  d.transform = {true, v.norm->desc.silu, v.norm->desc.dropout};
  slots.scale_shift = v.norm->scale_shift;
  slots.state = g.state();
}

Tensor materialize(Graph& g, const View& v) {
  ConvDesc d;
  ConvSlots slots;
  describe_input(g, v, d, slots);
  const ConvLister lister{[&](const Shape& s) -> Out { return g.activation(s); },
                          [&](Call call) { g.add(std::move(call)); }};
  return {list_input(g.backend(), d, slots, lister).slot};
}

}  // namespace ddpm::ops
