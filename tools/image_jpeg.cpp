// libjpeg-turbo's classic interface. Errors jump: the functions that set a jump hold no object with
// a destructor, and whatever must be freed belongs to the caller's frame.
#include <csetjmp>
#include <cstdio>
// jpeglib.h needs stdio's FILE and size_t declared before it.
#include <jpeglib.h>

#include "kernels/error.h"
#include "tools/image_io.h"

namespace ddpm::tools {
namespace {

constexpr int kMaxScans = 100;  // a small progressive file can cost a minute otherwise

struct JpegReader {
  jpeg_decompress_struct info = {};
  jpeg_error_mgr errors = {};
  jpeg_progress_mgr progress = {};
  std::jmp_buf jump = {};
  char message[JMSG_LENGTH_MAX] = {};

  JpegReader() = default;
  ~JpegReader() { jpeg_destroy_decompress(&info); }  // fine on a struct that was never created
  JpegReader(const JpegReader&) = delete;
  JpegReader& operator=(const JpegReader&) = delete;
};

[[noreturn]] void on_error(j_common_ptr info) {
  auto* r = static_cast<JpegReader*>(info->client_data);
  info->err->format_message(info, r->message);
  std::longjmp(r->jump, 1);
}

// libjpeg's warnings (level < 0) mean damaged data that it would paper over.
void on_message(j_common_ptr info, int level) {
  if (level < 0) on_error(info);
}

[[noreturn]] void refuse(JpegReader* r, const char* why) {
  std::snprintf(r->message, sizeof r->message, "%s", why);
  std::longjmp(r->jump, 1);
}

void on_progress(j_common_ptr info) {
  auto* r = static_cast<JpegReader*>(info->client_data);
  if (r->info.input_scan_number > kMaxScans) refuse(r, "more than 100 scans");
}

bool read_header(JpegReader* r, const uint8_t* bytes, size_t size) {
  r->info.err = jpeg_std_error(&r->errors);
  r->errors.error_exit = on_error;
  r->errors.emit_message = on_message;
  r->info.client_data = r;
  if (setjmp(r->jump)) return false;
  jpeg_create_decompress(&r->info);
  r->progress.progress_monitor = on_progress;
  r->info.progress = &r->progress;
  jpeg_mem_src(&r->info, bytes, size);
  jpeg_read_header(&r->info, TRUE);
  if (r->info.image_width > kMaxImageSide || r->info.image_height > kMaxImageSide)
    refuse(r, "more than 16384 pixels a side");
  if (int64_t{r->info.image_width} * r->info.image_height > kMaxImagePixels)
    refuse(r, "more than 64 Mi pixels");
  if (r->info.num_components != 1 && r->info.num_components != 3)
    refuse(r, "neither gray nor RGB: convert it to RGB");
  r->info.out_color_space = r->info.num_components == 1 ? JCS_GRAYSCALE : JCS_RGB;
  return true;
}

bool read_pixels(JpegReader* r, uint8_t* pixels, size_t row) {
  if (setjmp(r->jump)) return false;
  jpeg_start_decompress(&r->info);
  while (r->info.output_scanline < r->info.output_height) {
    JSAMPROW out = pixels + r->info.output_scanline * row;
    jpeg_read_scanlines(&r->info, &out, 1);
  }
  jpeg_finish_decompress(&r->info);
  return true;
}

[[noreturn]] void fail_jpeg(const JpegReader& r, const std::string& name) {
  fail(Status::kFile, "%s: unusable JPEG file (%s); replace or remove it", name.c_str(), r.message);
}

}  // namespace

Image decode_jpeg(std::span<const uint8_t> bytes, const std::string& name) {
  JpegReader r;
  if (!read_header(&r, bytes.data(), bytes.size())) fail_jpeg(r, name);
  Image image = make_image(static_cast<int>(r.info.image_height),
                           static_cast<int>(r.info.image_width), r.info.num_components);
  if (!read_pixels(&r, image.pixels.data(), static_cast<size_t>(image.w) * image.c))
    fail_jpeg(r, name);
  return image;
}

}  // namespace ddpm::tools
