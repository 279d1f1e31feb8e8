// Forward and dgrad: a thread takes a block of tiles through input transform, 36 matrix products
// and output transform. Wgrad: a thread sums 36 matrix products over all tiles for a block of
// channels. Either way what lies between the stages stays in the thread's cache.
#include "kernels/cpu/winograd.h"

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <numeric>

#include "kernels/cpu/parallel.h"

#ifndef DDPM_KERNELS_CPU_WINOGRAD_ONCE_
#define DDPM_KERNELS_CPU_WINOGRAD_ONCE_
namespace ddpm::cpu::winograd {

constexpr int64_t kPoints = 36;  // products per tile and channel pair
constexpr int64_t kPanel = 32;   // channels stored side by side in a panel; the last may have 16
constexpr int64_t kSkew = 16;    // floats between the 36 matrices, lest they share cache sets

// Images cut into 4x4 tiles, row by row, image by image; tiles at an edge hang over.
struct Tiling {
  int64_t n, h, w;
  int64_t rows() const { return (h + 3) / 4; }
  int64_t columns() const { return (w + 3) / 4; }
  int64_t count() const { return n * rows() * columns(); }
};

// One tile's place: its image and the pixel of its upper left corner.
struct Tile {
  int64_t image, top, left;
  Tile(const Tiling& t, int64_t index)
      : image(index / (t.rows() * t.columns())),
        top(index / t.columns() % t.rows() * 4),
        left(index % t.columns() * 4) {}
};

// Where a tile's c-vector stands in one of the 36 matrices: (tiles, channels) row-major, or in
// panels (channels / 32, tiles, 32), of which the last is as narrow as what remains.
struct MatrixLayout {
  int64_t tiles, channels;
  bool panels;
  int64_t size() const { return tiles * channels + kSkew; }
  int64_t offset(int64_t tile, int64_t c) const {
    if (!panels) return tile * channels + c;
    const int64_t first = c / kPanel * kPanel;
    return first * tiles + tile * std::min(kPanel, channels - first) + (c - first);
  }
};

// A block of tiles through all three stages, for output channels [k_begin, k_end).
struct BlockJob {
  Tiling tiling;
  int64_t first_tile, tiles, c, k, k_begin, k_end;
  const float* in;      // (n,h,w,c)
  const float* packed;  // (36, k/32, c, 32)
  Epilogue epilogue;
  float* out;          // (n,h,w,k)
  float* v;            // 36 matrices (tiles, c)
  float* m;            // 36 matrices (tiles, k_end - k_begin)
  const float* zeros;  // c of them: what lies outside the image
};

// wgrad for a block of channels, [c_begin, c_end) x [k_begin, k_end), and a range of tiles.
struct GradientJob {
  Tiling tiling;
  int64_t first_tile, tiles, c, k, c_begin, c_end, k_begin, k_end;
  const float* x;      // (n,h,w,c)
  const float* dy;     // (n,h,w,k)
  const float* zeros;  // kBlock of them
  float* v;            // 36 matrices of kStep tiles: x's channels, then dy's
  float* m;            // 36 matrices (k_end - k_begin, c_end - c_begin): the sums
};
// Channels of x and of dy in one job, so that its 36 x 64 x 64 sums stay in a core's L2; tiles
// transformed at a time.
constexpr int64_t kBlock = 64, kStep = 16;
constexpr int64_t kBlockSize = kPoints * (kBlock * kBlock + kSkew);
constexpr int64_t kStepSize = kPoints * (kStep * kBlock + kSkew);

}  // namespace ddpm::cpu::winograd
#endif

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/winograd.cpp"
#include <hwy/foreach_target.h>

#include <hwy/cache_control.h>

#include "kernels/cpu/winograd-inl.h"

