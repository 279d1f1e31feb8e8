#include "tools/pack.h"

#include <algorithm>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <vector>

#include "engine/dataset.h"
#include "engine/file_io.h"
#include "engine/json.h"
#include "engine/safetensors.h"
#include "kernels/error.h"
#include "tools/data.h"
#include "tools/image.h"

namespace ddpm::tools {
namespace {

constexpr int kMaxPackedSide = 4096;

// What is packed, whatever it came from: image i in its own size, in the wanted channels.
struct Source {
  int64_t count = 0;
  Shape image;  // of the packed images
  std::vector<int32_t> labels;
  std::vector<std::string> class_names;
  int64_t ignored = 0;
  std::function<Image(int64_t)> load;
  std::function<std::string(int64_t)> name;
};

Source open_folder(const PackOptions& o) {
  auto list = std::make_shared<const ImageFolder>(list_image_folder(o.source));
  Source s;
  s.count = static_cast<int64_t>(list->files.size());
  s.labels = list->labels;
  s.class_names = list->class_names;
  s.ignored = list->ignored;
  s.image.c = o.channels ? o.channels : 3;
  s.load = [list, c = s.image.c](int64_t i) {
    return load_image(*list, static_cast<size_t>(i), c);
  };
  s.name = [list](int64_t i) { return list->folder + "/" + list->files[static_cast<size_t>(i)]; };
  const Image first = s.load(0);
  s.image.h = first.h;
  s.image.w = first.w;
  return s;
}

Source open_dataset(const PackOptions& o) {
  auto d = std::make_shared<const Dataset>(
      folder_exists(o.source) ? load_cifar(o.source, Split::kTrain) : load_packed(o.source));
  Source s;
  s.count = d->count;
  s.labels = d->labels;
  s.class_names = d->class_names;
  s.image = {1, d->h, d->w, o.channels ? o.channels : d->c};
  s.load = [d, c = s.image.c](int64_t i) {
    Image image = make_image(d->h, d->w, d->c);
    std::memcpy(image.pixels.data(), d->image(i), image.pixels.size());
    return c == d->c ? image : convert_channels(image, c);
  };
  s.name = [source = o.source](int64_t) { return source; };
  return s;
}

Source open_source(const PackOptions& o) {
  require_source(o.source);
  const bool is_folder = folder_exists(o.source) && !is_cifar_folder(o.source);
  Source s = is_folder ? open_folder(o) : open_dataset(o);
  if (o.h > 0) {
    s.image.h = o.h;
    s.image.w = o.w;
  }
  if (s.image.h > kMaxPackedSide || s.image.w > kMaxPackedSide)
    fail(Status::kUsage, "pack: images of %dx%d are larger than %dx%d; give a smaller --size",
         s.image.h, s.image.w, kMaxPackedSide, kMaxPackedSide);
  return s;
}

Image load_fitted(const Source& s, const PackOptions& o, int64_t i) {
  Image image = s.load(i);
  if (o.h == 0 && (image.h != s.image.h || image.w != s.image.w))
    fail(Status::kConfig,
         "pack: the images differ in size ('%s' is %dx%d, the first is %dx%d); give --size HxW",
         s.name(i).c_str(), image.h, image.w, s.image.h, s.image.w);
  return crop_and_resize(image, s.image.h, s.image.w);
}

// The images end to end, made one by one as the writer asks for their bytes in order.
std::function<void(uint64_t, void*, size_t)> image_bytes(const Source& s, const PackOptions& o) {
  auto current = std::make_shared<Image>();
  auto number = std::make_shared<int64_t>(-1);
  const uint64_t size = static_cast<uint64_t>(s.image.count());
  return [&s, &o, current, number, size](uint64_t offset, void* to, size_t bytes) {
    auto* out = static_cast<uint8_t*>(to);
    while (bytes > 0) {
      const int64_t i = static_cast<int64_t>(offset / size);
      if (i != *number) *current = load_fitted(s, o, i);
      *number = i;
      const size_t begin = static_cast<size_t>(offset % size);
      const size_t part = std::min(bytes, static_cast<size_t>(size) - begin);
      std::memcpy(out, current->pixels.data() + begin, part);
      out += part;
      offset += part;
      bytes -= part;
    }
  };
}

// One name a line; folder names may hold any byte, the file's header only text.
std::string join_names(const std::vector<std::string>& names) {
  std::string text;
  for (const std::string& name : names) text += (text.empty() ? "" : "\n") + printable(name, 256);
  return text;
}

}  // namespace

PackResult pack(const PackOptions& o) {
  DDPM_CHECK((o.h > 0 && o.w > 0) || (o.h == 0 && o.w == 0), "pack to %dx%d", o.h, o.w);
  if (o.channels != 0 && o.channels != 1 && o.channels != 3 && o.channels != 4)
    fail(Status::kUsage, "pack: --channels is %d; give 1, 3 or 4", o.channels);
  const Source s = open_source(o);
  const std::vector<int64_t> labels(s.labels.begin(), s.labels.end());

  const auto count = static_cast<uint64_t>(s.count);
  std::vector<TensorSource> tensors;
  tensors.push_back({"images",
                     DType::kU8,
                     {count, static_cast<uint64_t>(s.image.h), static_cast<uint64_t>(s.image.w),
                      static_cast<uint64_t>(s.image.c)},
                     image_bytes(s, o)});
  std::map<std::string, std::string> metadata = {{"format", "pt"}};
  if (!labels.empty()) {
    tensors.push_back(tensor_in_memory("labels", DType::kI64, {count}, labels.data()));
    if (!s.class_names.empty()) metadata["class_names"] = join_names(s.class_names);
  }
  OutputFile file(o.out);
  write_safetensors(file, std::move(tensors), metadata);
  file.commit();
  return {s.count, s.image, !labels.empty(), s.ignored};
}

}  // namespace ddpm::tools
