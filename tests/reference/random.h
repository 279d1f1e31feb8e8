// Normal numbers of a stream in double; the words themselves are held to tests/golden.
#pragma once

#include <cmath>
#include <cstdint>
#include <numbers>
#include <vector>

#include "kernels/philox.h"

namespace ddpm::ref {

// The first `count` normals of a stream, from `block` on.
inline std::vector<double> normals(const RandomStream& stream, int64_t count, uint32_t block = 0) {
  std::vector<double> z;
  for (; static_cast<int64_t>(z.size()) < count; ++block) {
    const Philox4 words = stream.block(block);
    for (size_t pair = 0; pair < 4; pair += 2) {
      const double radius = std::sqrt(-2 * std::log(double{uniform_open(words[pair])}));
      const double angle = 2 * std::numbers::pi * double{uniform_open(words[pair + 1])};
      z.push_back(radius * std::cos(angle));
      z.push_back(radius * std::sin(angle));
    }
  }
  z.resize(static_cast<size_t>(count));
  return z;
}

}  // namespace ddpm::ref
