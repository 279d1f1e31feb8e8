#include "tools/data.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <filesystem>
#include <map>
#include <system_error>

#include "engine/file_io.h"
#include "engine/shapes.h"
#include "kernels/error.h"
#include "tools/image_io.h"

namespace ddpm::tools {
namespace {

namespace fs = std::filesystem;

bool is_image_file(const std::string& path) {
  const InputFile file(path);
  std::array<uint8_t, 8> head{};
  const size_t bytes = static_cast<size_t>(std::min<uint64_t>(file.size(), head.size()));
  file.read(0, head.data(), bytes);
  return sniff_format({head.data(), bytes}) != ImageFormat::kNone;
}

// Paths, relative to `folder`, of the regular files below it, in byte order.
std::vector<std::string> list_files(const std::string& folder) {
  std::vector<std::string> files;
  std::error_code error;
  fs::recursive_directory_iterator it(folder, error), end;
  for (; !error && it != end; it.increment(error)) {
    std::error_code dangling;  // a link to nothing is no file
    if (it->is_regular_file(dangling))
      files.push_back(it->path().lexically_relative(folder).generic_string());
  }
  if (error)
    fail(Status::kFile, "cannot list the folder '%s': %s; check its permissions", folder.c_str(),
         error.message().c_str());
  std::sort(files.begin(), files.end());
  return files;
}

// First-level subfolders are classes, if every image is in one.
void label_by_folder(ImageFolder& list) {
  std::map<std::string, int32_t> classes;  // ordered by bytes
  for (const std::string& file : list.files) {
    const size_t slash = file.find('/');
    if (slash == std::string::npos) return;
    classes.emplace(file.substr(0, slash), 0);
  }
  for (auto& [name, label] : classes) {
    label = static_cast<int32_t>(list.class_names.size());
    list.class_names.push_back(name);
  }
  for (const std::string& file : list.files)
    list.labels.push_back(classes.at(file.substr(0, file.find('/'))));
}

Dataset load_image_folder(const std::string& folder, const Shape& image) {
  if (image.c == 2)
    fail(Status::kConfig,
         "data set %s: images are read with 1, 3 or 4 channels, the model has 2; use a packed file",
         folder.c_str());
  ImageFolder list = list_image_folder(folder);
  Dataset d = make_dataset(static_cast<int64_t>(list.files.size()), image);
  for (size_t i = 0; i < list.files.size(); ++i) {
    const Image loaded = load_image(list, i, image.c);
    require_image_shape("'" + folder + "/" + list.files[i] + "'", folder,
                        {1, loaded.h, loaded.w, loaded.c}, image);
    std::memcpy(d.image(static_cast<int64_t>(i)), loaded.pixels.data(), loaded.pixels.size());
  }
  d.labels = std::move(list.labels);
  d.class_names = std::move(list.class_names);
  d.description = format("%s: %lld images, %dx%dx%d, %zu classes", folder.c_str(),
                         static_cast<long long>(d.count), d.h, d.w, d.c, d.class_names.size());
  if (list.ignored > 0)
    d.description += format(", %lld other files ignored", static_cast<long long>(list.ignored));
  return d;
}

// A packed file is the only kind of file; say what to do with the ones that are often tried.
void refuse_archive(const std::string& path) {
  const InputFile file(path);
  std::array<uint8_t, 8> head{};
  const size_t bytes = static_cast<size_t>(std::min<uint64_t>(file.size(), head.size()));
  file.read(0, head.data(), bytes);
  const bool gzip = head[0] == 0x1F && head[1] == 0x8B;
  const bool zip = std::memcmp(head.data(), "PK\3\4", 4) == 0;
  if (gzip || zip)
    fail(Status::kConfig, "data set '%s' is %s: unpack it and name the folder", path.c_str(),
         gzip ? "a gzip archive" : "a zip archive");
  if (sniff_format({head.data(), bytes}) != ImageFormat::kNone)
    fail(Status::kConfig, "data set '%s' is one image: name the folder it is in", path.c_str());
}

}  // namespace

ImageFolder list_image_folder(const std::string& folder) {
  ImageFolder list;
  list.folder = folder;
  for (std::string& file : list_files(folder)) {
    if (is_image_file(folder + "/" + file))
      list.files.push_back(std::move(file));
    else
      ++list.ignored;
  }
  if (list.files.empty())
    fail(Status::kConfig,
         "data set: the folder '%s' holds no PNG or JPEG file (%lld other files); check the path",
         folder.c_str(), static_cast<long long>(list.ignored));
  label_by_folder(list);
  return list;
}

Image load_image(const ImageFolder& list, size_t i, int channels) {
  return convert_channels(read_image(list.folder + "/" + list.files.at(i)), channels);
}

void require_source(const std::string& spec) {
  if (folder_exists(spec)) return;
  if (!file_exists(spec))
    fail(Status::kConfig,
         "data set '%s': no such file or folder; give 'shapes', a CIFAR-10 binary folder, a folder "
         "of PNG or JPEG files, or a packed .safetensors file",
         spec.c_str());
  refuse_archive(spec);
}

void require_labels(const std::string& spec, const Dataset& data, const UNetConfig& unet) {
  if (!unet.num_class_embeds) return;
  if (data.labels.empty())
    fail(Status::kConfig, "%s has no labels, which a model with num_class_embeds needs",
         spec.c_str());
  for (int32_t label : data.labels)
    if (label >= unet.classes())
      fail(Status::kConfig, "%s has label %d; the model has num_class_embeds %d%s", spec.c_str(),
           label, *unet.num_class_embeds,
           unet.null_class ? ", of which the last stands for no class" : "");
}

bool has_test_split(const std::string& spec) {
  return spec == "shapes" || (folder_exists(spec) && is_cifar_folder(spec));
}

Dataset load_data(const std::string& spec, const Shape& image, Split split) {
  constexpr int64_t kTestShapes = 10000;
  if (spec == "shapes") {
    const int64_t trained_on = shapes_count(image);
    return split == Split::kTrain
               ? make_shapes(trained_on, image)
               : make_shapes(std::min(kTestShapes, trained_on), image, trained_on);
  }
  require_source(spec);
  if (file_exists(spec)) return load_packed(spec, image);
  if (!is_cifar_folder(spec)) return load_image_folder(spec, image);
  require_image_shape("CIFAR-10 folder '" + spec + "'", spec, kCifarImage, image);
  return load_cifar(spec, split);
}

Dataset load_data(const std::string& spec, Split split) {
  if (spec == "shapes") return load_data(spec, {1, 32, 32, 3}, split);
  require_source(spec);
  if (file_exists(spec)) return load_packed(spec);
  if (is_cifar_folder(spec)) return load_cifar(spec, split);
  const Image first = load_image(list_image_folder(spec), 0, 3);
  return load_image_folder(spec, {1, first.h, first.w, 3});
}

}  // namespace ddpm::tools
