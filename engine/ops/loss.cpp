#include <utility>

#include "engine/ops.h"

namespace ddpm::ops {

// loss = mean((prediction - target)^2), DDPM eq. 14; dprediction = 2 (prediction - target) / the
// elements of step_images images
Tensor mse_loss(Graph& g, Tensor prediction, Tensor target, int step_images) {
  const Graph::Scope scope(g, "loss");
  const Shape s = g.shape(prediction);
  const Tensor per_image = g.tensor({1, 1, 1, s.n});
  const Tensor gradient = g.activation(s);
  g.add(g.backend().mse_loss(s, step_images, prediction, target, per_image, gradient, g.state()));
  g.set_grad(prediction, gradient);
  return per_image;
}

Tensor noise_loss(Graph& g, Tensor prediction, Tensor noise, int step_images) {
  const Graph::Scope scope(g, "loss");
  const Shape s = g.shape(prediction);
  const Tensor per_image = g.tensor({1, 1, 1, s.n});
  const Tensor gradient = g.activation(s);
  if (auto call =
          g.backend().noise_loss(s, step_images, prediction, per_image, gradient, g.state())) {
    g.add(std::move(*call));
  } else {
    if (!noise) {
      noise = g.tensor(s);
      g.add(g.backend().draw_noise(s, g.state(), noise));
    }
    g.add(g.backend().mse_loss(s, step_images, prediction, noise, per_image, gradient, g.state()));
  }
  g.set_grad(prediction, gradient);
  return per_image;
}

// loss = sum over images of weight sample_loss / step_images; dprediction: kernels/diffusion_loss.h
Tensor diffusion_loss(Graph& g, const DiffusionLossDesc& d, Tensor prediction,
                      const LossInputs& in) {
  const Graph::Scope scope(g, "loss");
  const Tensor per_image = g.tensor({1, 1, 1, d.x.n});
  const Tensor gradient = g.activation(g.shape(prediction));
  g.add(g.backend().diffusion_loss(d, prediction, in.target, in.x0, in.timestep, in.factors,
                                   in.weight, per_image, gradient, g.state()));
  g.set_grad(prediction, gradient);
  return per_image;
}

}  // namespace ddpm::ops