HWY_BEFORE_NAMESPACE();
namespace ddpm::cpu::winograd::HWY_NAMESPACE {

struct StridedLoad {
  const float* p;
  int64_t stride;
  HWY_INLINE Float operator()(int i) const { return hn::LoadU(FloatTag(), p + i * stride); }
};
struct PointerLoad {
  const float* const* p;
  int64_t c;
  HWY_INLINE Float operator()(int i) const { return hn::LoadU(FloatTag(), p[i] + c); }
};

// Transforms tiles [begin, begin + layout.tiles) of channels [0, layout.channels) of in, whose
// pixels are `stride` floats apart, into the 36 matrices at v. T: InputTransform of the 6x6 pixels
// around a tile, or OutputAdjoint of its 4x4.
template <typename T>
void transform_tiles(const Tiling& tiling, const float* in, int64_t stride, const float* zeros,
                     int64_t begin, const MatrixLayout& layout, float* v) {
  constexpr int kSide = T::kIn, kBorder = (kSide - 4) / 2;
  for (int64_t t = 0; t < layout.tiles; ++t) {
    const Tile tile(tiling, begin + t);
    const float* pixel[kSide * kSide];
    for (int i = 0; i < kSide; ++i)
      for (int j = 0; j < kSide; ++j) {
        const int64_t row = tile.top + i - kBorder, column = tile.left + j - kBorder;
        const bool inside = row >= 0 && row < tiling.h && column >= 0 && column < tiling.w;
        pixel[i * kSide + j] =
            inside ? in + ((tile.image * tiling.h + row) * tiling.w + column) * stride : zeros;
      }
    for (int64_t c = 0; c < layout.channels; c += lanes()) {
      // The columns that the next tile adds.
      for (int i = 0; i < kSide; ++i)
        for (int j = kSide - 4; j < kSide; ++j)
          hwy::Prefetch(pixel[i * kSide + j] + 4 * stride + c);
      Float out[6][6];
      transform<T>(PointerLoad{pixel, c}, out);
      float* to = v + layout.offset(t, c);
      for (int i = 0; i < 6; ++i)
        for (int j = 0; j < 6; ++j)
          hn::StoreU(out[i][j], FloatTag(), to + (i * 6 + j) * layout.size());
    }
  }
}

// Transformed filters of output channels [begin, end) (multiples of 32) into (36, k/32, c, 32).
// Strides of the source: between output channels, between input channels, between taps (negative:
// rotated).
void transform_filters(const float* filter, int64_t k_stride, int64_t c_stride, int64_t tap_stride,
                       int64_t c, int64_t k, int64_t begin, int64_t end, float* packed) {
  const FloatTag d;
  const hn::RebindToSigned<FloatTag> index_tag;
  const auto index =
      hn::Mul(hn::Iota(index_tag, 0), hn::Set(index_tag, static_cast<int>(k_stride)));
  for (int64_t panel = begin; panel < end; panel += kPanel) {
    const int64_t width = std::min(kPanel, k - panel);
    for (int64_t i = 0; i < c; ++i)
      for (int64_t j = 0; j < width; j += lanes()) {
        const float* from = filter + (panel + j) * k_stride + i * c_stride;
        Float u[6][6];
        if (k_stride == 1)
          transform<FilterTransform>(StridedLoad{from, tap_stride}, u);
        else
          transform<FilterTransform>(
              [&](int tap) HWY_ATTR { return hn::GatherIndex(d, from + tap * tap_stride, index); },
              u);
        float* to = packed + panel * c + i * width + j;
        for (int64_t x = 0; x < kPoints; ++x) hn::StoreU(u[x / 6][x % 6], d, to + x * c * k);
      }
  }
}

// The 4x4 results of a block's tiles, with what is added to them, to out.
void write_tiles(const BlockJob& job, const MatrixLayout& layout) {
  const FloatTag d;
  const Epilogue& e = job.epilogue;
  for (int64_t t = 0; t < job.tiles; ++t) {
    const Tile tile(job.tiling, job.first_tile + t);
    const int64_t rows = std::min<int64_t>(4, job.tiling.h - tile.top);
    const int64_t columns = std::min<int64_t>(4, job.tiling.w - tile.left);
    const int64_t corner =
        ((tile.image * job.tiling.h + tile.top) * job.tiling.w + tile.left) * job.k;
    for (int64_t k = job.k_begin; k < job.k_end; k += lanes()) {
      Float y[4][4];
      transform<OutputTransform>(
          StridedLoad{job.m + layout.offset(t, k - job.k_begin), layout.size()}, y);
      Float add = hn::Zero(d);
      if (e.bias != nullptr) add = hn::LoadU(d, e.bias + k);
      if (e.sample_bias != nullptr)
        add = hn::Add(add, hn::LoadU(d, e.sample_bias + tile.image * e.sample_bias_stride + k));
      for (int64_t i = 0; i < rows; ++i)
        for (int64_t j = 0; j < columns; ++j) {
          const int64_t at = corner + (i * job.tiling.w + j) * job.k + k;
          Float v = hn::Add(y[i][j], add);
          if (e.residual != nullptr) v = hn::Add(v, hn::LoadU(d, e.residual + at));
          hn::StoreU(v, d, job.out + at);
        }
    }
  }
}

void run_block(const BlockJob& job) {
  const MatrixLayout v{job.tiles, job.c, false}, m{job.tiles, job.k_end - job.k_begin, false};
  transform_tiles<InputTransform>(job.tiling, job.in, job.c, job.zeros, job.first_tile, v, job.v);
  for (int64_t x = 0; x < kPoints; ++x)
    for (int64_t k = job.k_begin; k < job.k_end; k += kPanel) {
      const int64_t width = std::min(kPanel, job.k - k);
      multiply({.a = job.v + x * v.size(),
                .a_row = job.c,
                .a_depth = 1,
                .b = job.packed + (x * job.k + k) * job.c,
                .b_depth = width,
                .c = job.m + x * m.size() + (k - job.k_begin),
                .c_row = m.channels,
                .rows = job.tiles,
                .width = width,
                .depth = job.c,
                .accumulate = false});
    }
  write_tiles(job, m);
}

// m = the sum over the job's tiles of (dy's transform)^T (x's transform), point by point.
void sum_gradient(const GradientJob& job) {
  const int64_t c = job.c_end - job.c_begin, k = job.k_end - job.k_begin;
  float* w = job.v + kStepSize;
  for (int64_t first = 0; first < job.tiles; first += kStep) {
    const int64_t tiles = std::min(kStep, job.tiles - first);
    const MatrixLayout v_layout{tiles, c, true}, w_layout{tiles, k, true};
    transform_tiles<InputTransform>(job.tiling, job.x + job.c_begin, job.c, job.zeros,
                                    job.first_tile + first, v_layout, job.v);
    transform_tiles<OutputAdjoint>(job.tiling, job.dy + job.k_begin, job.k, job.zeros,
                                   job.first_tile + first, w_layout, w);
    for (int64_t x = 0; x < kPoints; ++x)
      for (int64_t i = 0; i < k; i += kPanel)
        for (int64_t j = 0; j < c; j += kPanel)
          multiply({.a = w + x * w_layout.size() + w_layout.offset(0, i),
                    .a_row = 1,
                    .a_depth = std::min(kPanel, k - i),
                    .b = job.v + x * v_layout.size() + v_layout.offset(0, j),
                    .b_depth = std::min(kPanel, c - j),
                    .c = job.m + x * (k * c + kSkew) + i * c + j,
                    .c_row = c,
                    .rows = std::min(kPanel, k - i),
                    .width = std::min(kPanel, c - j),
                    .depth = tiles,
                    .accumulate = first > 0});
  }
}

struct PartsLoad {
  const float* p;
  int64_t stride, parts, part_stride;
  HWY_INLINE Float operator()(int i) const {
    Float sum = hn::LoadU(FloatTag(), p + i * stride);
    for (int64_t part = 1; part < parts; ++part)
      sum = hn::Add(sum, hn::LoadU(FloatTag(), p + part * part_stride + i * stride));
    return sum;
  }
};

// The job's block of dfilter (k,3,3,c) (+)= G^T m G, m being the sum of `parts` sums, part_stride
// apart.
void write_gradient(const GradientJob& job, int64_t parts, int64_t part_stride, bool accumulate,
                    float* dfilter) {
  const FloatTag d;
  const int64_t c = job.c_end - job.c_begin, k = job.k_end - job.k_begin;
  for (int64_t i = 0; i < k; ++i)
    for (int64_t j = 0; j < c; j += lanes()) {
      Float g[3][3];
      transform<FilterAdjoint>(PartsLoad{job.m + i * c + j, k * c + kSkew, parts, part_stride}, g);
      for (int tap = 0; tap < 9; ++tap) {
        float* to = dfilter + ((job.k_begin + i) * 9 + tap) * job.c + job.c_begin + j;
        const Float v = g[tap / 3][tap % 3];
        hn::StoreU(accumulate ? hn::Add(hn::LoadU(d, to), v) : v, d, to);
      }
    }
}

}  // namespace ddpm::cpu::winograd::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace ddpm::cpu::winograd {

