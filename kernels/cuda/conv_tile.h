// Where a convolution's tiles lie, and how its input comes into shared memory.
//
// A block computes a tile of consecutive output pixels: part of an image, several whole images
// where they are small, or 1 to 4 x 64 pixels of a wide one; so 64 pixels of a tile are always 64
// consecutive ones. The input pixels they touch are the tile's halo: a box of `halo_h` x `halo_w`
// per image, in coordinates of the input as the taps see it (upsampled, or with zeros between its
// pixels).
#pragma once

#include <device/async.h>
#include <device/launch.h>
#include <device/memory.h>

#include "kernels/cuda/vec.h"
#include "kernels/desc.h"
#include "kernels/philox.h"
#include "kernels/step_state.h"

namespace ddpm::cuda {

inline constexpr int kConvThreads = 256;

// Made on the host, read by kernels.
struct ConvTiles {
  int images = 1, p = 1, q = 1;  // output
  int h = 1, w = 1;              // input as stored
  int in_h = 1, in_w = 1;        // as the taps see it: index / shrink is the stored one,
  int shrink = 1;                // and where it is dilated, only multiples of shrink are not zero
  bool dilated = false;
  int r = 1, s = 1, stride = 1, pad_top = 0, pad_left = 0;
  int rows = 128;                // pixels of a tile
  int tile_images = 1;           // > 1: a tile is so many whole images
  int segments = 0;              // > 0: a tile is rows / 64 x 64 pixels, so many to a row
  int per_image = 1, count = 1;  // tiles
  int halo_h = 1, halo_w = 1;

  __host__ __device__ int pixels() const { return p * q; }
  __host__ __device__ int taps() const { return r * s; }
  __host__ __device__ int halo() const { return tile_images * halo_h * halo_w; }
  // Rows m and m + 64 of a tile are this many output pixels apart.
  __host__ __device__ int jump() const { return segments > 0 ? q : 64; }
};

// Tiles of `rows` pixels over the output; r, s, stride, pads, sizes are set already.
inline void lay_tiles(ConvTiles& t, int rows) {
  t.rows = rows;
  const int64_t pixels = int64_t{t.p} * t.q;
  int tile_h = 0, tile_w = t.q;
  if (rows >= 64 && t.q % 64 == 0 && t.q >= 128) {
    tile_h = rows / 64;
    t.segments = t.q / 64;
    t.per_image = t.segments * ((t.p + tile_h - 1) / tile_h);
    tile_w = 64;
  } else if (2 * pixels <= rows && t.images > 1) {
    t.tile_images = static_cast<int>(rows / pixels < t.images ? rows / pixels : t.images);
    tile_h = t.p;
  } else {
    t.per_image = static_cast<int>((pixels + rows - 1) / rows);
    tile_h = rows % t.q == 0 ? rows / t.q : (rows + t.q - 2) / t.q + 1;
    if (tile_h > t.p) tile_h = t.p;
  }
  t.count =
      t.tile_images > 1 ? (t.images + t.tile_images - 1) / t.tile_images : t.images * t.per_image;
  t.halo_h = (tile_h - 1) * t.stride + t.r;
  t.halo_w = (tile_w - 1) * t.stride + t.s;
}

// One tile.
struct Tile {
  int n, p, q;    // its first pixel; q is 0 where tiles are not segments
  int skip;       // pixels of row p before it
  int rows;       // pixels it has
  int64_t first;  // output pixel of row 0
};

__device__ __forceinline__ Tile find_tile(const ConvTiles& t, int index) {
  Tile tile{0, 0, 0, 0, 0, 0};
  if (t.tile_images > 1) {
    tile.n = index * t.tile_images;
    const int left = t.images - tile.n;
    tile.rows = (left < t.tile_images ? left : t.tile_images) * t.pixels();
    tile.first = int64_t{tile.n} * t.pixels();
    return tile;
  }
  tile.n = index / t.per_image;
  const int i = index - tile.n * t.per_image;
  if (t.segments > 0) {
    const int y = i / t.segments, down = t.rows / 64;
    tile.p = down * y;
    tile.q = 64 * (i - y * t.segments);
    tile.rows = 64 * (tile.p + down <= t.p ? down : t.p - tile.p);
    tile.first = (int64_t{tile.n} * t.p + tile.p) * t.q + tile.q;
    return tile;
  }
  const int f = i * t.rows, left = t.pixels() - f;
  tile.p = f / t.q;
  tile.skip = f - tile.p * t.q;
  tile.rows = left < t.rows ? left : t.rows;
  tile.first = int64_t{tile.n} * t.pixels() + f;
  return tile;
}

// Output pixel of row m.
__device__ __forceinline__ int64_t output_pixel(const ConvTiles& t, const Tile& tile, int m) {
  return tile.first + m / 64 * t.jump() + m % 64;
}
__device__ __forceinline__ int image_of(const ConvTiles& t, const Tile& tile, int m) {
  return t.tile_images > 1 ? tile.n + m / t.pixels() : tile.n;
}

// The image of all of the tile's pixels, or -1.
__device__ __forceinline__ int only_image(const ConvTiles& t, const Tile& tile) {
  return t.tile_images > 1 ? -1 : tile.n;
}

// A tile cut into what statistics and sums are of: 64 consecutive pixels, or an image of fewer.
struct TileRuns {
  bool whole;  // images
  int rows;    // of a run; the last may have fewer
  int count;

