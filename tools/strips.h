// The pictures of `ddpm progressive` and `ddpm interpolate`, as images in rows (Ho et al. 2020,
// figures 6, 7 and 8).
#pragma once

#include <functional>
#include <span>
#include <string>
#include <vector>

#include "model/generator.h"

namespace ddpm::tools {

// Rows of `columns` images (H,W,C) in [-1, 1].
struct Strips {
  int64_t columns = 0;
  std::vector<float> images;
};

// As a PNG file, enlarged where they are small.
void write_strips(const std::string& path, const Strips&, const Shape& image);
// Error(kUsage) unless the path ends in .png.
void require_png(const std::string& path);

using StepsDone = std::function<void(int64_t)>;  // steps that are done, of those below

// Figure 6. A row for each image `first`, ... of a batch: what its chain takes for x0, at the least
// timestep of each of `columns` equal parts of 0 .. timesteps - 1, noise first; parts without a
// step are left out. The last is the image. Runs steps() steps.
Strips predictions(Generator&, int timesteps, int columns, uint64_t seed, uint64_t first,
                   const StepsDone& = {});

// Figure 7. A row for each of `timesteps`: x there in the chain of image `first`, clamped, and an
// end for each image of the batch, which goes on from that x with the noise of image first + 0, 1,
// ... So the first end is image `first` itself. Runs at most steps() * (1 + timesteps) steps.
Strips shared_latents(Generator&, const std::vector<int>& timesteps, uint64_t seed, uint64_t first,
                      const StepsDone& = {});

// (1 - part) a + part b; spherical: along the great circle, which keeps the norm of noise.
enum class Blend { kLinear, kSpherical };
std::vector<float> blend(Blend, std::span<const float> a, std::span<const float> b, double part);

// Figure 8. A row for each pair: images a, `columns` mixes of the latents `from_a` and `from_b`,
// run through the chain's rows, images b. All (pairs,H,W,C), the generator's batch. The mixes of a
// pair have the same noise in their chains, that of image `first`, ... Runs steps() * columns
// steps.
struct Pairs {
  std::vector<float> a, b, from_a, from_b;
};
Strips interpolations(Generator&, const Pairs&, Blend, int columns, uint64_t seed, uint64_t first,
                      const StepsDone& = {});

}  // namespace ddpm::tools
