// Data sets: uint8 images of one size, held in memory as (count, H, W, C). Here are the sources
// that need no image decoder; tools/data.h adds folders of PNG and JPEG.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "kernels/shape.h"

namespace ddpm {

struct Dataset {
  int64_t count = 0;
  int h = 0, w = 0, c = 0;
  std::vector<uint8_t> images;           // (count, H, W, C)
  std::vector<int32_t> labels;           // (count), or empty
  std::vector<std::string> class_names;  // name of each label, or empty
  std::string description;               // one line for the user

  size_t image_bytes() const { return static_cast<size_t>(h) * w * c; }
  uint8_t* image(int64_t i) { return images.data() + static_cast<size_t>(i) * image_bytes(); }
  const uint8_t* image(int64_t i) const {
    return images.data() + static_cast<size_t>(i) * image_bytes();
  }
};

enum class Split { kTrain, kTest };

// An empty data set with room for its images. Error(kMemory) where the machine has not that much.
Dataset make_dataset(int64_t count, const Shape& image);

// Error(kConfig) unless an image shape (h, w, c) of `source` is the model's. `what` names what has
// that shape, a file or the whole source; the message says how to mend it.
void require_image_shape(const std::string& what, const std::string& source, const Shape& found,
                         const Shape& image);

// The command that makes `source` fit a model of this image shape, of 1, 3 or 4 channels.
std::string pack_command(const std::string& source, const Shape& image);

// CIFAR-10's binary folder: data_batch_1..5.bin, or test_batch.bin; always 32 x 32 x 3. Shorter
// files, of any whole number of records, are taken, and then fewer of them.
constexpr Shape kCifarImage{1, 32, 32, 3};
bool is_cifar_folder(const std::string& folder);
Dataset load_cifar(const std::string& folder, Split split);

// A packed file: safetensors with `images` U8 [N,H,W,C] and, optionally, `labels` I64 [N]. Where
// `required` is given, another image shape is refused before anything is read.
Dataset load_packed(const std::string& path, std::optional<Shape> required = {});

}  // namespace ddpm
