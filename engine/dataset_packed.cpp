// Packed data sets: safetensors with images and labels.
#include <algorithm>
#include <limits>

#include "engine/dataset.h"
#include "engine/safetensors.h"
#include "kernels/error.h"

namespace ddpm {
namespace {

[[noreturn]] void fail_packed(const std::string& path, const std::string& why) {
  fail(Status::kFile, "'%s' is not a packed data set: %s; make one with ddpm pack", path.c_str(),
       why.c_str());
}

std::string shape_text(const TensorInfo& tensor) {
  std::string text = std::string(tensor.dtype) + " [";
  for (size_t i = 0; i < tensor.shape.size(); ++i)
    text += (i ? "," : "") + std::to_string(tensor.shape[i]);
  return text + "]";
}

// Sides are kept below 2^15 so that no product of them overflows an int.
const TensorInfo& find_images(const SafetensorsReader& file) {
  const TensorInfo* images = file.find("images");
  if (!images) fail_packed(file.path(), "it has no tensor \"images\"");
  const auto& s = images->shape;
  constexpr uint64_t kMaxSide = 16384;
  if (images->dtype != "U8" || s.size() != 4 || s[0] < 1 || s[1] < 1 || s[1] > kMaxSide ||
      s[2] < 1 || s[2] > kMaxSide || s[3] < 1 || s[3] > 4)
    fail_packed(file.path(), "\"images\" is " + shape_text(*images) +
                                 ", not U8 [N,H,W,C] with N >= 1, sides up to 16384 and 1 to 4 "
                                 "channels");
  return *images;
}

std::vector<int32_t> read_labels(const SafetensorsReader& file, uint64_t count) {
  const TensorInfo* tensor = file.find("labels");
  if (!tensor) return {};
  if (tensor->dtype != "I64" || tensor->shape.size() != 1 || tensor->shape[0] != count)
    fail_packed(file.path(), "\"labels\" is " + shape_text(*tensor) + ", not I64 [" +
                                 std::to_string(count) + "] as \"images\" asks for");
  std::vector<int64_t> stored(static_cast<size_t>(count));
  file.read(*tensor, stored.data());
  std::vector<int32_t> labels;
  labels.reserve(stored.size());
  for (const int64_t label : stored) {
    if (label < 0 || label > std::numeric_limits<int32_t>::max())
      fail_packed(file.path(), "label " + std::to_string(labels.size()) + " is " +
                                   std::to_string(label) + ", not a class number");
    labels.push_back(static_cast<int32_t>(label));
  }
  return labels;
}

// One name a line, as ddpm pack writes them; files of others have none.
std::vector<std::string> read_class_names(const SafetensorsReader& file) {
  const auto it = file.metadata().find("class_names");
  std::vector<std::string> names;
  if (it == file.metadata().end() || it->second.empty()) return names;
  for (size_t begin = 0; begin <= it->second.size();) {
    const size_t end = std::min(it->second.find('\n', begin), it->second.size());
    names.push_back(it->second.substr(begin, end - begin));
    begin = end + 1;
  }
  return names;
}

}  // namespace

Dataset load_packed(const std::string& path, std::optional<Shape> required) {
  const SafetensorsReader file(path, Status::kConfig);
  const TensorInfo& images = find_images(file);
  const Shape shape{1, static_cast<int>(images.shape[1]), static_cast<int>(images.shape[2]),
                    static_cast<int>(images.shape[3])};
  if (required) require_image_shape("packed file '" + path + "'", path, shape, *required);
  Dataset d = make_dataset(static_cast<int64_t>(images.shape[0]), shape);
  d.labels = read_labels(file, images.shape[0]);
  d.class_names = read_class_names(file);
  if (d.labels.empty()) d.class_names.clear();
  for (const int32_t label : d.labels)
    if (!d.class_names.empty() && static_cast<size_t>(label) >= d.class_names.size())
      fail_packed(path, "label " + std::to_string(label) + " has no class name");
  file.read(images, d.images.data());
  d.description = format("%s: %lld packed images, %dx%dx%d", path.c_str(),
                         static_cast<long long>(d.count), d.h, d.w, d.c);
  return d;
}

}  // namespace ddpm
