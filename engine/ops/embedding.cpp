// Time and class embeddings, and the SiLU between their layers.
#include "engine/ops.h"

namespace ddpm::ops {

// y = x sigmoid(x); dx = dy s (1 + x (1 - s))
Tensor silu(Graph& g, Tensor x) {
  const Tensor y = g.tensor(g.shape(x));
  const int64_t count = g.shape(x).count();
  g.set_requires_grad(y, g.requires_grad(x));
  g.add(g.backend().silu(count, x, y));
  g.on_backward([=](Graph& g) {
    const GradOut dx = g.grad_out(x);
    g.add(g.backend().silu_backward(count, x, g.grad(y), dx.tensor, dx.write));
  });
  return y;
}

Tensor time_embedding(Graph& g, Tensor t, const TimeEmbeddingDesc& d) {
  const Tensor y = g.tensor({d.n, 1, 1, d.dim});
  g.add(g.backend().time_embedding(d, t, y));
  return y;
}

Tensor step_row(Graph& g, Tensor table, int n) {
  const Shape s = g.shape(table);
  const Tensor y = g.tensor({n, 1, 1, s.c});
  g.add(g.backend().step_row(n, s.n, s.c, table, g.state(), y));
  return y;
}

Tensor table_rows(Graph& g, Tensor table, Tensor index) {
  const Shape s = g.shape(table);
  const int n = static_cast<int>(g.shape(index).count());
  const Tensor y = g.tensor({n, 1, 1, s.c});
  g.add(g.backend().embedding(n, s.n, s.c, table, index, y, Write::kOverwrite));
  return y;
}

// In place: nothing needs x alone afterwards, and its gradient is y's.
Tensor add_embedding(Graph& g, Tensor x, Tensor index, int rows, const std::string& name) {
  const Graph::Scope scope(g, name);
  const Shape s = g.shape(x);
  const Tensor table =
      g.parameter("weight", {rows, 1, 1, s.c}, 2, {{g.scope() + ".weight", rows, Init::kNormal}});
  g.add(g.backend().embedding(s.n, rows, s.c, table, index, x, Write::kAccumulate));
  g.on_backward([=](Graph& g) {
    const GradOut dtable = g.grad_out(table);
    g.add(g.backend().embedding_backward(s.n, rows, s.c, index, g.grad(x), dtable.tensor,
                                         dtable.write));
  });
  return x;
}

}  // namespace ddpm::ops
