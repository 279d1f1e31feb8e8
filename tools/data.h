// Opening a data set by what it is: `shapes`, a CIFAR-10 binary folder, a folder of PNG and JPEG
// files, or a packed file.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "engine/dataset.h"
#include "model/config.h"
#include "tools/image.h"

namespace ddpm::tools {

// Whether a source has a part that is not trained on: CIFAR-10's test batch, further `shapes`.
bool has_test_split(const std::string& spec);

// The whole data set in memory, with the model's image shape (image.h, w, c). `split` is looked at
// where there is more than one part. Error(kConfig): nothing there, no images, other
// size or channels than the model's. Error(kFile): a damaged file.
Dataset load_data(const std::string& spec, const Shape& image, Split split = Split::kTrain);

// The same with the images' own shape: `shapes` are 32x32x3, and a folder's images are RGB and of
// the first one's size.
Dataset load_data(const std::string& spec, Split split);

// The PNG and JPEG files below a folder, told by content, in byte order of their relative paths.
// Links to folders are not followed.
struct ImageFolder {
  std::string folder;
  std::vector<std::string> files;        // relative paths
  std::vector<int32_t> labels;           // of each file: its first-level subfolder; or empty, where
                                         // an image lies in the folder itself
  std::vector<std::string> class_names;  // the subfolders' names, in byte order
  int64_t ignored = 0;                   // other files
};

// Error(kConfig) if there is no image.
ImageFolder list_image_folder(const std::string& folder);

// File i, in the given number of channels (convert_channels).
Image load_image(const ImageFolder& list, size_t i, int channels);

// Error(kConfig) where the model has classes and the data set no label for each of its images, or
// one that the model has not.
void require_labels(const std::string& spec, const Dataset&, const UNetConfig&);

// Error(kConfig) unless `spec` names a file or a folder.
void require_source(const std::string& spec);

}  // namespace ddpm::tools
