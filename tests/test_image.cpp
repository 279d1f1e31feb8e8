#include "tools/image.h"

#include <algorithm>
#include <catch2/catch.hpp>
#include <cmath>

#include "tests/support.h"

using namespace ddpm;
using namespace ddpm::tools;

namespace {

Image random_image(int h, int w, int c, uint64_t seed) {
  Image image = make_image(h, w, c);
  const auto values =
      test::random_values(static_cast<int64_t>(image.pixels.size()), seed, 128, 128);
  for (size_t i = 0; i < values.size(); ++i)
    image.pixels[i] = static_cast<uint8_t>(std::min(values[i], 255.0f));
  return image;
}

// One axis in double: the weight of input j in output i.
double axis_weight(int from, int to, int i, int j) {
  const double step = static_cast<double>(from) / to;
  if (to <= from) {
    const double low = std::max<double>(j, i * step),
                 high = std::min<double>(j + 1, (i + 1) * step);
    return std::max(0.0, high - low) / step;
  }
  const double centre = std::clamp((i + 0.5) * step - 0.5, 0.0, from - 1.0);
  return std::max(0.0, 1 - std::abs(centre - j));
}

std::vector<double> resize_reference(const Image& in, int h, int w) {
  std::vector<double> out(static_cast<size_t>(h) * w * in.c, 0.0);
  for (int y = 0; y < h; ++y)
    for (int x = 0; x < w; ++x)
      for (int k = 0; k < in.c; ++k)
        for (int v = 0; v < in.h; ++v)
          for (int u = 0; u < in.w; ++u)
            out[static_cast<size_t>((y * w + x) * in.c + k)] +=
                axis_weight(in.h, h, y, v) * axis_weight(in.w, w, x, u) *
                in.pixels[static_cast<size_t>((v * in.w + u) * in.c + k)];
  return out;
}

}  // namespace

TEST_CASE("convert_channels: every pair", "[image]") {
  const auto convert = [](std::vector<uint8_t> pixel, int to) {
    return convert_channels({1, 1, static_cast<int>(pixel.size()), pixel}, to).pixels;
  };
  using Pixel = std::vector<uint8_t>;
  CHECK(convert({77}, 1) == Pixel{77});
  CHECK(convert({77}, 3) == Pixel{77, 77, 77});
  CHECK(convert({77}, 4) == Pixel{77, 77, 77, 255});
  CHECK(convert({200, 51}, 1) == Pixel{40});  // 200 x 51 / 255, over black
  CHECK(convert({200, 51}, 3) == Pixel{40, 40, 40});
  CHECK(convert({200, 51}, 4) == Pixel{200, 200, 200, 51});
  CHECK(convert({255, 0, 0}, 1) == Pixel{77});
  CHECK(convert({0, 255, 0}, 1) == Pixel{149});
  CHECK(convert({0, 0, 255}, 1) == Pixel{29});
  CHECK(convert({255, 255, 255}, 1) == Pixel{255});
  CHECK(convert({10, 20, 30}, 3) == Pixel{10, 20, 30});
  CHECK(convert({10, 20, 30}, 4) == Pixel{10, 20, 30, 255});
  CHECK(convert({10, 20, 30, 40}, 4) == Pixel{10, 20, 30, 40});
  CHECK(convert({255, 100, 10, 51}, 3) == Pixel{51, 20, 2});
  CHECK(convert({255, 255, 255, 128}, 1) == Pixel{128});
  CHECK(convert({9, 9, 9, 255}, 3) == Pixel{9, 9, 9});
  CHECK(convert({9, 9, 9, 0}, 3) == Pixel{0, 0, 0});
}

