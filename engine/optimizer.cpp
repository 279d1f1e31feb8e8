#include "engine/optimizer.h"

namespace ddpm {

void add_optimizer(Graph& g, AdamDesc desc) {
  const Graph::Scope scope(g, "optimizer");
  desc.count = g.params().arena_size();
  Backend& backend = g.backend();
  const Tensor gradients = g.arena(Arena::kGradients);
  g.add(backend.grad_norm(desc.count, gradients, g.state()));
  g.add(backend.adam_ema(desc, gradients, g.arena(Arena::kWeights), g.arena(Arena::kM),
                         g.arena(Arena::kV), g.arena(Arena::kEma), g.arena(Arena::kShadow),
                         g.state()));
  g.add(backend.advance_state(g.state()));
}

}  // namespace ddpm
