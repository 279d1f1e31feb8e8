// Who last touched what, for finding races.
#pragma once

#include <array>
#include <cstdint>
#include <vector>

#include "tests/simt/machine.h"
#include "tests/simt/order.h"

namespace ddpm::simt {

// Of two bytes of shared memory.
struct SharedShadow {
  uint32_t write_epoch = 0, read_epoch = 0;  // barriers passed since the machine began
  uint32_t write_sync = 0, read_sync = 0;  // warp barriers the toucher's warp had passed, or phase
  uint16_t writer = 0, reader = 0;         // threads; or one of the below
  uint16_t fence = 0;                      // proxy fences the writer had passed
  bool pending = false;                    // an asynchronous copy is under way
};
inline constexpr uint16_t kSeveral = 0xFFFF;      // several warps
inline constexpr uint16_t kWarpBit = 0x8000;      // several lanes of a warp: this | warp
inline constexpr uint16_t kMbarrierBit = 0x4000;  // a bulk copy: this | its mbarrier

// Where several warps read and not all warps meet: which read since the last barrier of the block,
// and when, each.
struct Readers {
  uint32_t warps = 0;
  std::array<uint32_t, kWarps> sync;

  void add(unsigned warp, uint32_t at) {
    warps |= 1u << warp;
    sync[warp] = at;
  }
};

// What a thread needs to know of itself to judge an access.
struct Toucher {
  uint16_t thread, fence;
  uint32_t epoch, first_epoch;  // first_epoch: of this block
  const Order& order;           // of its warp

  unsigned warp() const { return thread / 32u; }
  uint32_t sync() const { return order[warp()]; }
};

// Its place in an Order.
inline unsigned agent_of(uint16_t toucher) {
  if (toucher & kWarpBit) return toucher & ~unsigned{kWarpBit};
  if (toucher & kMbarrierBit) return kWarps + (toucher & ~unsigned{kMbarrierBit});
  return toucher / 32u;
}

// Whether `other` touched it in this epoch in a way that `t` is not ordered after.
inline bool unordered(uint16_t other, uint32_t epoch, uint32_t sync, const Toucher& t) {
  if (epoch != t.epoch || other == t.thread) return false;
  return other == kSeveral || sync >= t.order[agent_of(other)];
}
// Whether there are reads that `t` is not ordered after. readers: null where all warps meet at
// every barrier.
inline bool read_unordered(const SharedShadow& s, const Readers* readers, const Toucher& t) {
  if (s.reader != kSeveral || readers == nullptr || s.read_epoch != t.epoch)
    return unordered(s.reader, s.read_epoch, s.read_sync, t);
  for (unsigned w = 0; w < kWarps; ++w)
    if ((readers->warps >> w & 1) != 0 && readers->sync[w] >= t.order[w]) return true;
  return false;
}

// What comes after this read comes after those that it is ordered after: they are forgotten.
inline void note_read(SharedShadow& s, Readers* readers, const Toucher& t) {
  if (s.reader != t.thread) {
    if (!read_unordered(s, readers, t)) {
      s.reader = t.thread;
    } else if (s.reader != kSeveral) {
      if (agent_of(s.reader) == t.warp()) {
        s.reader = static_cast<uint16_t>(kWarpBit | t.warp());
      } else {
        if (readers != nullptr) {
          readers->warps = 0;
          readers->add(agent_of(s.reader), s.read_sync);
        }
        s.reader = kSeveral;
      }
    }
  }
  if (s.reader == kSeveral && readers != nullptr) readers->add(t.warp(), t.sync());
  s.read_epoch = t.epoch;
  s.read_sync = t.sync();
}

// Empty, or what is wrong.
inline const char* judge_shared(SharedShadow& s, Readers* readers, const Toucher& t,
                                Access access) {
  if (s.pending) return "touches shared memory that an asynchronous copy has not finished";
  const bool race = unordered(s.writer, s.write_epoch, s.write_sync, t);
  if (access == Access::kRead) {
    if (s.write_epoch < t.first_epoch) return "reads shared memory that was never written";
    if (race) return "reads shared memory that another thread wrote since the last barrier";
    note_read(s, readers, t);
    return nullptr;
  }
  if (race) return "writes shared memory that another thread wrote since the last barrier";
  if (read_unordered(s, readers, t))
    return "writes shared memory that another thread read since the last barrier";
  s.writer = t.thread;
  s.write_epoch = t.epoch;
  s.write_sync = t.sync();
  s.fence = t.fence;
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
