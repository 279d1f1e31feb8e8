// What the tests of diffusion's calls have in common.
#pragma once

#include <vector>

#include "tests/kernel_backend.h"
#include "tests/support.h"

namespace ddpm::test {

inline std::vector<Shape> shapes() {
  std::vector<Shape> list = {{1, 1, 1, 1},   {2, 1, 1, 2},    {3, 1, 2, 3},    {1, 3, 5, 1},
                             {7, 2, 2, 1},   {2, 7, 5, 3},    {5, 3, 3, 4},    {4, 8, 8, 3},
                             {13, 1, 1, 17}, {2, 32, 32, 3},  {3, 31, 29, 3},  {1, 64, 64, 3},
                             {9, 16, 16, 1}, {1, 1, 1, 4099}, {2, 1, 1025, 1}, {2, 96, 97, 3}};
  for (int w = 1; w <= 18; ++w) list.push_back({3, 1, w, 1 + w % 4});
  return list;
}

// Every CUDA compute type on the host.
template <typename F>
void for_simt(F check) {
  for (DType type : {DType::kF32, DType::kBF16}) check(*test::make_kernel_backend(type));
}

// Of one activation, relative: half of a last place, of which bf16 has eight.
inline double rounding(const Backend& backend) {
  return backend.compute_type() == DType::kBF16 ? 0x1p-8 : 0;
}

}  // namespace ddpm::test
