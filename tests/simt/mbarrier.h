// Barriers in shared memory: threads arrive, warps wait for a phase to end, and bulk copies hold
// the phase until their bytes have come.
#pragma once

#include <cstddef>
#include <cstdint>

#include "tests/simt/order.h"

namespace ddpm::simt {

struct Mbarrier {
  size_t offset = 0;  // in shared memory
  unsigned index = 0;
  unsigned count = 0, left = 0;  // arrivals that end a phase, those that are missing
  int64_t bytes = 0;             // that are expected and have not come
  uint32_t phase = 0;
  Order arrived{}, passed{};  // what comes before the end of this phase, of the last one
  unsigned maker = 0;         // the thread that made it, and when
  uint32_t epoch = 0;
  bool fenced = false;

  bool has_passed(unsigned parity) const { return (phase & 1) != parity; }
  void arrive(const Order& order) {
    join(arrived, order);
    --left;
    end_if_complete();
  }
  void come(int64_t count_of_bytes) {
    bytes -= count_of_bytes;
    end_if_complete();
  }

 private:
  void end_if_complete() {
    if (left > 0 || bytes != 0) return;
    ++phase;
    left = count;
    arrived[kWarps + index] = phase;
    passed = arrived;
  }
};

struct BulkCopy {
  void* to;
  const void* from;
  size_t bytes;
  unsigned barrier;
};

}  // namespace ddpm::simt
