// Images that a chain of sampling starts from, and latents in files.
#pragma once

#include <string>
#include <vector>

#include "kernels/shape.h"

namespace ddpm::tools {

// As (count,H,W,C).
struct StartImages {
  int64_t count = 0;
  std::vector<float> values;
};

// x_T F32 [N,C,H,W] of a safetensors file. Error(kConfig) where it is not there or has another
// shape than the model's images (image.h, w, c).
StartImages read_latents(const std::string& path, const Shape& image);

// The first `num` images of a data set (load_data), of a file that `ddpm sample` wrote (`images`
// F32 [N,C,H,W]), or one PNG or JPEG file, in [-1, 1]; fewer where there are not so many.
StartImages read_start_images(const std::string& source, const Shape& image, int64_t num);

// One tensor [N,C,H,W] of `values` (N,H,W,C), written whole or not at all.
void write_image_tensor(const std::string& path, const char* name, const std::vector<float>& values,
                        int64_t count, const Shape& image);

}  // namespace ddpm::tools