HWY_EXPORT(transform_filters);
HWY_EXPORT(run_block);
HWY_EXPORT(sum_gradient);
HWY_EXPORT(write_gradient);

namespace {

// A convolution as its pass sees it: dgrad is a forward pass from K to C channels.
struct Problem {
  Tiling tiling;
  int64_t c, k;
  Problem(const ConvDesc& d, ConvPass pass)
      : tiling{d.x.n, d.x.h, d.x.w},
        c(pass == ConvPass::kDgrad ? d.k : d.x.c),
        k(pass == ConvPass::kDgrad ? d.x.c : d.k) {}
};

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// How forward and dgrad are cut into jobs: blocks of tiles, and where those are too few for the
// threads, parts of the output channels as well.
struct Split {
  int64_t tile_blocks, k_parts, tiles, k;  // the last two: of the largest job
  Split(const Problem& p, int threads) {
    const int64_t count = p.tiling.count();
    const bool few = count < 8 * threads;
    const int64_t panels = ceil_div(p.k, kPanel), part = few ? ceil_div(panels, threads) : panels;
    k_parts = ceil_div(panels, part);
    k = part * kPanel;
    // 32 tiles use a panel of the filter often enough; 16 where 32 would not fit the cache.
    tile_blocks = ceil_div(count, p.c <= 256 ? 32 : 16);
    if (!few) tile_blocks = ceil_div(tile_blocks, threads) * threads;
    tiles = ceil_div(count, tile_blocks);
  }
  int64_t jobs() const { return tile_blocks * k_parts; }
  int64_t v_size(const Problem& p) const { return kPoints * (tiles * p.c + kSkew); }
  int64_t m_size() const { return kPoints * (tiles * k + kSkew); }
};

// How wgrad is cut into jobs: blocks of channels, and ranges of tiles ("parts") until the threads
// share them evenly. The parts' sums are added in order.
struct GradientSplit {
  int64_t blocks, parts;
  GradientSplit(const Problem& p, int threads) {
    blocks = ceil_div(p.c, kBlock) * ceil_div(p.k, kBlock);
    const int64_t wanted = threads / std::gcd(blocks, int64_t{threads});
    parts = std::clamp<int64_t>(p.tiling.count() / kStep, 1, std::min<int64_t>(wanted, 16));
  }
  int64_t workers(int threads) const { return std::min<int64_t>(threads, blocks * parts); }
  // Sums kept: a worker's own, or where they are parts all of them.
  int64_t sums(int threads) const { return parts > 1 ? blocks * parts : workers(threads); }
};

}  // namespace

