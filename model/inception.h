// Inception-v3 (Szegedy et al. 2015) as the Frechet inception distance (Heusel et al. 2017) and the
// inception score (Salimans et al. 2016) are defined by it: the TensorFlow graph of 2015-12-05,
// whose average pools leave padding out and whose last block takes maxima, in PyTorch-FID's
// spelling of its layers. Widths are those of the weights file, 2048 features and 1008 classes in
// the original. Batch norms are folded into the convolutions when the weights are loaded.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "engine/executor.h"
#include "engine/param_store.h"
#include "engine/safetensors.h"

namespace ddpm {

inline constexpr int kInceptionSide = 299;

struct InceptionGraph {
  Graph graph;
  Tensor images;    // F32 (N,H,W,3) in [-1, 1], persistent
  Tensor features;  // F32 (N,1,1,D): the mean over the last block's pixels, persistent
  Tensor logits;    // F32 (N,1,1,classes), without the bias, as the score's own code, persistent
};
// `images`: their shape, of 3 channels; they are resized to side x side, side >= 75.
// The backend computes in fp32. Error(kConfig) where the file has not the network's layers.
InceptionGraph build_inception_graph(Backend& backend, const SafetensorsReader& weights,
                                     const Shape& images, int side = kInceptionSide);

// The weights in an arena laid out for `params` of that graph. Error(kFile) where one is not
// finite.
std::unique_ptr<ParamStore> load_inception(Backend& backend, const SafetensorsReader& weights,
                                           const Params& params);

// 16 hex digits of the file's tensors.
std::string inception_hash(const SafetensorsReader& weights);

}  // namespace ddpm
