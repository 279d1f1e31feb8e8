// PNG and JPEG: reading with limits, writing PNG. The codecs need libpng and libjpeg-turbo; a
// program built without them links image_io_none.cpp, which refuses with a message.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "tools/image.h"

namespace ddpm::tools {

enum class ImageFormat { kNone, kPng, kJpeg };

// By the first bytes, never by the file's name.
ImageFormat sniff_format(std::span<const uint8_t> bytes);

// A whole PNG or JPEG file, as stored: 1, 2, 3 or 4 channels (16 bits are scaled to 8, palettes
// expanded; colour profiles and orientation tags are ignored). `name` is for messages.
// Error(kFile): damaged, truncated, wrong checksum, above the limits (16,384 pixels a side, 64 Mi
// pixels, 8 MiB per PNG chunk besides the pixels, 100 JPEG scans), or a CMYK JPEG.
Image decode_image(std::span<const uint8_t> bytes, const std::string& name);
Image read_image(const std::string& path);

// 1 to 4 channels, 8 bits, no time or comment: equal images give equal bytes.
std::vector<uint8_t> encode_png(const Image& image);
void write_png(const std::string& path, const Image& image);

// `count` images (H,W,C) as folder/000000.png, ...: numbers from `first` on, at least 6 digits.
// Makes the folder. A power cut may lose files written just before it.
void write_png_folder(const std::string& folder, const uint8_t* images, int64_t count, int h, int w,
                      int c, int64_t first);

// Whether this program has the codecs.
bool images_built();

// The codecs behind decode_image.
Image decode_png(std::span<const uint8_t> bytes, const std::string& name);
Image decode_jpeg(std::span<const uint8_t> bytes, const std::string& name);

}  // namespace ddpm::tools
