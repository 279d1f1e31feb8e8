#include "tools/image.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "kernels/error.h"

namespace ddpm::tools {
namespace {

struct Rgba {
  int r, g, b, a;
};

Rgba read_pixel(const uint8_t* p, int c) {
  switch (c) {
    case 1:
      return {p[0], p[0], p[0], 255};
    case 2:
      return {p[0], p[0], p[0], p[1]};
    case 3:
      return {p[0], p[1], p[2], 255};
    default:
      return {p[0], p[1], p[2], p[3]};
  }
}

void write_pixel(Rgba v, uint8_t* p, int c) {
  if (c == 4) {
    p[3] = static_cast<uint8_t>(v.a);
  } else {
    v.r = (v.r * v.a + 127) / 255;
    v.g = (v.g * v.a + 127) / 255;
    v.b = (v.b * v.a + 127) / 255;
  }
  if (c == 1) {
    p[0] = static_cast<uint8_t>((77 * v.r + 150 * v.g + 29 * v.b + 128) >> 8);
    return;
  }
  p[0] = static_cast<uint8_t>(v.r);
  p[1] = static_cast<uint8_t>(v.g);
  p[2] = static_cast<uint8_t>(v.b);
}

// One output position of one axis: weights of the input positions from `first` on. The weights of
// every position sum to the axis's `sum`.
struct Tap {
  int first;
  std::vector<uint32_t> weights;
};

struct Axis {
  uint32_t sum;
  std::vector<Tap> taps;  // one per output position
};

// Lengths are <= kMaxImageSide, so every product below fits easily in 32 bits.
Axis make_axis(int from, int to) {
  Axis axis;
  axis.taps.resize(static_cast<size_t>(to));
  axis.sum = static_cast<uint32_t>(to <= from ? from : 2 * to);
  for (int i = 0; i < to; ++i) {
    Tap& tap = axis.taps[static_cast<size_t>(i)];
    if (to <= from) {
      // In units of 1/to of an input pixel, output i is [i from, (i+1) from), input j [j to, (j+1)
      // to).
      const int low = i * from, high = low + from;
      tap.first = low / to;
      for (int j = tap.first; j * to < high; ++j)
        tap.weights.push_back(
            static_cast<uint32_t>(std::min(high, (j + 1) * to) - std::max(low, j * to)));
    } else {
      // Centre of output i in units of 1/(2 to) of an input pixel, from the centre of input 0.
      const int at = std::clamp((2 * i + 1) * from - to, 0, (from - 1) * 2 * to);
      tap.first = at / (2 * to);
      const int part = at % (2 * to);
      tap.weights.push_back(static_cast<uint32_t>(2 * to - part));
      if (part > 0) tap.weights.push_back(static_cast<uint32_t>(part));
    }
  }
  return axis;
}

Image crop_to_aspect(const Image& image, int h, int w) {
  // Whole pixels, rounded to nearest: ch : cw = h : w.
  int ch = image.h, cw = image.w;
  if (int64_t{image.w} * h > int64_t{image.h} * w)
    cw = std::max<int>(1, static_cast<int>((2 * int64_t{image.h} * w + h) / (2 * h)));
  else
    ch = std::max<int>(1, static_cast<int>((2 * int64_t{image.w} * h + w) / (2 * w)));
  cw = std::min(cw, image.w);
  ch = std::min(ch, image.h);
  const int y0 = (image.h - ch) / 2, x0 = (image.w - cw) / 2;
  Image out = make_image(ch, cw, image.c);
  const size_t row = static_cast<size_t>(cw) * image.c;
  for (int y = 0; y < ch; ++y)
    std::memcpy(out.pixels.data() + static_cast<size_t>(y) * row,
                image.pixels.data() + (static_cast<size_t>(y0 + y) * image.w + x0) * image.c, row);
  return out;
}

Image resize(const Image& image, int h, int w) {
  const Axis rows = make_axis(image.h, h), columns = make_axis(image.w, w);
  const size_t c = static_cast<size_t>(image.c);
  // Along x first: (image.h, w, c) sums of at most 255 * columns.sum.
  std::vector<uint32_t> wide(static_cast<size_t>(image.h) * w * c, 0);
  for (int y = 0; y < image.h; ++y) {
    const uint8_t* in = image.pixels.data() + static_cast<size_t>(y) * image.w * c;
    uint32_t* out = wide.data() + static_cast<size_t>(y) * w * c;
    for (const Tap& tap : columns.taps) {
      const uint8_t* p = in + static_cast<size_t>(tap.first) * c;
      for (const uint32_t weight : tap.weights)
        for (size_t k = 0; k < c; ++k) out[k] += weight * *p++;
      out += c;
    }
  }
  Image result = make_image(h, w, image.c);
  const size_t row = static_cast<size_t>(w) * c;
  const uint64_t total = uint64_t{rows.sum} * columns.sum;
  std::vector<uint64_t> sum(row);
  for (int y = 0; y < h; ++y) {
    const Tap& tap = rows.taps[static_cast<size_t>(y)];
    std::fill(sum.begin(), sum.end(), uint64_t{0});
    const uint32_t* in = wide.data() + static_cast<size_t>(tap.first) * row;
    for (const uint32_t weight : tap.weights)
      for (size_t i = 0; i < row; ++i) sum[i] += uint64_t{weight} * *in++;
    for (size_t i = 0; i < row; ++i)
      result.pixels[static_cast<size_t>(y) * row + i] =
          static_cast<uint8_t>((2 * sum[i] + total) / (2 * total));
  }
  return result;
}

}  // namespace

Image make_image(int h, int w, int c, uint8_t value) {
  return {h, w, c, std::vector<uint8_t>(static_cast<size_t>(h) * w * c, value)};
}

Image convert_channels(const Image& image, int channels) {
  DDPM_CHECK(image.c >= 1 && image.c <= 4 && (channels == 1 || channels == 3 || channels == 4),
             "channels %d to %d", image.c, channels);
  if (image.c == channels) return image;
  Image out = make_image(image.h, image.w, channels);
  const size_t pixels = static_cast<size_t>(image.h) * image.w;
  for (size_t i = 0; i < pixels; ++i)
    write_pixel(read_pixel(image.pixels.data() + i * image.c, image.c),
                out.pixels.data() + i * channels, channels);
  return out;
}

Image crop_and_resize(const Image& image, int h, int w) {
  DDPM_CHECK(h > 0 && w > 0 && h <= kMaxImageSide && w <= kMaxImageSide &&
                 image.h <= kMaxImageSide && image.w <= kMaxImageSide,
             "resize %dx%d to %dx%d", image.h, image.w, h, w);
  if (image.h == h && image.w == w) return image;
  const Image cropped = crop_to_aspect(image, h, w);
  return cropped.h == h && cropped.w == w ? cropped : resize(cropped, h, w);
}

int display_scale(int h, int w) { return std::max(1, 64 / std::max(1, std::min(h, w))); }

Image image_grid(const uint8_t* images, int64_t count, int h, int w, int c, int scale,
                 int64_t columns) {
  DDPM_CHECK(count > 0 && h > 0 && w > 0 && scale > 0, "grid of %lld images of %dx%dx%d",
             static_cast<long long>(count), h, w, c);
  constexpr int kGap = 2;
  if (columns == 0)
    columns = static_cast<int64_t>(std::ceil(std::sqrt(static_cast<double>(count))));
  const int64_t rows = (count + columns - 1) / columns;
  const int64_t cell_h = int64_t{h} * scale + kGap, cell_w = int64_t{w} * scale + kGap;
  const int64_t grid_h = rows * cell_h + kGap, grid_w = columns * cell_w + kGap;
  constexpr int64_t kMaxSide = 1000000;  // of the PNG format's usual readers
  if (grid_h > kMaxSide || grid_w > kMaxSide)
    fail(Status::kUsage, "a grid of %lld images of %dx%d is too large; write a folder or an .npz",
         static_cast<long long>(count), h, w);
  Image grid = make_image(static_cast<int>(grid_h), static_cast<int>(grid_w), c, 255);
  for (int64_t i = 0; i < count; ++i) {
    const uint8_t* in = images + i * h * w * c;
    const int64_t y0 = kGap + i / columns * cell_h, x0 = kGap + i % columns * cell_w;
    for (int64_t y = 0; y < int64_t{h} * scale; ++y)
      for (int64_t x = 0; x < int64_t{w} * scale; ++x)
        std::memcpy(grid.pixels.data() + ((y0 + y) * grid_w + x0 + x) * c,
                    in + (y / scale * w + x / scale) * c, static_cast<size_t>(c));
  }
  return grid;
}

}  // namespace ddpm::tools
