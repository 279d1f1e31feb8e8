// What a network that classifies images is made of besides convolutions. Inference only.
#include "engine/ops.h"

namespace ddpm::ops {
namespace {

// Where a result of shape y goes: a tensor of its own, unless a place is given.
Part or_new(Graph& g, const Part& to, const Shape& y, const char* op) {
  DDPM_CHECK(!g.training(), "%s: has no backward", op);
  if (!to.tensor) return {g.activation(y), 0};
  const Shape whole = g.shape(to.tensor);
  DDPM_CHECK(whole.n == y.n && whole.h == y.h && whole.w == y.w, "%s: %s into %s", op,
             to_string(y).c_str(), to_string(whole).c_str());
  return to;
}

Columns columns(Graph& g, const Part& to) { return {g.shape(to.tensor).c, to.offset}; }

}  // namespace

Tensor relu(Graph& g, Tensor x, const Part& to) {
  const Shape s = g.shape(x);
  const Part y = or_new(g, to, s, "relu");
  g.add(g.backend().relu(s, x, y.tensor, columns(g, y)));
  return y.tensor;
}

Tensor pool(Graph& g, Tensor x, PoolDesc d, const Part& to) {
  d.x = g.shape(x);
  DDPM_CHECK(d.valid(), "pool: %dx%d of %s", d.r, d.s, to_string(d.x).c_str());
  const Part y = or_new(g, to, d.y(), "pool");
  g.add(g.backend().pool(d, x, y.tensor, columns(g, y)));
  return y.tensor;
}

Tensor resize(Graph& g, Tensor x, int h, int w) {
  const Shape s = g.shape(x);
  DDPM_CHECK(!g.training() && g.info(x).dtype == DType::kF32, "resize: of %s",
             name_of(g.info(x).dtype));
  const Tensor y = g.activation({s.n, h, w, s.c});
  g.add(g.backend().resize(s, h, w, x, y));
  return y;
}

}  // namespace ddpm::ops
