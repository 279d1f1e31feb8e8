// The warpgroup's matrix product of sm_90, wgmma m64n128k16: asynchronous, so what it reads and
// writes is nobody else's until it is waited for. Each of the four warps has 16 rows of its own,
// and runs by itself, but all four must ask for the same.
#pragma once

#include <array>
#include <cstdint>
#include <deque>
#include <vector>

#include "tests/simt/order.h"

namespace ddpm::simt {

// Registers of a lane that a product reads or writes.
struct Fragment {
  int under_way = 0;     // products that have not been waited for
  uint32_t changed = 0;  // fences that the warp had passed when it last changed them by itself
};

inline constexpr int kProductColumns = 128;

// 128 rows (columns of the product) in shared memory: each `row_bytes` long, 16 bytes pieces
// swizzled; `offset` is where the first row's first of 16 elements would be if they were not.
struct Operand {
  uint32_t offset = 0;
  uint32_t row_bytes = 0;  // 32, 64 or 128
  bool operator==(const Operand&) const = default;
};

// What a lane brings.
struct ProductLane {
  float* sums = nullptr;  // 64 of them
  Fragment* sums_use = nullptr;
  std::array<uint32_t, 4> rows{};
  Fragment* rows_use = nullptr;
  Operand operand;
};

// Of one block. All functions are of the running warp, throw what is wrong, and are called once
// for all its lanes.
class Warpgroups {
 public:
  void reset(unsigned threads);
  void fence(unsigned warp);
  void issue(unsigned warp, void* const* lanes);  // ProductLane
  void commit(unsigned warp);
  void wait(unsigned warp, int newest);
  // setmaxnreg
  void set_registers(unsigned warp, unsigned count);

  uint32_t fences(unsigned warp) const { return warps_[warp].fences; }
  // Whether a product that is under way reads any of these bytes.
  bool reads(size_t offset, size_t bytes) const;
  // Empty, or what is wrong when the block has ended.
  const char* unfinished() const;

 private:
  struct Product {
    std::array<ProductLane, 32> lanes;
  };
  struct Range {
    unsigned warp;
    size_t begin, end;
  };
  struct Warp {
    uint32_t fences = 0;
    unsigned registers = 0;
    size_t done = 0;  // of its warpgroup's log
    std::vector<Product> open;
    std::deque<std::vector<Product>> groups;
  };
  enum class Kind : uint64_t { kFence, kProduct, kCommit, kWait, kRegisters };
  void note(unsigned warp, Kind kind, uint64_t what);
  void finish(unsigned warp, const Product& product);

  unsigned threads_ = 0;
  std::array<Warp, kWarps> warps_;
  std::array<std::vector<uint64_t>, kWarps / 4>
      logs_;  // what a warpgroup's warps ask for, in order
  std::vector<Range> reading_;
};

}  // namespace ddpm::simt