TEST_CASE("crop_and_resize: area average down, linear up, against double", "[image]") {
  const int sizes[][4] = {{32, 32, 16, 16}, {32, 32, 11, 11}, {7, 7, 5, 5},     {13, 13, 1, 1},
                          {1, 1, 9, 9},     {5, 5, 7, 7},     {16, 16, 32, 32}, {3, 3, 64, 64},
                          {20, 30, 10, 15}, {20, 30, 8, 12},  {9, 6, 15, 10},   {31, 31, 30, 30},
                          {30, 30, 31, 31}, {2, 2, 3, 3},     {64, 48, 4, 3},   {12, 1, 24, 2}};
  for (const int c : {1, 3, 4})
    for (const auto& s : sizes) {
      const Image in = random_image(s[0], s[1], c, static_cast<uint64_t>(s[0] * 100 + s[2]));
      const Image out = crop_and_resize(in, s[2], s[3]);
      const auto truth = resize_reference(in, s[2], s[3]);
      INFO(s[0] << "x" << s[1] << " to " << s[2] << "x" << s[3] << "x" << c);
      REQUIRE(out.pixels.size() == truth.size());
      double worst = 0;
      for (size_t i = 0; i < truth.size(); ++i)
        worst = std::max(worst, std::abs(truth[i] - out.pixels[i]));
      CHECK(worst <= 0.5 + 1e-9);  // rounding to nearest, and the truth's own error
    }
}

TEST_CASE("crop_and_resize: keeps the centre of the longer side", "[image]") {
  Image wide = make_image(4, 11, 1);
  for (int x = 0; x < 11; ++x)
    for (int y = 0; y < 4; ++y)
      wide.pixels[static_cast<size_t>(y * 11 + x)] = static_cast<uint8_t>(x);
  const Image square = crop_and_resize(wide, 4, 4);  // columns 3..6 of 0..10
  CHECK(std::vector<uint8_t>(square.pixels.begin(), square.pixels.begin() + 4) ==
        std::vector<uint8_t>{3, 4, 5, 6});
  Image high = make_image(10, 2, 1);
  for (int y = 0; y < 10; ++y) high.pixels[static_cast<size_t>(2 * y)] = static_cast<uint8_t>(y);
  const Image part = crop_and_resize(high, 4, 2);
  CHECK(part.pixels == std::vector<uint8_t>{3, 0, 4, 0, 5, 0, 6, 0});
  CHECK(crop_and_resize(high, 10, 2).pixels == high.pixels);
  const Image thin = crop_and_resize(make_image(1, 100, 3, 9), 100, 1);
  CHECK((thin.h == 100 && thin.w == 1 && thin.pixels == std::vector<uint8_t>(300, 9)));
}

TEST_CASE("crop_and_resize: a plain image stays plain at extreme scales", "[image]") {
  for (const auto& s : {std::pair{4096, 3}, std::pair{3, 4096}, std::pair{16384, 1}}) {
    const Image out = crop_and_resize(make_image(s.first, 1, 1, 255), s.second, 1);
    CHECK(std::all_of(out.pixels.begin(), out.pixels.end(), [](uint8_t v) { return v == 255; }));
  }
}

TEST_CASE("image_grid: near-square, 2 pixels apart, repeated pixels", "[image]") {
  std::vector<uint8_t> images;
  for (uint8_t i = 0; i < 5; ++i)
    for (uint8_t p = 0; p < 6; ++p) images.push_back(static_cast<uint8_t>(10 * i + p));
  const Image grid = image_grid(images.data(), 5, 2, 3, 1, 2);  // 3 columns, 2 rows
  CHECK((grid.h == 2 * (2 * 2 + 2) + 2 && grid.w == 3 * (3 * 2 + 2) + 2));
  int wrong = 0;
  for (int y = 0; y < grid.h; ++y)
    for (int x = 0; x < grid.w; ++x) {
      const int row = (y - 2) / 6, column = (x - 2) / 8, v = (y - 2) % 6, u = (x - 2) % 8;
      const int i = row * 3 + column;
      int expected = 255;
      if (y >= 2 && x >= 2 && v < 4 && u < 6 && i < 5) expected = 10 * i + v / 2 * 3 + u / 2;
      wrong += grid.pixels[static_cast<size_t>(y * grid.w + x)] != expected;
    }
  CHECK(wrong == 0);
  CHECK(image_grid(images.data(), 1, 2, 3, 1, 1).w == 7);
  const Image row = image_grid(images.data(), 5, 2, 3, 1, 1, 5);
  CHECK((row.h == 6 && row.w == 5 * 5 + 2));
  CHECK(row.pixels[static_cast<size_t>(2 * row.w + 4 * 5 + 2)] == 40);
  CHECK(display_scale(16, 16) == 4);
  CHECK(display_scale(32, 48) == 2);
  CHECK(display_scale(256, 256) == 1);
}
