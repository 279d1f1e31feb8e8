// libpng's classic interface. Errors jump: the functions that set a jump hold no object with a
// destructor, and whatever must be freed belongs to the caller's frame.
#include <png.h>

#include <algorithm>
#include <csetjmp>
#include <cstdio>
#include <cstring>

#include "kernels/error.h"
#include "tools/image_io.h"

namespace ddpm::tools {
namespace {

constexpr size_t kMaxChunk = size_t{8} << 20;

struct PngMessages {
  char error[120] = {};
  char warning[120] = {};
};

void on_error(png_structp png, png_const_charp text) {
  auto* m = static_cast<PngMessages*>(png_get_error_ptr(png));
  std::snprintf(m->error, sizeof m->error, "%s", text);
  png_longjmp(png, 1);
}

// Kept only to explain an error that follows ("Invalid IHDR data" alone says little).
void on_warning(png_structp png, png_const_charp text) {
  auto* m = static_cast<PngMessages*>(png_get_error_ptr(png));
  std::snprintf(m->warning, sizeof m->warning, ": %s", text);
}

struct PngReader {
  std::span<const uint8_t> rest;
  PngMessages messages;
  png_structp png = nullptr;
  png_infop info = nullptr;

  explicit PngReader(std::span<const uint8_t> bytes) : rest(bytes) {
    png = png_create_read_struct(PNG_LIBPNG_VER_STRING, &messages, on_error, on_warning);
    if (png) info = png_create_info_struct(png);
    if (!info) {
      png_destroy_read_struct(&png, nullptr, nullptr);
      fail(Status::kMemory, "no memory to read a PNG file");
    }
  }
  ~PngReader() { png_destroy_read_struct(&png, &info, nullptr); }
  PngReader(const PngReader&) = delete;
  PngReader& operator=(const PngReader&) = delete;
};

void read_bytes(png_structp png, png_bytep out, size_t count) {
  auto* r = static_cast<PngReader*>(png_get_io_ptr(png));
  if (count > r->rest.size()) png_error(png, "the file ends early");
  std::memcpy(out, r->rest.data(), count);
  r->rest = r->rest.subspan(count);
}

bool read_header(PngReader* r) {
  if (setjmp(png_jmpbuf(r->png))) return false;
  png_set_read_fn(r->png, r, read_bytes);
  png_set_user_limits(r->png, kMaxImageSide, kMaxImageSide);
  // Only what the pixels need is parsed: palette, transparency, data. Every chunk's CRC counts.
  png_set_keep_unknown_chunks(r->png, PNG_HANDLE_CHUNK_NEVER, nullptr, -1);
  png_set_crc_action(r->png, PNG_CRC_ERROR_QUIT, PNG_CRC_ERROR_QUIT);
  png_read_info(r->png, r->info);
  if (int64_t{png_get_image_width(r->png, r->info)} * png_get_image_height(r->png, r->info) >
      kMaxImagePixels)
    png_error(r->png, "more than 64 Mi pixels");
  png_set_expand(r->png);
  png_set_scale_16(r->png);
  png_set_interlace_handling(r->png);
  png_read_update_info(r->png, r->info);
  return true;
}

bool read_pixels(PngReader* r, png_bytep* rows) {
  if (setjmp(png_jmpbuf(r->png))) return false;
  png_read_image(r->png, rows);
  png_read_end(r->png, nullptr);
  return true;
}

[[noreturn]] void fail_png(const PngReader& r, const std::string& name) {
  fail(Status::kFile, "%s: unusable PNG file (%s%s); replace or remove it", name.c_str(),
       r.messages.error, r.messages.warning);
}

struct PngWriter {
  std::vector<uint8_t> bytes;
  PngMessages messages;
  png_structp png = nullptr;
  png_infop info = nullptr;

