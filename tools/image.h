// One uint8 image in memory, and what is done to it without any image library.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace ddpm::tools {

// Channels: 1 gray, 2 gray and alpha, 3 RGB, 4 RGB and alpha (straight, not premultiplied).
struct Image {
  int h = 0, w = 0, c = 0;
  std::vector<uint8_t> pixels;  // (H,W,C)
};

constexpr int kMaxImageSide = 16384;
constexpr int64_t kMaxImagePixels = int64_t{64} << 20;

Image make_image(int h, int w, int c, uint8_t value = 0);

// To 1, 3 or 4 channels. Where alpha is dropped the image is laid over black; gray is luma
// (0.30 R + 0.59 G + 0.11 B); an added alpha is opaque.
Image convert_channels(const Image& image, int channels);

// The largest centred part with the aspect h : w, to whole pixels, then each axis on its own: exact
// area average where it shrinks, linear interpolation where it grows. Integers only, rounded to
// nearest, so the result is the same everywhere. Alpha is treated as any other channel.
Image crop_and_resize(const Image& image, int h, int w);

// The largest whole scale that keeps an image's shorter side within 64 pixels; at least 1.
int display_scale(int h, int w);

// `count` images (H,W,C) in rows of `columns` (0: near-square) from the top left, 2 pixels between
// and around them, each pixel repeated scale x scale times.
Image image_grid(const uint8_t* images, int64_t count, int h, int w, int c, int scale,
                 int64_t columns = 0);

}  // namespace ddpm::tools
