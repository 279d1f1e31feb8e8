// Tensors moved in runs of consecutive channels: 16 bytes at a time where all channel counts are
// multiples of that, else single elements. Consecutive threads take consecutive runs, so a warp's
// accesses are whole lines.
#pragma once

#include <initializer_list>

#include "kernels/cuda/cuda_backend.h"
#include "kernels/cuda/divisor.h"
#include "kernels/cuda/vec.h"

namespace ddpm::cuda {

// f.template operator()<T, V>(), V elements being 16 bytes where all `channels` are multiples.
template <typename F>
Call by_width(DType type, std::initializer_list<int> channels, F f) {
  return dispatch(type, [&]<typename T>(T) -> Call {
    constexpr int kWide = 16 / sizeof(T);
    for (const int c : channels)
      if (c % kWide != 0) return f.template operator()<T, 1>();
    return f.template operator()<T, kWide>();
  });
}

// Runs of v channels in `count` elements; they are counted in 31 bits.
inline uint32_t runs_of(const char* op, int64_t count, int v) {
  DDPM_CHECK(count / v < int64_t{1} << 31, "%s: %lld elements, %d at a time", op,
             static_cast<long long>(count), v);
  return static_cast<uint32_t>(count / v);
}

}  // namespace ddpm::cuda
