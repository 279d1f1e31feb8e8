#include "engine/ops.h"

namespace ddpm::ops {

// y = x w^T + b [+ residual]; dx = dy w, dw = dy^T x, db = sum over rows of dy.
Tensor linear(Graph& g, const View& x, const std::string& name,
              const std::vector<LinearPart>& parts, const LinearOptions& o) {
  const Shape in = g.shape(x.value);
  const int rows = static_cast<int>(in.count() / in.c);
  std::vector<ParamPiece> weights, biases;
  int k = 0;
  const std::string prefix = g.scope().empty() ? "" : g.scope() + ".";
  for (const LinearPart& part : parts) {
    weights.push_back({prefix + part.name + ".weight", part.rows, o.init});
    biases.push_back({prefix + part.name + ".bias", part.rows, Init::kZeros});
    k += part.rows;
  }
  const Graph::Scope scope(g, name);
  const Tensor w = g.parameter("weight", {k, 1, 1, in.c}, 2, weights);
  const Tensor b = g.parameter("bias", {1, 1, 1, k}, 1, biases);
  // Products of fp32 tensors (the time embedding's) stay fp32.
  const DType type = g.info(x.value).dtype;
  const auto read = [type](Graph& g, Tensor t) {
    return type == DType::kF32 ? t : g.compute_weight(t);
  };
  const Tensor y = g.tensor({in.n, in.h, in.w, k}, type);
  const int64_t macs = int64_t{rows} * k * in.c;
  g.set_requires_grad(y, true);
  GemmDesc forward{.m = rows, .n = k, .k = in.c, .transpose_b = true, .bias = true};
  forward.in = forward.out = type;
  forward.residual = static_cast<bool>(o.residual);
  g.add_product(g.backend().gemm(forward, materialize(g, x), read(g, w), read(g, b), o.residual, y,
                                 Write::kOverwrite),
                macs);

  g.on_backward([=, residual = o.residual](Graph& g) {
    const Tensor dy = g.grad(y);
    const GradOut db = g.grad_out(b), dw = g.grad_out(w);
    g.add(g.backend().row_sum(rows, k, k, 0, type, dy, db.tensor, db.write));
    const GemmDesc wgrad{.m = k, .n = in.c, .k = rows, .transpose_a = true, .in = type};
    g.add_product(g.backend().gemm(wgrad, dy, materialize(g, x), {}, {}, dw.tensor, dw.write),
                  macs);
    if (g.requires_grad(x.value)) {
      const GradOut dx = g.grad_out(x.value);
      const GemmDesc dgrad{.m = rows, .n = in.c, .k = k, .in = type, .out = type};
      g.add_product(g.backend().gemm(dgrad, dy, read(g, w), {}, {}, dx.tensor, dx.write), macs);
    }
    if (residual) g.pass_grad(y, residual);
  });
  return y;
}

}  // namespace ddpm::ops
