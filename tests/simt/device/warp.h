// The host's version of kernels/cuda/device/warp.h.
#pragma once

#include <cstdint>

#include "tests/simt/machine.h"

namespace ddpm::cuda {

inline int lane_id() { return static_cast<int>(simt::thread_index().x & 31u); }
inline int warp_id() { return static_cast<int>(simt::thread_index().x >> 5); }

template <typename T>
struct ShuffleLane {
  T value;
  int source;
  T result;
};

// The value of lane `source`.
template <typename T>
T shuffle_from(const char* what, T value, int source) {
  ShuffleLane<T> mine{value, source & 31, value};
  simt::warp_meet(what, &mine, [](void* const* lanes) {
    for (int i = 0; i < 32; ++i) {
      auto& to = *static_cast<ShuffleLane<T>*>(lanes[i]);
      to.result = static_cast<const ShuffleLane<T>*>(lanes[to.source])->value;
    }
  });
  return mine.result;
}

template <typename T>
T shuffle_xor(T value, int mask) {
  return shuffle_from("shuffle_xor", value, lane_id() ^ mask);
}
template <typename T>
T shuffle(T value, int lane) {
  return shuffle_from("shuffle", value, lane);
}
template <typename T>
T shuffle_down(T value, int delta) {
  const int from = lane_id() + delta;
  return shuffle_from("shuffle_down", value, from < 32 ? from : lane_id());
}
inline bool warp_any(bool predicate) {
  bool mine = predicate;
  simt::warp_meet("warp_any", &mine, [](void* const* lanes) {
    bool any = false;
    for (int i = 0; i < 32; ++i) any |= *static_cast<bool*>(lanes[i]);
    for (int i = 0; i < 32; ++i) *static_cast<bool*>(lanes[i]) = any;
  });
  return mine;
}
inline void warp_sync() { simt::warp_barrier(); }

}  // namespace ddpm::cuda
