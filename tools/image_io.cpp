#include "tools/image_io.h"

#include <algorithm>
#include <array>
#include <cstring>

#include "engine/file_io.h"
#include "kernels/error.h"

namespace ddpm::tools {
namespace {

// Above any image within the limits of decode_image, stored without compression at 16 bits.
constexpr size_t kMaxFile = size_t{1} << 30;

// Two syncs a file make a folder of samples 30 times slower. Without them each file is still whole
// or absent whatever ends this program; only a power cut can cost some, and they can be made again.
class UnsyncedFiles : public FileSystem {
 public:
  int sync(int) override { return 0; }
};

void write_png(const std::string& path, const Image& image, FileSystem& fs) {
  const std::vector<uint8_t> bytes = encode_png(image);
  write_file(path, {reinterpret_cast<const char*>(bytes.data()), bytes.size()}, fs);
}

}  // namespace

ImageFormat sniff_format(std::span<const uint8_t> bytes) {
  constexpr std::array<uint8_t, 8> kPng = {0x89, 'P', 'N', 'G', '\r', '\n', 0x1A, '\n'};
  constexpr std::array<uint8_t, 3> kJpeg = {0xFF, 0xD8, 0xFF};
  const auto starts_with = [&](const auto& magic) {
    return bytes.size() >= magic.size() && std::equal(magic.begin(), magic.end(), bytes.begin());
  };
  if (starts_with(kPng)) return ImageFormat::kPng;
  if (starts_with(kJpeg)) return ImageFormat::kJpeg;
  return ImageFormat::kNone;
}

Image decode_image(std::span<const uint8_t> bytes, const std::string& name) {
  switch (sniff_format(bytes)) {
    case ImageFormat::kPng:
      return decode_png(bytes, name);
    case ImageFormat::kJpeg:
      return decode_jpeg(bytes, name);
    case ImageFormat::kNone:
      break;
  }
  fail(Status::kFile, "%s: neither a PNG nor a JPEG file; replace or remove it", name.c_str());
}

Image read_image(const std::string& path) {
  const std::string bytes = read_small_file(path, kMaxFile);
  return decode_image({reinterpret_cast<const uint8_t*>(bytes.data()), bytes.size()}, path);
}

void write_png(const std::string& path, const Image& image) {
  write_png(path, image, FileSystem::real());
}

void write_png_folder(const std::string& folder, const uint8_t* images, int64_t count, int h, int w,
                      int c, int64_t first) {
  make_folders(folder);
  UnsyncedFiles files;
  Image image = make_image(h, w, c);
  for (int64_t i = 0; i < count; ++i) {
    std::memcpy(image.pixels.data(), images + static_cast<size_t>(i) * image.pixels.size(),
                image.pixels.size());
    write_png(format("%s/%06lld.png", folder.c_str(), static_cast<long long>(first + i)), image,
              files);
  }
}

}  // namespace ddpm::tools
