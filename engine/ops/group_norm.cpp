#include <memory>

#include "engine/ops.h"

namespace ddpm::ops {

// z = (x - mean_g) rstd_g gamma + beta = x scale + shift; value = dropout(silu(z)).
// Backward, with dz = dvalue * mask / keep * silu'(z), xhat = (x - mean) rstd, means over a group:
//   dx = rstd (gamma dz - mean(gamma dz) - xhat mean(gamma dz xhat))
//   dgamma = sum dz xhat, dbeta = sum dz
// It reads the raw x and its statistics; the activated copy is not kept.
View group_norm_silu(Graph& g, const View& x, const std::string& name, const GroupNormOptions& o) {
  DDPM_CHECK(!x.norm && !x.upsampled, "group norm of a view that is normalised or upsampled");
  const Graph::Scope scope(g, name);
  auto norm = std::make_shared<Norm>();
  GroupNormDesc& d = norm->desc;
  d.x = g.shape(x.x);
  d.c2 = x.x2 ? g.shape(x.x2).c : 0;
  d.groups = o.groups;
  d.epsilon = o.epsilon;
  d.silu = o.silu;
  if (g.training() && o.dropout > 0) d.dropout = {o.dropout, g.next_dropout_layer()};
  DDPM_CHECK(d.c() % d.groups == 0, "group norm of %d channels in %d groups", d.c(), d.groups);

  const Tensor stats = g.statistics(x.x);
  const Tensor stats2 = x.x2 ? g.statistics(x.x2) : Tensor{};
  const Shape vector{1, 1, 1, d.c()};
  const std::string key = g.scope();
  const Tensor gamma = g.parameter("weight", vector, 1, {{key + ".weight", d.c(), Init::kOnes}});
  const Tensor beta = g.parameter("bias", vector, 1, {{key + ".bias", d.c(), Init::kZeros}});
  norm->scale_shift = g.tensor({d.x.n, 1, 1, 2 * d.c()});
  norm->mean_rstd = g.tensor({d.x.n, 1, 1, 2 * d.groups});
  g.add(g.backend().group_norm_scale_shift(d, stats, stats2, gamma, beta, norm->scale_shift,
                                           norm->mean_rstd));

  View v;
  v.x = x.x;
  v.x2 = x.x2;
  v.value = g.activation(d.shape());
  v.norm = norm;
  g.set_requires_grad(v.value, true);
  g.on_backward([v, gamma, beta](Graph& g) {
    const GradOut dx = g.grad_out(v.x), dx2 = v.x2 ? g.grad_out(v.x2) : GradOut{};
    const GradOut dgamma = g.grad_out(gamma), dbeta = g.grad_out(beta);
    g.add(g.backend().group_norm_backward(v.norm->desc, v.x, v.x2, v.norm->scale_shift,
                                          v.norm->mean_rstd, gamma, g.state(), g.grad(v.value),
                                          v.norm->gradient_sums, dx.tensor, dx.write, dx2.tensor,
                                          dx2.write, dgamma.tensor, dbeta.tensor, dgamma.write));
  });
  return v;
}

}  // namespace ddpm::ops
