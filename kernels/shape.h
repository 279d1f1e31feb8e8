// The shape of a tensor: (N, H, W, C), channels innermost. Matrices are (rows, 1, 1, columns),
// vectors (1, 1, 1, length), convolution filters (K, R, S, C).
#pragma once

#include <cstdint>
#include <string>

#include "kernels/error.h"

namespace ddpm {

struct Shape {
  int n = 1, h = 1, w = 1, c = 1;

  constexpr int64_t count() const { return int64_t{n} * h * w * c; }
  constexpr int64_t pixels() const { return int64_t{h} * w; }
  constexpr bool positive() const { return n > 0 && h > 0 && w > 0 && c > 0; }
  friend constexpr bool operator==(const Shape&, const Shape&) = default;
};

inline std::string to_string(const Shape& s) { return format("(%d,%d,%d,%d)", s.n, s.h, s.w, s.c); }

}  // namespace ddpm
