#include "tests/fuzz/fuzz.h"
#include "tools/image_io.h"

using namespace ddpm;

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  return fuzz::parse([&] {
    const tools::Image image = tools::decode_jpeg({data, size}, "a.jpg");
    if (image.pixels.size() != static_cast<size_t>(image.h) * image.w * image.c) std::abort();
  });
}
