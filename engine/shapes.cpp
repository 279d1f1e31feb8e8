#include "engine/shapes.h"

#include <algorithm>
#include <array>
#include <cmath>

#include "kernels/error.h"
#include "kernels/philox.h"

namespace ddpm {
namespace {

constexpr int64_t kFullCount = 50000;
constexpr int64_t kMaxBytes = int64_t{1} << 30;

using Color = std::array<uint8_t, 4>;  // RGBA

// Backgrounds are lighter or darker than every shape, so that luma alone shows the shape as well.
constexpr std::array<Color, 7> kColors = {{{214, 40, 40, 255},
                                           {236, 122, 20, 255},
                                           {236, 190, 24, 255},
                                           {48, 164, 64, 255},
                                           {16, 166, 190, 255},
                                           {40, 96, 220, 255},
                                           {160, 56, 190, 255}}};
constexpr std::array<Color, 4> kBackgrounds = {
    {{244, 242, 236, 255}, {216, 226, 236, 255}, {22, 24, 32, 255}, {40, 44, 58, 255}}};

enum Kind : int { kDisc, kSquare, kTriangle, kKinds };

// One drawn shape, in pixels: it fills y in [top, bottom], and at y the x within half_width of x0.
struct Figure {
  Kind kind;
  double x0, top, bottom, radius;  // radius: of the disc; half a side of the square, the triangle
  Color color, background;

  double half_width(double y) const {
    if (kind == kSquare) return radius;
    if (kind == kTriangle) return radius * (y - top) / (bottom - top);
    const double dy = y - 0.5 * (top + bottom);
    return std::sqrt(std::max(0.0, radius * radius - dy * dy));
  }
};

double between(uint32_t bits, double low, double high) {
  return low + (high - low) * (static_cast<double>(bits) * 0x1p-32);
}

// Only + - * / and sqrt in double: the same bits on every machine.
Figure draw_figure(int64_t index, int h, int w) {
  const RandomStream stream{.purpose = Purpose::kShapes, .sample = static_cast<uint64_t>(index)};
  const Philox4 a = stream.block(0), b = stream.block(1);
  Figure f;
  f.kind = static_cast<Kind>(uniform_below(a[0], kKinds));
  const double unit = std::min(h, w) / 16.0, margin = 0.5 * unit;
  const double size = between(a[1], 4.5, 6.3) * unit;
  // Half the width of each kind, chosen so that the three look equally large.
  f.radius = f.kind == kDisc ? size : f.kind == kSquare ? 0.9 * size : 1.15 * size;
  const double height = f.kind == kTriangle ? f.radius * std::sqrt(3.0) : 2 * f.radius;
  // Near the centre, whole.
  const double dx = between(a[2], -2, 2) * unit, dy = between(a[3], -2, 2) * unit;
  f.x0 = std::clamp(0.5 * w + dx, margin + f.radius, w - f.radius - margin);
  f.top = std::clamp(0.5 * (h - height) + dy, margin, h - height - margin);
  f.bottom = f.top + height;
  f.color = kColors[uniform_below(b[0], kColors.size())];
  f.background = kBackgrounds[uniform_below(b[1], kBackgrounds.size())];
  return f;
}

// Adds weight x (part of pixel right of x) to a running sum: edge[0] + ... + edge[i] grows by it.
void add_edge(double* edge, double x, double weight) {
  const int pixel = static_cast<int>(x);
  const double inside = pixel + 1 - x;
  edge[pixel] += weight * inside;
  edge[pixel + 1] += weight * (1 - inside);
}

// Covered part of each pixel of row y, as differences to the pixel before. Exact along x; along y
// the row's covered interval is cut into strips, each as wide as at its middle.
void cover_row(const Figure& f, int y, int w, std::vector<double>& edge) {
  constexpr int kStrips = 8;
  std::fill(edge.begin(), edge.end(), 0.0);
  const double low = std::max<double>(y, f.top), high = std::min<double>(y + 1, f.bottom);
  if (high <= low) return;
  const double strip = (high - low) / kStrips;
  for (int i = 0; i < kStrips; ++i) {
    const double half = f.half_width(low + (i + 0.5) * strip);
    add_edge(edge.data(), std::clamp<double>(f.x0 - half, 0, w), strip);
    add_edge(edge.data(), std::clamp<double>(f.x0 + half, 0, w), -strip);
  }
}

uint8_t luma(const Color& c) {
  return static_cast<uint8_t>((77 * c[0] + 150 * c[1] + 29 * c[2] + 128) >> 8);
}

void draw(const Figure& f, const Shape& s, std::vector<double>& edge, uint8_t* out) {
  Color front = f.color, back = f.background;
  if (s.c == 1) {
    front[0] = luma(front);
    back[0] = luma(back);
  }
  for (int y = 0; y < s.h; ++y) {
    cover_row(f, y, s.w, edge);
    double cover = 0;
    for (int x = 0; x < s.w; ++x) {
      cover += edge[static_cast<size_t>(x)];
      for (int c = 0; c < s.c; ++c)
        *out++ = static_cast<uint8_t>(back[c] + (front[c] - back[c]) * cover + 0.5);
    }
  }
}

}  // namespace

int64_t shapes_count(const Shape& image) {
  return std::clamp<int64_t>(kMaxBytes / (image.pixels() * image.c), 1, kFullCount);
}

Dataset make_shapes(int64_t count, const Shape& image, int64_t first) {
  if (image.c != 1 && image.c != 3 && image.c != 4)
    fail(Status::kConfig,
         "data set shapes: it has 1, 3 or 4 channels, the model has %d; train on a packed file "
         "(ddpm pack) instead",
         image.c);
  Dataset d = make_dataset(count, image);
  d.labels.resize(static_cast<size_t>(count));
  d.class_names = {"disc", "square", "triangle"};
  std::vector<double> edge(static_cast<size_t>(image.w) + 2);
  for (int64_t i = 0; i < count; ++i) {
    const Figure f = draw_figure(first + i, image.h, image.w);
    d.labels[static_cast<size_t>(i)] = f.kind;
    draw(f, image, edge, d.image(i));
  }
  d.description = format("shapes: %lld drawn images, %dx%dx%d", static_cast<long long>(count),
                         image.h, image.w, image.c);
  return d;
}

}  // namespace ddpm