// One thread with AVX-512, GFLOP/s of the direct algorithm / effective of this one:
//                           forward     dgrad      wgrad
//   32x32 128->128  N=8    112 / 320   107 / 310  102 / 215
//   16x16 256->256  N=8    117 / 310   110 / 305   97 / 215
//    8x8  256->256  N=8    124 / 330   129 / 303  105 / 200    32 tiles
//    4x4  256->256  N=8    145 / 280   148 / 250   76 / 144     8 tiles
//    8x8  256->256  N=1    122 / 173   112 / 188   79 / 91      4 tiles
//    4x4  256->256  N=1    135 / 47    141 / 45    36 / 23      1 tile
//    7x7  128->128  N=2    129 / 240   122 / 248   94 / 114     8 tiles, 77 % used
//    8x8   32->32   N=8    127 / 295   138 / 295  128 / 209    32 tiles
// Large filters want more tiles, because training transforms them at every step; wgrad wants enough
// tiles or blocks of channels for the threads to share.
bool takes(const ConvDesc& d, ConvPass pass) {
  const bool possible = d.r == 3 && d.s == 3 && d.stride == 1 && d.pad_top == 1 &&
                        d.pad_left == 1 && d.pad_bottom == 1 && d.pad_right == 1 &&
                        d.x.c % 16 == 0 && d.k % 16 == 0;
  if (!possible) return false;
  const int64_t used = d.x.n * d.x.pixels() / 16;  // tiles' worth of pixels
  const int64_t tiles = Tiling{d.x.n, d.x.h, d.x.w}.count(), pairs = int64_t{d.x.c} * d.k;
  if (2 * used < tiles) return false;
  if (pass == ConvPass::kWgrad) return used >= (pairs >= 128 * 128 ? 8 : 32);
  return used >= (pairs > 64 * 128 ? 16 : 4);
}

size_t filter_bytes(const ConvDesc& d) { return sizeof(float) * kPoints * d.x.c * d.k; }

void pack(const ConvDesc& d, ConvPass pass, int threads, const float* filter, float* packed) {
  const Problem p(d, pass);
  const bool dgrad = pass == ConvPass::kDgrad;
  const int64_t c = d.x.c;
  const float* first = dgrad ? filter + 8 * c : filter;  // rotated: from the last tap backwards
  parallel_for(threads, ceil_div(p.k, kPanel), [&](int64_t begin, int64_t end) {
    HWY_DYNAMIC_DISPATCH(transform_filters)
    (first, dgrad ? 1 : 9 * c, dgrad ? 9 * c : 1, dgrad ? -c : c, p.c, p.k, begin * kPanel,
     std::min(end * kPanel, p.k), packed);
  });
}

