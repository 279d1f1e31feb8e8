// A PNG's chunks carry checksums, so what libFuzzer changes is given right ones again, half of the
// time.
#include <zlib.h>

#include "tests/fuzz/fuzz.h"
#include "tools/image_io.h"

using namespace ddpm;

namespace {

uint32_t big_endian(const uint8_t* p) {
  return uint32_t{p[0]} << 24 | uint32_t{p[1]} << 16 | uint32_t{p[2]} << 8 | p[3];
}

// Of every chunk that lies whole in the file.
void mend_checksums(uint8_t* data, size_t size) {
  for (size_t at = 8; at + 12 <= size;) {
    const size_t length = big_endian(data + at);
    if (length > size - at - 12) return;
    const uLong crc = crc32(0, data + at + 4, static_cast<uInt>(length + 4));
    for (int i = 0; i < 4; ++i)
      data[at + 8 + length + static_cast<size_t>(i)] = static_cast<uint8_t>(crc >> (24 - 8 * i));
    at += 12 + length;
  }
}

}  // namespace

extern "C" size_t LLVMFuzzerCustomMutator(uint8_t* data, size_t size, size_t max_size,
                                          unsigned seed) {
  size = LLVMFuzzerMutate(data, size, max_size);
  if (seed % 2 == 0) mend_checksums(data, size);
  return size;
}

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  return fuzz::parse([&] {
    const tools::Image image = tools::decode_png({data, size}, "a.png");
    if (image.pixels.size() != static_cast<size_t>(image.h) * image.w * image.c) std::abort();
  });
}
