// What comes before what in a block whose warps do not all meet: vector clocks.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>

namespace ddpm::simt {

inline constexpr unsigned kWarps = 32, kMbarriers = 32;

// Of each warp, how many of the stretches between its warp barriers, and of each mbarrier, of how
// many of its phases the bulk copies, come before.
using Order = std::array<uint32_t, kWarps + kMbarriers>;

inline void join(Order& to, const Order& from) {
  for (size_t i = 0; i < to.size(); ++i) to[i] = std::max(to[i], from[i]);
}

}  // namespace ddpm::simt
