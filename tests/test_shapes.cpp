#include "engine/shapes.h"

#include <algorithm>
#include <array>
#include <catch2/catch.hpp>
#include <cstdlib>
#include <numbers>
#include <set>

#include "tests/data_files.h"

using namespace ddpm;
using namespace ddpm::test;

namespace {

uint64_t fnv1a(const std::vector<uint8_t>& bytes) {
  uint64_t hash = 0xCBF29CE484222325u;
  for (const uint8_t b : bytes) hash = (hash ^ b) * 0x100000001B3u;
  return hash;
}

// How much of each pixel of a drawn image the shape covers, from its colours alone: the corner is
// background, the shape's own colour is the pixel farthest from it.
struct Coverage {
  double area = 0, width = 0, height = 0;  // widest row, highest column
};

Coverage measure(const uint8_t* image, int h, int w, int c) {
  const auto distance = [&](int i) {
    int d = 0;
    for (int k = 0; k < std::min(c, 3); ++k) d += std::abs(image[i * c + k] - image[k]);
    return d;
  };
  int farthest = 0;
  for (int i = 0; i < h * w; ++i) farthest = std::max(farthest, distance(i));
  Coverage m;
  std::vector<double> columns(static_cast<size_t>(w), 0.0);
  for (int y = 0; y < h; ++y) {
    double row = 0;
    for (int x = 0; x < w; ++x) {
      const double cover = static_cast<double>(distance(y * w + x)) / farthest;
      row += cover;
      columns[static_cast<size_t>(x)] += cover;
    }
    m.area += row;
    m.width = std::max(m.width, row);
  }
  m.height = *std::max_element(columns.begin(), columns.end());
  return m;
}

}  // namespace

TEST_CASE("shapes: image i is a fixed function of i and the size", "[shapes]") {
  const Dataset d = make_shapes(300, {1, 16, 16, 3});
  CHECK(d.images.size() == 300u * 16 * 16 * 3);
  CHECK(d.class_names == std::vector<std::string>{"disc", "square", "triangle"});
  // Frozen: runs and their figures refer to these very pixels.
  CHECK(fnv1a(d.images) == 0x12EE17B2F9FFC063u);
  const Dataset few = make_shapes(7, {1, 16, 16, 3});
  CHECK(std::equal(few.images.begin(), few.images.end(), d.images.begin()));
  CHECK(std::equal(few.labels.begin(), few.labels.end(), d.labels.begin()));
}

TEST_CASE("shapes: the label is what is drawn, whole and inside", "[shapes]") {
  // Covered area over (widest row x highest column). Pixels cost the disc and the triangle up to
  // one row or column of each extent, >= 2/56 of it at this size.
  const double expected[] = {std::numbers::pi / 4, 1.0, 0.5};
  for (const Shape s : {Shape{1, 128, 128, 3}, Shape{1, 128, 200, 3}, Shape{1, 200, 128, 3}}) {
    const Dataset d = make_shapes(60, s);
    for (int64_t i = 0; i < d.count; ++i) {
      const Coverage m = measure(d.image(i), s.h, s.w, s.c);
      INFO("image " << i << " label " << d.labels[i]);
      CHECK(m.area / (m.width * m.height) == Approx(expected[d.labels[i]]).margin(0.02));
      CHECK(m.width >= 2 * 0.85 * 3.5 / 16 * 128);
      // A margin of 4 pixels: the frame is plain background.
      const uint8_t* p = d.image(i);
      bool plain = true;
      for (int y = 0; y < s.h; ++y)
        for (int x = 0; x < s.w; ++x)
          if (std::min({x, y, s.w - 1 - x, s.h - 1 - y}) < 3)
            plain = plain && std::equal(p, p + 3, p + (y * s.w + x) * 3);
      CHECK(plain);
    }
  }
}

TEST_CASE("shapes: edges are covered by area, at every size", "[shapes]") {
  // The same figure at 16 and at 128 pixels covers the same part of the image. Rounding to uint8
  // costs at most half a level of the contrast per edge pixel, about 0.3 %.
  const Dataset small = make_shapes(200, {1, 16, 16, 3}),
                large = make_shapes(200, {1, 128, 128, 3});
  for (int64_t i = 0; i < small.count; ++i) {
    const Coverage a = measure(small.image(i), 16, 16, 3), b = measure(large.image(i), 128, 128, 3);
    INFO("image " << i);
    CHECK(a.area * 64 == Approx(b.area).epsilon(0.01));
  }
}

TEST_CASE("shapes: classes, colours and places are all used", "[shapes]") {
  const int n = 3000;
  const Dataset d = make_shapes(n, {1, 32, 32, 3});  // corners are background from this size on
  std::array<int, 3> classes{};
  std::set<std::array<uint8_t, 3>> backgrounds;
  for (int i = 0; i < n; ++i) {
    ++classes.at(static_cast<size_t>(d.labels[i]));
    const uint8_t* p = d.image(i);
    backgrounds.insert({p[0], p[1], p[2]});
  }
  for (const int count : classes) CHECK(std::abs(count - n / 3) < 130);  // 5 sigma of a fair draw
  CHECK(backgrounds.size() == 4);
}

TEST_CASE("shapes: channels", "[shapes]") {
  const Dataset rgb = make_shapes(50, {1, 20, 16, 3}), gray = make_shapes(50, {1, 20, 16, 1}),
                rgba = make_shapes(50, {1, 20, 16, 4});
  CHECK(gray.labels == rgb.labels);
  int worst = 0, wrong = 0;
  for (size_t i = 0; i < gray.images.size(); ++i) {
    const uint8_t *p = &rgb.images[i * 3], *q = &rgba.images[i * 4];
    // Rounded once per colour and once per blend, hence two levels.
    worst = std::max(worst, std::abs((77 * p[0] + 150 * p[1] + 29 * p[2]) / 256 - gray.images[i]));
    wrong += q[0] != p[0] || q[1] != p[1] || q[2] != p[2] || q[3] != 255;
  }
  CHECK(worst <= 2);
  CHECK(wrong == 0);
  CHECK(thrown_by([] { make_shapes(1, {1, 16, 16, 2}); }).status == Status::kConfig);
  for (const Shape s : {Shape{1, 1, 1, 3}, Shape{1, 1, 9, 1}, Shape{1, 5, 3, 4}, Shape{1, 2, 2, 3}})
    CHECK(make_shapes(20, s).images.size() == static_cast<size_t>(20 * s.count()));
}

TEST_CASE("shapes: any part of the endless set", "[shapes]") {
  const Shape s{1, 8, 8, 3};
  const Dataset all = make_shapes(10, s), part = make_shapes(3, s, 7);
  CHECK(std::equal(part.images.begin(), part.images.end(), all.image(7)));
  CHECK(std::equal(part.labels.begin(), part.labels.end(), all.labels.begin() + 7));
}

TEST_CASE("shapes_count: 50,000 images or 1 GiB", "[shapes]") {
  CHECK(shapes_count({1, 16, 16, 3}) == 50000);
  CHECK(shapes_count({1, 64, 64, 3}) == 50000);
  CHECK(shapes_count({1, 256, 256, 3}) == 5461);
  CHECK(shapes_count({1, 16384, 16384, 4}) == 1);
}
