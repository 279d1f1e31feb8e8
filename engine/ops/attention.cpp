#include "engine/ops.h"

namespace ddpm::ops {

// o = p v, p = softmax(q k^T scale). Backward recomputes p from q, k and the saved log-sum-exp:
//   dv = p^T do, ds = p (do v^T - rowsum(do o)), dq = ds k scale, dk = ds^T q scale
Tensor attention(Graph& g, Tensor qkv, int heads) {
  const Shape s = g.shape(qkv);
  const int width = s.c / 3;
  DDPM_CHECK(s.c % 3 == 0 && width % heads == 0, "attention over %s with %d heads",
             to_string(s).c_str(), heads);
  const Graph::Scope scope(g, "attention");
  const AttentionDesc d{
      .n = s.n, .tokens = static_cast<int>(s.pixels()), .heads = heads, .head_dim = width / heads};
  const Tensor o = g.activation({s.n, s.h, s.w, width});
  const Tensor lse = g.training() ? g.tensor({s.n, heads, 1, d.tokens}) : Tensor{};
  const int64_t product = int64_t{d.n} * d.tokens * d.tokens * width;
  g.set_requires_grad(o, true);
  g.add_product(g.backend().attention_forward(d, qkv, o, lse), 2 * product);
  g.on_backward([=](Graph& g) {
    const GradOut dqkv = g.grad_out(qkv);
    DDPM_CHECK(dqkv.write == Write::kOverwrite, "attention must be the only reader of qkv");
    g.add_product(g.backend().attention_backward(d, qkv, o, lse, g.grad(o), dqkv.tensor),
                  5 * product);
  });
  return o;
}

}  // namespace ddpm::ops
