#include "tools/start_images.h"

#include <algorithm>
#include <cmath>

#include "engine/file_io.h"
#include "engine/safetensors.h"
#include "tools/common.h"
#include "tools/data.h"
#include "tools/image_io.h"

namespace ddpm::tools {
namespace {

StartImages read_tensor(const SafetensorsReader& file, const char* name, const Shape& image) {
  const TensorInfo* t = file.find(name);
  if (t == nullptr || t->dtype != "F32" || t->shape.size() != 4)
    fail(Status::kConfig, "%s: needs a tensor \"%s\", F32 [N,C,H,W]", file.path().c_str(), name);
  const auto extent = [&](size_t i) { return static_cast<int64_t>(t->shape[i]); };
  if (extent(0) < 1 || extent(1) != image.c || extent(2) != image.h || extent(3) != image.w)
    fail(Status::kConfig, "%s: %s is [%lld,%lld,%lld,%lld]; the model's images are [N,%d,%d,%d]",
         file.path().c_str(), name, static_cast<long long>(extent(0)),
         static_cast<long long>(extent(1)), static_cast<long long>(extent(2)),
         static_cast<long long>(extent(3)), image.c, image.h, image.w);
  StartImages s{extent(0), std::vector<float>(t->elements)};
  file.read_f32(*t, s.values.data());
  for (const float v : s.values)
    if (!std::isfinite(v))
      fail(Status::kFile, "%s: %s holds values that are not finite", file.path().c_str(), name);
  s.values = to_nhwc(s.values, static_cast<int>(s.count), image.h, image.w, image.c);
  return s;
}

// x = u8 / 127.5 - 1
StartImages from_bytes(const uint8_t* pixels, int64_t count, const Shape& image) {
  StartImages s{count, std::vector<float>(static_cast<size_t>(count * image.pixels() * image.c))};
  for (size_t i = 0; i < s.values.size(); ++i)
    s.values[i] = static_cast<float>(pixels[i] / 127.5 - 1);
  return s;
}

bool is_picture(const std::string& path) {
  if (!file_exists(path)) return false;
  const InputFile file(path);
  std::vector<uint8_t> head(static_cast<size_t>(std::min<uint64_t>(file.size(), 8)));
  file.read(0, head.data(), head.size());
  return sniff_format(head) != ImageFormat::kNone;
}

}  // namespace

StartImages read_latents(const std::string& path, const Shape& image) {
  return read_tensor(SafetensorsReader(path, Status::kConfig), "x_T", image);
}

StartImages read_start_images(const std::string& source, const Shape& image, int64_t num) {
  if (is_picture(source)) {
    const Image picture = convert_channels(read_image(source), image.c);
    if (picture.h != image.h || picture.w != image.w)
      fail(Status::kConfig, "%s is %dx%d; the model's images are %dx%d", source.c_str(), picture.h,
           picture.w, image.h, image.w);
    return from_bytes(picture.pixels.data(), 1, image);
  }
  if (source.ends_with(".safetensors")) {
    const SafetensorsReader file(source, Status::kConfig);
    const TensorInfo* t = file.find("images");
    if (t != nullptr && t->dtype == "F32") {
      StartImages s = read_tensor(file, "images", image);
      s.count = std::min(s.count, num);
      s.values.resize(static_cast<size_t>(s.count * image.pixels() * image.c));
      return s;
    }
  }
  const Dataset data = load_data(source, image);
  return from_bytes(data.images.data(), std::min(data.count, num), image);
}

void write_image_tensor(const std::string& path, const char* name, const std::vector<float>& values,
                        int64_t count, const Shape& s) {
  const std::vector<float> nchw = to_nchw(values, static_cast<int>(count), s.h, s.w, s.c);
  OutputFile file(path);
  write_safetensors(file,
                    {tensor_in_memory(name, DType::kF32,
                                      {static_cast<uint64_t>(count), static_cast<uint64_t>(s.c),
                                       static_cast<uint64_t>(s.h), static_cast<uint64_t>(s.w)},
                                      nchw.data())});
  file.commit();
}

}  // namespace ddpm::tools
