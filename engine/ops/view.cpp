// Views that only read elsewhere: concatenation and upsampling, and writing a view out.
#include "engine/ops.h"

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

Tensor materialize(Graph& g, const View& v) {
  if (v.plain()) return v.x;
  const Shape x = g.shape(v.x);
  const int c2 = v.x2 ? g.shape(v.x2).c : 0;
  Tensor out = v.x;
  if (v.norm) {
    out = g.activation(v.norm->desc.shape());
    g.add(
        g.backend().group_norm_apply(v.norm->desc, v.x, v.x2, v.norm->scale_shift, g.state(), out));
  } else if (v.x2) {
    out = g.activation({x.n, x.h, x.w, x.c + c2});
    g.add(g.backend().concat(x, c2, v.x, v.x2, out));
  }
  if (v.upsampled) {
    const Tensor small = out;
    out = g.activation({x.n, 2 * x.h, 2 * x.w, x.c + c2});
    g.add(g.backend().upsample(g.shape(small), small, out));
  }
  return out;
}

}  // namespace ddpm::ops