  __device__ __forceinline__ TileRuns(const ConvTiles& t, const Tile& tile)
      : whole(t.tile_images > 1),
        rows(whole ? t.pixels() : 64),
        count((tile.rows + rows - 1) / rows) {}
  __device__ __forceinline__ int image(const Tile& tile, int run) const {
    return whole ? tile.n + run : tile.n;
  }
  __device__ __forceinline__ int rows_of(const Tile& tile, int run) const {
    const int left = tile.rows - run * rows;
    return left < rows ? left : rows;
  }
  // Of the run among those of all images.
  __device__ __forceinline__ int64_t index(const ConvTiles& t, const Tile& tile, int run) const {
    if (whole) return image(tile, run);
    const int64_t in_image = tile.first + int64_t{run} * t.jump() - int64_t{tile.n} * t.pixels();
    return int64_t{tile.n} * ((t.pixels() + 63) / 64) + in_image / 64;
  }
};

// Tiles of sums in shared memory, (rows, Columns) in fp32.
constexpr int sums_pitch(int columns) { return columns + 8; }

// Halo pixel under tap (0,0) of row m; of a row there is if m is none.
__device__ __forceinline__ int halo_of(const ConvTiles& t, const Tile& tile, int m) {
  if (m >= tile.rows) m = 0;
  if (t.segments > 0) return m / 64 * t.stride * t.halo_w + m % 64 * t.stride;
  const int image = t.tile_images > 1 ? m / t.pixels() : 0;
  const int f = tile.skip + m - image * t.pixels(), y = f / t.q;
  return (image * t.halo_h + y * t.stride) * t.halo_w + (f - y * t.q) * t.stride;
}

// Stored pixel at (y, x) of the input as the taps see it; -1 on padding.
__device__ __forceinline__ int stored_pixel(const ConvTiles& t, int n, int y, int x) {
  if (n >= t.images || y < 0 || y >= t.in_h || x < 0 || x >= t.in_w) return -1;
  if (t.shrink > 1) {
    const int up = y / t.shrink, left = x / t.shrink;
    if (t.dilated && (up * t.shrink != y || left * t.shrink != x)) return -1;
    y = up;
    x = left;
  }
  return (n * t.h + y) * t.w + x;
}
// Where an index of a halo lies in it, in one word: image, row and column, 10 bits each.
inline constexpr int kMaxHaloSide = 1023;
__device__ __forceinline__ int halo_place(const ConvTiles& t, int index) {
  const int box = t.halo_h * t.halo_w, image = index / box, i = index - image * box;
  const int y = i / t.halo_w;
  return image << 20 | y << 10 | (i - y * t.halo_w);
}
// The stored pixel at a place of a tile's halo; -1 on padding.
__device__ __forceinline__ int halo_pixel(const ConvTiles& t, const Tile& tile, int place) {
  return stored_pixel(t, tile.n + (place >> 20),
                      tile.p * t.stride - t.pad_top + (place >> 10 & 1023),
                      tile.q * t.stride - t.pad_left + (place & 1023));
}

// The input: one or two tensors along the channels, and what happens to them.
template <typename T>
struct ConvInput {
  Global<const T> x = nullptr, x2 = nullptr;
  Global<const float> scale_shift = nullptr;
  Global<const StepState> state = nullptr;
  int c1 = 0, c2 = 0;
  int pixels = 1;  // of a stored image
  bool affine = false, silu = false;
  uint32_t threshold = 0;  // of dropout; 0 = none
  float factor = 1;
  uint16_t layer = 0;
  bool aligned = false;  // c1 and c2 are multiples of 8