size_t workspace_bytes(const ConvDesc& d, ConvPass pass, int threads) {
  const Problem p(d, pass);
  if (pass == ConvPass::kWgrad) {
    const GradientSplit split(p, threads);
    return sizeof(float) *
           (kBlock + split.sums(threads) * kBlockSize + split.workers(threads) * 2 * kStepSize);
  }
  const Split split(p, threads);
  const int64_t parts = std::min<int64_t>(threads, split.jobs());
  return sizeof(float) * (p.c + parts * (split.v_size(p) + split.m_size()));
}

void run(const ConvDesc& d, ConvPass pass, int threads, const float* in, const float* packed,
         const Epilogue& epilogue, float* out, void* workspace) {
  const Problem p(d, pass);
  const Split split(p, threads);
  float* zeros = static_cast<float*>(workspace);
  std::memset(zeros, 0, sizeof(float) * p.c);
  const int64_t parts = std::min<int64_t>(threads, split.jobs());
  parallel_for(threads, parts, [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; ++part) {
      float* v = zeros + p.c + part * (split.v_size(p) + split.m_size());
      for (int64_t job = split.jobs() * part / parts; job < split.jobs() * (part + 1) / parts;
           ++job) {
        const int64_t block = job / split.k_parts, k = job % split.k_parts * split.k;
        const int64_t tile = p.tiling.count() * block / split.tile_blocks;
        const int64_t tile_end = p.tiling.count() * (block + 1) / split.tile_blocks;
        HWY_DYNAMIC_DISPATCH(run_block)
        ({.tiling = p.tiling,
          .first_tile = tile,
          .tiles = tile_end - tile,
          .c = p.c,
          .k = p.k,
          .k_begin = k,
          .k_end = std::min(k + split.k, p.k),
          .in = in,
          .packed = packed,
          .epilogue = epilogue,
          .out = out,
          .v = v,
          .m = v + split.v_size(p),
          .zeros = zeros});
      }
    }
  });
}

void run_wgrad(const ConvDesc& d, int threads, const float* x, const float* dy, bool accumulate,
               float* dfilter, void* workspace) {
  const Problem p(d, ConvPass::kWgrad);
  const GradientSplit split(p, threads);
  float* zeros = static_cast<float*>(workspace);
  std::memset(zeros, 0, sizeof(float) * kBlock);
  float* sums = zeros + kBlock;
  float* steps = sums + split.sums(threads) * kBlockSize;
  const int64_t workers = split.workers(threads), c_blocks = ceil_div(p.c, kBlock);
  const auto make_job = [&](int64_t block, int64_t part, float* v, float* m) {
    const int64_t c = block % c_blocks * kBlock, k = block / c_blocks * kBlock;
    const int64_t tile = p.tiling.count() * part / split.parts;
    return GradientJob{.tiling = p.tiling,
                       .first_tile = tile,
                       .tiles = p.tiling.count() * (part + 1) / split.parts - tile,
                       .c = p.c,
                       .k = p.k,
                       .c_begin = c,
                       .c_end = std::min(c + kBlock, p.c),
                       .k_begin = k,
                       .k_end = std::min(k + kBlock, p.k),
                       .x = x,
                       .dy = dy,
                       .zeros = zeros,
                       .v = v,
                       .m = m};
  };
  parallel_for(threads, workers, [&](int64_t begin, int64_t end) {
    const int64_t jobs = split.blocks * split.parts;
    for (int64_t worker = begin; worker < end; ++worker)
      for (int64_t i = jobs * worker / workers; i < jobs * (worker + 1) / workers; ++i) {
        const GradientJob job =
            make_job(i % split.blocks, i / split.blocks, steps + worker * 2 * kStepSize,
                     sums + (split.parts > 1 ? i : worker) * kBlockSize);
        HWY_DYNAMIC_DISPATCH(sum_gradient)(job);
        if (split.parts == 1) HWY_DYNAMIC_DISPATCH(write_gradient)(job, 1, 0, accumulate, dfilter);
      }
  });
  if (split.parts == 1) return;
  parallel_for(threads, split.blocks, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) HWY_DYNAMIC_DISPATCH(write_gradient)
    (make_job(block, 0, nullptr, sums + block * kBlockSize), split.parts, split.blocks * kBlockSize,
     accumulate, dfilter);
  });
}

}  // namespace ddpm::cpu::winograd
#endif
