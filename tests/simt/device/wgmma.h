// The host's version of kernels/cuda/device/wgmma.h: registers that know whether a product uses
// them.
#pragma once

#include <exception>

#include "device/mma.h"
#include "tests/simt/machine.h"
#include "tests/simt/warpgroup.h"

namespace ddpm::cuda {

inline constexpr bool kHasWgmma = true;
inline void refuse_to_run() { simt::fail_thread("runs on a chip without wgmma"); }

inline constexpr int kWgmmaRows = 64, kWgmmaColumns = simt::kProductColumns, kWgmmaDepth = 16;

class WgmmaRegisters {
 public:
  WgmmaRegisters() = default;
  WgmmaRegisters(const WgmmaRegisters&) = delete;
  ~WgmmaRegisters() {
    if (use_.under_way > 0 && std::uncaught_exceptions() == 0)
      simt::note_error("leaves registers that a product under way uses");
  }
  simt::Fragment* use() { return &use_; }
  void read() const {
    if (use_.under_way > 0) simt::fail_thread("reads registers that a product under way writes");
  }
  void change() {
    if (use_.under_way > 0) simt::fail_thread("changes registers that a product under way uses");
    use_.changed = simt::warpgroups().fences(simt::current_warp());
  }

 private:
  simt::Fragment use_;
};

class WgmmaSums {
 public:
  void clear() {
    registers.change();
    for (float& x : v) x = 0;
  }
  float operator[](int i) const {
    registers.read();
    return v[i];
  }
  void settle() { registers.read(); }

  WgmmaRegisters registers;
  float v[kWgmmaColumns / 2];
};

class WgmmaRows {
 public:
  void load(const Smem<const bf16>& row) {
    registers.change();
    ldmatrix_x4(r, row);
  }

  WgmmaRegisters registers;
  uint32_t r[4];
};

struct WgmmaOperand {
  simt::Operand operand;

  WgmmaOperand at(int depth) const {
    WgmmaOperand moved = *this;
    moved.operand.offset += static_cast<uint32_t>(depth * 2);
    return moved;
  }
};
template <int RowBytes>
WgmmaOperand wgmma_operand(const Smem<const bf16>& columns) {
  static_assert(RowBytes == 64 || RowBytes == 128);
  columns.check_bounds(columns.raw(), size_t{kWgmmaColumns} * RowBytes);
  const auto offset = static_cast<uint32_t>(reinterpret_cast<const char*>(columns.raw()) -
                                            static_cast<const char*>(simt::shared_part(0, 0)));
  if (offset % (8 * RowBytes) != 0) simt::fail_thread("multiplies columns that are not aligned");
  return {{offset, RowBytes}};
}

inline void wgmma_fence() {
  simt::warp_meet("wgmma_fence", nullptr,
                  [](void* const*) { simt::warpgroups().fence(simt::current_warp()); });
}
inline void wgmma(WgmmaSums& d, WgmmaRows& a, const WgmmaOperand& b) {
  simt::ProductLane mine{
      d.v, d.registers.use(), {a.r[0], a.r[1], a.r[2], a.r[3]}, a.registers.use(), b.operand};
  simt::warp_meet("wgmma", &mine, [](void* const* lanes) {
    simt::warpgroups().issue(simt::current_warp(), lanes);
  });
}
inline void wgmma_commit() {
  simt::warp_meet("wgmma_commit", nullptr,
                  [](void* const*) { simt::warpgroups().commit(simt::current_warp()); });
}
template <int Newest>
void wgmma_wait() {
  simt::warp_meet("wgmma_wait", nullptr,
                  [](void* const*) { simt::warpgroups().wait(simt::current_warp(), Newest); });
}

}  // namespace ddpm::cuda
