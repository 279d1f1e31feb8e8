#include "model/forward.h"

#include "engine/ops.h"
#include "model/unet.h"

namespace ddpm {

ForwardGraph build_forward_graph(Backend& backend, const UNetConfig& unet, int timesteps,
                                 int batch_size) {
  ForwardGraph f{Graph(backend, Mode::kInference), {}, {}, {}, {}};
  Graph& g = f.graph;
  const Shape in{batch_size, unet.sample_height, unet.sample_width, unet.in_channels};
  f.sample = g.persistent(in, DType::kF32, "sample");
  f.timestep = g.persistent({1, 1, 1, batch_size}, DType::kI32, "timestep");
  if (unet.num_class_embeds)
    f.class_labels = g.persistent({1, 1, 1, batch_size}, DType::kI32, "class_labels");
  const Tensor y = build_unet(g, unet, timesteps,
                              {.sample = ops::cast(g, f.sample, backend.compute_type()),
                               .timestep = f.timestep,
                               .class_labels = f.class_labels});
  const Shape out = g.shape(y);
  f.output = g.persistent(out, DType::kF32, "model_output");
  g.add(backend.cast(out.count(), g.info(y).dtype, y, DType::kF32, f.output));
  return f;
}

}  // namespace ddpm
