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

inline uint16_t warp_of(uint16_t thread) {
  return static_cast<uint16_t>(thread & kWarpBit ? thread & ~kWarpBit : thread / 32);
}

// Whether `other` touched it in this epoch in a way that `t` is not ordered after.
inline bool unordered(uint16_t other, uint32_t epoch, uint32_t sync, const Toucher& t) {
  if (epoch != t.epoch || other == t.thread) return false;
  if (other == kSeveral || warp_of(other) != t.thread / 32) return true;
  return sync >= t.sync;
}

// Empty, or what is wrong.
inline const char* judge_shared(SharedShadow& s, const Toucher& t, Access access) {
  if (s.pending) return "touches shared memory that an asynchronous copy has not finished";
  if (access == Access::kRead) {
    if (s.write_epoch < t.first_epoch) return "reads shared memory that was never written";
    if (unordered(s.writer, s.write_epoch, s.write_sync, t))
      return "reads shared memory that another thread wrote since the last barrier";
    if (s.read_epoch != t.epoch) {
      s.reader = t.thread;
    } else if (s.reader != t.thread && s.reader != kSeveral) {
      s.reader = warp_of(s.reader) == t.thread / 32
                     ? static_cast<uint16_t>(kWarpBit | t.thread / 32)
                     : kSeveral;
    }
    s.read_epoch = t.epoch;
    s.read_sync = t.sync;
    return nullptr;
  }
  if (unordered(s.writer, s.write_epoch, s.write_sync, t))
    return "writes shared memory that another thread wrote since the last barrier";
  if (unordered(s.reader, s.read_epoch, s.read_sync, t))
    return "writes shared memory that another thread read since the last barrier";
  s.writer = t.thread;
  s.write_epoch = t.epoch;
  s.write_sync = t.sync;
  return nullptr;
}

// entry: launch (16 bits), writing block + 1 (24), reading block + 1 (24; all ones: several).
inline const char* judge_global(uint64_t& entry, uint64_t launch, uint64_t block, Access access) {
  constexpr uint64_t kMask = 0xFFFFFF, kMany = 0xFFFFFF;
  if (entry >> 48 != launch) entry = launch << 48;
  const uint64_t me = (block + 1) & kMask;
  uint64_t writer = entry >> 24 & kMask, reader = entry & kMask;
  if (writer != 0 && writer != me)
    return access == Access::kRead ? "reads memory that another block wrote in this launch"
                                   : "writes memory that another block wrote in this launch";
  if (access == Access::kRead) {
    reader = reader == 0 || reader == me ? me : kMany;
  } else {
    if (reader != 0 && reader != me) return "writes memory that another block read in this launch";
    writer = me;
  }
  entry = launch << 48 | writer << 24 | reader;
  return nullptr;
}

}  // namespace ddpm::simt
