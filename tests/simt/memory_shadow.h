// Who last touched what, for finding races.
#pragma once

#include <cstdint>
#include <vector>

#include "tests/simt/machine.h"

namespace ddpm::simt {

// Of two bytes of shared memory.
struct SharedShadow {
  uint32_t write_epoch = 0, read_epoch = 0;  // barriers passed since the machine began
  uint32_t write_sync = 0, read_sync = 0;    // warp barriers the toucher's warp had passed
  uint16_t writer = 0, reader = 0;           // threads; or one of the below
  bool pending = false;                      // an asynchronous copy is under way
};
inline constexpr uint16_t kSeveral = 0xFFFF;  // several warps
inline constexpr uint16_t kWarpBit = 0x8000;  // several lanes of a warp: this | warp

// What a thread needs to know of itself to judge an access.
struct Toucher {
  uint16_t thread;
  uint32_t epoch, first_epoch, sync;  // first_epoch: of this block
};

// Empty, or what is wrong.
const char* judge_shared(SharedShadow& s, const Toucher& t, Access access);
const char* judge_global(uint64_t& entry, uint64_t launch, uint64_t block, Access access);

}  // namespace ddpm::simt