  __host__ __device__ int channels() const { return c1 + c2; }
  __host__ __device__ bool transforms() const { return affine || silu || threshold > 0; }
};

// v = silu(v * scale + shift), each as the input asks, from channel c on; in.aligned holds.
template <int N, typename T>
__device__ __forceinline__ void normalise(const ConvInput<T>& in, int n, int c, float (&v)[N]) {
  if (in.affine) {
    const auto from = in.scale_shift + (int64_t{n} * in.channels() + c) * 2;
#pragma unroll
    for (int i = 0; i < N; i += 2) {
      float f[4];
      load_floats<float>(from + 2 * i, f);
      v[i] = v[i] * f[0] + f[1];
      v[i + 1] = v[i + 1] * f[2] + f[3];
    }
  }
  if (in.silu) {
#pragma unroll
    for (int i = 0; i < N; ++i) v[i] *= fast_sigmoid(v[i]);
  }
}

// Draws of dropout on an image's elements: block e / 8 decides on e.
template <typename T>
__device__ __forceinline__ Philox4 draw(const ConvInput<T>& in, int n, int64_t element) {
  const RandomStream stream{.seed = in.state[0].seed,
                            .purpose = Purpose::kDropout,
                            .sample = in.state[0].first_image + static_cast<uint64_t>(n),
                            .step = static_cast<uint32_t>(in.state[0].step),
                            .layer = in.layer};
  return stream.block(static_cast<uint32_t>(element / 8));
}
// The word that decides on element `index` of a block; chosen, since indexing would cost memory.
__device__ __forceinline__ uint32_t word_of(const Philox4& words, int index) {
  const uint32_t low = index < 2 ? words[0] : words[1], high = index < 6 ? words[2] : words[3];
  return index < 4 ? low : high;
}
template <typename T>
__device__ __forceinline__ float drop(const ConvInput<T>& in, uint32_t word, int half, float v) {
  return (word >> (16 * half) & 0xFFFFu) >= in.threshold ? v * in.factor : 0.0f;
}

// Eight elements to shared memory of which `count` exist (<= 0: none), zeros for the rest. Aligned:
// `from` is, and all or none exist.
template <bool Aligned, typename To, typename From>
__device__ __forceinline__ void copy_run(const To& to, const From& from, int count) {
  if constexpr (Aligned) {
    copy_async(to, from, count > 0);
    return;
  }
  Words<4> words{};
#pragma unroll
  for (int i = 0; i < 8; ++i)
    if (i < count) words.w[i / 2] |= uint32_t{bf16(from[i]).bits} << (16 * (i % 2));
  store_words(to, words);
}

// Channels c.. of a stored pixel, or zeros where that is padding.
template <bool Aligned, typename To>
__device__ __forceinline__ void copy_input(const ConvInput<bf16>& in, int pixel, int c,
                                           const To& to) {
  const int count = pixel < 0 ? 0 : in.channels() - c;
  const bool second = Aligned && c >= in.c1 && in.c2 > 0;
  const auto from = second ? in.x2 : in.x;
  const int width = second ? in.c2 : in.c1, at = second ? c - in.c1 : c;
  copy_run<Aligned>(to, from + (int64_t{pixel} * width + at), count);
}

// The transform of eight channels that this thread has copied, in place, four at a time: eight
// would cost registers that the sums need. n: of all the tile's pixels, or -1 where it has several
// images.
template <typename At>
__device__ __forceinline__ void transform_copied(const ConvInput<bf16>& in, int n, int pixel, int c,
                                                 const At& at) {
  if (pixel < 0 || c >= in.channels()) return;
  if (n < 0) n = pixel / in.pixels;
  Philox4 words{};
  if (in.threshold > 0) words = draw(in, n, int64_t{pixel - n * in.pixels} * in.channels() + c);
#pragma unroll 1
  for (int half = 0; half < 8; half += 4) {
    float v[4];
    load_floats<bf16>(at + half, v);
    normalise(in, n, c + half, v);
    if (in.threshold > 0) {
#pragma unroll
      for (int i = 0; i < 4; ++i) v[i] = drop(in, words[static_cast<size_t>(i / 2)], i % 2, v[i]);
      words[0] = words[2];
      words[1] = words[3];
    }
    store_floats<bf16>(at + half, v);
  }
}

}  // namespace ddpm::cuda
