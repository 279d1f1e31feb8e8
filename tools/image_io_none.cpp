// Stands in for the codecs where libpng or libjpeg-turbo is absent.
#include "kernels/error.h"
#include "tools/image_io.h"

namespace ddpm::tools {
namespace {

[[noreturn]] void refuse() {
  fail(Status::kConfig,
       "this program was built without PNG and JPEG; install libpng-dev and libjpeg-dev and build "
       "it again with DDPM_IMAGES=ON, or use packed .safetensors files");
}

}  // namespace

Image decode_png(std::span<const uint8_t>, const std::string&) { refuse(); }
Image decode_jpeg(std::span<const uint8_t>, const std::string&) { refuse(); }
std::vector<uint8_t> encode_png(const Image&) { refuse(); }

bool images_built() { return false; }

}  // namespace ddpm::tools