  PngWriter() {
    png = png_create_write_struct(PNG_LIBPNG_VER_STRING, &messages, on_error, on_warning);
    if (png) info = png_create_info_struct(png);
    if (!info) {
      png_destroy_write_struct(&png, nullptr);
      fail(Status::kMemory, "no memory to write a PNG file");
    }
  }
  ~PngWriter() { png_destroy_write_struct(&png, &info); }
  PngWriter(const PngWriter&) = delete;
  PngWriter& operator=(const PngWriter&) = delete;

  // No exception may cross libpng's frames.
  bool append(const uint8_t* data, size_t count) noexcept {
    try {
      bytes.insert(bytes.end(), data, data + count);
      return true;
    } catch (const std::bad_alloc&) {
      return false;
    }
  }
};

void append_bytes(png_structp png, png_bytep data, size_t count) {
  if (!static_cast<PngWriter*>(png_get_io_ptr(png))->append(data, count))
    png_error(png, "no memory");
}

void flush_bytes(png_structp) {}

bool write_pixels(PngWriter* w, const Image* image, int color_type) {
  if (setjmp(png_jmpbuf(w->png))) return false;
  png_set_write_fn(w->png, w, append_bytes, flush_bytes);
  png_set_IHDR(w->png, w->info, static_cast<png_uint_32>(image->w),
               static_cast<png_uint_32>(image->h), 8, color_type, PNG_INTERLACE_NONE,
               PNG_COMPRESSION_TYPE_DEFAULT, PNG_FILTER_TYPE_DEFAULT);
  png_write_info(w->png, w->info);
  for (int y = 0; y < image->h; ++y)
    png_write_row(w->png, image->pixels.data() + static_cast<size_t>(y) * image->w * image->c);
  png_write_end(w->png, nullptr);
  return true;
}

// Length of each chunk, before anything is decoded: only the pixels may be long.
void check_chunks(std::span<const uint8_t> bytes, const std::string& name) {
  constexpr size_t kSignature = 8, kAround = 12;  // length, type, CRC
  for (uint64_t at = kSignature; at + kAround <= bytes.size();) {
    const uint8_t* p = bytes.data() + at;
    const uint32_t length = png_get_uint_32(p);
    if (length > kMaxChunk && std::memcmp(p + 4, "IDAT", 4) != 0)
      fail(Status::kFile, "%s: unusable PNG file (a chunk of %u bytes is too large); save it anew",
           name.c_str(), length);
    at += kAround + uint64_t{length};
  }
}

}  // namespace

Image decode_png(std::span<const uint8_t> bytes, const std::string& name) {
  check_chunks(bytes, name);
  PngReader r(bytes);
  if (!read_header(&r)) fail_png(r, name);
  Image image = make_image(static_cast<int>(png_get_image_height(r.png, r.info)),
                           static_cast<int>(png_get_image_width(r.png, r.info)),
                           png_get_channels(r.png, r.info));
  const size_t row = static_cast<size_t>(image.w) * image.c;
  DDPM_CHECK(png_get_rowbytes(r.png, r.info) == row, "PNG rows of %zu bytes", row);
  std::vector<png_bytep> rows(static_cast<size_t>(image.h));
  for (size_t y = 0; y < rows.size(); ++y) rows[y] = image.pixels.data() + y * row;
  if (!read_pixels(&r, rows.data())) fail_png(r, name);
  return image;
}

std::vector<uint8_t> encode_png(const Image& image) {
  constexpr int kColorTypes[] = {PNG_COLOR_TYPE_GRAY, PNG_COLOR_TYPE_GA, PNG_COLOR_TYPE_RGB,
                                 PNG_COLOR_TYPE_RGBA};
  if (image.h < 1 || image.w < 1 || image.c < 1 || image.c > 4)
    fail(Status::kUsage, "a PNG holds 1 to 4 channels, not %dx%dx%d; write .npz or .safetensors",
         image.h, image.w, image.c);
  PngWriter w;
  if (!write_pixels(&w, &image, kColorTypes[image.c - 1]))
    fail(Status::kMemory, "cannot encode a PNG of %dx%d (%s%s)", image.h, image.w, w.messages.error,
         w.messages.warning);
  return std::move(w.bytes);
}

bool images_built() { return true; }

}  // namespace ddpm::tools
