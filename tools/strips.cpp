#include "tools/strips.h"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "tools/common.h"
#include "tools/image_io.h"

namespace ddpm::tools {
namespace {

size_t image_size(const Generator& g) {
  return static_cast<size_t>(g.shape().pixels() * g.shape().c);
}

std::vector<float> download(Generator& g, Tensor t) {
  std::vector<float> values(static_cast<size_t>(g.shape().count()));
  g.executor().download(values.data(), t);
  return values;
}

// Appends image i of a batch, clamped.
void append(Strips& strips, const std::vector<float>& batch, size_t i, size_t size) {
  for (size_t k = i * size; k < (i + 1) * size; ++k)
    strips.images.push_back(std::clamp(batch[k], -1.0f, 1.0f));
}

// Steps of a chain, with those before told.
class Runner {
 public:
  Runner(Generator& g, const StepsDone& told) : g_(g), told_(told) {}
  void steps(int count) {
    g_.executor().steps(count, [&](int done) {
      if (told_) told_(before_ + done);
    });
    before_ += count;
  }

 private:
  Generator& g_;
  const StepsDone& told_;
  int64_t before_ = 0;
};

}  // namespace

void require_png(const std::string& path) {
  if (!path.ends_with(".png"))
    fail(Status::kUsage,
         "--out %s: the pictures are written as one PNG; use a name that ends in "
         ".png",
         path.c_str());
}

void write_strips(const std::string& path, const Strips& strips, const Shape& s) {
  const std::vector<uint8_t> pixels = to_uint8(strips.images);
  const auto count = static_cast<int64_t>(pixels.size()) / (s.pixels() * s.c);
  write_png(path, image_grid(pixels.data(), count, s.h, s.w, s.c, display_scale(s.h, s.w),
                             strips.columns));
}

Strips predictions(Generator& g, int timesteps, int columns, uint64_t seed, uint64_t first,
                   const StepsDone& told) {
  // A row's part, and the last row of each.
  const std::vector<SamplerRow>& rows = g.rows();
  const auto part = [&](size_t row) { return int64_t{rows[row].t} * columns / timesteps; };
  std::vector<std::vector<float>> kept;
  g.begin(seed, first);
  g.executor().run(Phase::kStart);
  Runner runner(g, told);
  int done = 0;
  for (size_t row = 0; row < rows.size(); ++row) {
    if (row + 1 < rows.size() && part(row + 1) == part(row)) continue;
    runner.steps(static_cast<int>(row) + 1 - done);
    done = static_cast<int>(row) + 1;
    kept.push_back(download(g, g.x0()));
  }
  g.latents(1);  // refuses what is not finite
  Strips strips{static_cast<int64_t>(kept.size()), {}};
  for (size_t i = 0; i < static_cast<size_t>(g.batch_size()); ++i)
    for (const auto& batch : kept) append(strips, batch, i, image_size(g));
  return strips;
}

Strips shared_latents(Generator& g, const std::vector<int>& timesteps, uint64_t seed,
                      uint64_t first, const StepsDone& told) {
  const std::vector<SamplerRow>& rows = g.rows();
  const size_t size = image_size(g), batch = static_cast<size_t>(g.batch_size());
  // In the order that the chain comes by.
  std::vector<size_t> order(timesteps.size());
  std::iota(order.begin(), order.end(), size_t{0});
  std::sort(order.begin(), order.end(),
            [&](size_t a, size_t b) { return timesteps[a] > timesteps[b]; });
  std::vector<Generator::Suspended> latents(timesteps.size());
  const std::vector<int32_t> labels(batch, g.label_of(first));
  Runner runner(g, told);
  g.begin(seed, first, labels.data());
  g.executor().run(Phase::kStart);
  int done = 0;
  const auto all_of_first = [&](std::vector<float>& x) {
    for (size_t i = 1; i < batch && !x.empty(); ++i)
      std::copy_n(x.begin(), size, x.begin() + static_cast<std::ptrdiff_t>(i * size));
  };
  for (const size_t i : order) {
    int row = done;
    while (row + 1 < static_cast<int>(rows.size()) &&
           rows[static_cast<size_t>(row)].t > timesteps[i])
      ++row;
    runner.steps(row - done);
    done = row;
    latents[i] = g.suspend();
    all_of_first(latents[i].x);
    all_of_first(latents[i].previous);
  }
  Strips strips{static_cast<int64_t>(batch) + 1, {}};
  for (const Generator::Suspended& latent : latents) {
    append(strips, latent.x, 0, size);
    g.resume(seed, first, labels.data(), latent);
    runner.steps(g.steps() - latent.done);
    const std::vector<float> ends = g.images(g.batch_size());
    for (size_t i = 0; i < batch; ++i) append(strips, ends, i, size);
  }
  return strips;
}

std::vector<float> blend(Blend kind, std::span<const float> a, std::span<const float> b,
                         double part) {
  double by_a = 1 - part, by_b = part;
  if (kind == Blend::kSpherical) {
    double dot = 0, norm_a = 0, norm_b = 0;
    for (size_t i = 0; i < a.size(); ++i) {
      dot += double{a[i]} * double{b[i]};
      norm_a += double{a[i]} * double{a[i]};
      norm_b += double{b[i]} * double{b[i]};
    }
    const double cosine = std::clamp(dot / std::sqrt(norm_a * norm_b), -1.0, 1.0);
    const double angle = std::acos(cosine), sine = std::sin(angle);
    // Where they point the same way, or one is zero, the line is the circle.
    if (sine > 1e-6) {
      by_a = std::sin((1 - part) * angle) / sine;
      by_b = std::sin(part * angle) / sine;
    }
  }
  std::vector<float> mixed(a.size());
  for (size_t i = 0; i < a.size(); ++i)
    mixed[i] = static_cast<float>(by_a * double{a[i]} + by_b * double{b[i]});
  return mixed;
}

Strips interpolations(Generator& g, const Pairs& pairs, Blend kind, int columns, uint64_t seed,
                      uint64_t first, const StepsDone& told) {
  const size_t size = image_size(g), count = pairs.a.size() / size;
  std::vector<std::vector<float>> mixes;
  Runner runner(g, told);
  for (int k = 0; k < columns; ++k) {
    std::vector<float> start;
    for (size_t i = 0; i < count; ++i) {
      const auto of = [&](const std::vector<float>& all) {
        return std::span(all).subspan(i * size, size);
      };
      const std::vector<float> one =
          blend(kind, of(pairs.from_a), of(pairs.from_b), k / (columns - 1.0));
      start.insert(start.end(), one.begin(), one.end());
    }
    g.begin(seed, first);
    g.executor().upload(g.x(), start.data());
    runner.steps(g.steps());
    mixes.push_back(g.images(static_cast<int>(count)));
  }
  Strips strips{columns + 2, {}};
  for (size_t i = 0; i < count; ++i) {
    append(strips, pairs.a, i, size);
    for (const auto& mix : mixes) append(strips, mix, i, size);
    append(strips, pairs.b, i, size);
  }
  return strips;
}

}  // namespace ddpm::tools
