// Packing: any source of images into one safetensors file of one size, which trains without
// decoding.
#pragma once

#include <cstdint>
#include <string>

#include "kernels/shape.h"

namespace ddpm::tools {

struct PackOptions {
  std::string
      source;  // an image folder, a CIFAR-10 binary folder (its training files), a packed file
  std::string out;
  int h = 0, w = 0;  // 0: the source's own size, which all images must share
  int channels = 0;  // 1, 3 or 4; 0: 3 for an image folder, else the source's own
};

struct PackResult {
  int64_t count = 0;
  Shape image;  // (1,H,W,C)
  bool has_labels = false;
  int64_t ignored = 0;  // files of the folder that are no images
};

// Writes `images` U8 [N,H,W,C] and, where the source has classes, `labels` I64 [N]; the names of
// the classes stand in the metadata. Resizing is crop_and_resize's. Holds one image of a folder at
// a time; other sources are in memory. Equal sources give equal bytes.
PackResult pack(const PackOptions& options);

}  // namespace ddpm::tools
