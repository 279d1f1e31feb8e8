#include "tests/simt/warpgroup.h"

#include <algorithm>
#include <cstring>

#include "kernels/bf16.h"
#include "tests/simt/machine.h"

namespace ddpm::simt {
namespace {

constexpr uint32_t kPiece = 16, kDepth = 16;  // bytes that swizzles move, elements of a product

// Where 16 bytes of a row lie: bits 4.. of the address are turned over by bits 7.. of it.
uint32_t piece_at(const Operand& o, uint32_t row, uint32_t piece) {
  const uint32_t at = o.offset + row * o.row_bytes + piece * kPiece;
  return at ^ (at >> 7 & (o.row_bytes / 32 == 4 ? 7u : o.row_bytes / 32 == 2 ? 3u : 1u)) << 4;
}

float low(uint32_t pair) { return to_float(bf16{static_cast<uint16_t>(pair)}); }
float high(uint32_t pair) { return to_float(bf16{static_cast<uint16_t>(pair >> 16)}); }

template <typename F>
void for_pieces(const Operand& o, F f) {
  for (uint32_t row = 0; row < kProductColumns; ++row)
    for (uint32_t piece = 0; piece < kDepth * 2 / kPiece; ++piece)
      f(row, piece, piece_at(o, row, piece));
}

}  // namespace

void Warpgroups::reset(unsigned threads) {
  threads_ = threads;
  for (Warp& w : warps_) w = {};
  for (auto& log : logs_) log.clear();
  reading_.clear();
}

// The first warp to ask writes the log, the others are held against it.
void Warpgroups::note(unsigned warp, Kind kind, uint64_t what) {
  if (threads_ % 128 != 0) fail_thread("is in a warpgroup's operation, in a block of part of one");
  std::vector<uint64_t>& log = logs_[warp / 4];
  const uint64_t entry = static_cast<uint64_t>(kind) << 56 | what;
  const size_t at = warps_[warp].done++;
  if (at == log.size())
    log.push_back(entry);
  else if (log[at] != entry)
    fail_thread(
        "asks for another operation of its warpgroup, or of other operands, than its warps");
}

void Warpgroups::fence(unsigned warp) {
  note(warp, Kind::kFence, 0);
  ++warps_[warp].fences;
}

void Warpgroups::issue(unsigned warp, void* const* lanes) {
  Warp& w = warps_[warp];
  Product product;
  for (size_t i = 0; i < 32; ++i) product.lanes[i] = *static_cast<const ProductLane*>(lanes[i]);
  const Operand o = product.lanes[0].operand;
  note(warp, Kind::kProduct, uint64_t{o.row_bytes} << 32 | o.offset);
  for (const ProductLane& lane : product.lanes) {
    if (!(lane.operand == o)) fail_thread("gives its lanes' products different operands");
    if (w.fences <= lane.sums_use->changed || w.fences <= lane.rows_use->changed)
      fail_thread("multiplies registers that were changed since the last warpgroup_fence");
    ++lane.sums_use->under_way;
    ++lane.rows_use->under_way;
  }
  size_t begin = SIZE_MAX, end = 0;
  for_pieces(o, [&](uint32_t, uint32_t, uint32_t at) {
    check_operand(at, kPiece);
    begin = std::min<size_t>(begin, at);
    end = std::max<size_t>(end, at + kPiece);
  });
  reading_.push_back({warp, begin, end});
  w.open.push_back(product);
}

void Warpgroups::commit(unsigned warp) {
  note(warp, Kind::kCommit, 0);
  warps_[warp].groups.push_back(std::move(warps_[warp].open));
  warps_[warp].open.clear();
}

// Products are done as late as they may be: when they are waited for.
void Warpgroups::wait(unsigned warp, int newest) {
  note(warp, Kind::kWait, static_cast<uint64_t>(newest));
  auto& groups = warps_[warp].groups;
  while (static_cast<int>(groups.size()) > newest) {
    for (const Product& p : groups.front()) finish(warp, p);
    groups.pop_front();
  }
}

void Warpgroups::finish(unsigned warp, const Product& product) {
  float a[16][kDepth], b[kDepth][kProductColumns];
  for (int lane = 0; lane < 32; ++lane) {
    const ProductLane& l = product.lanes[static_cast<size_t>(lane)];
    const int row = lane / 4, pair = lane % 4 * 2;
    for (int i = 0; i < 4; ++i) {
      const uint32_t both = l.rows[static_cast<size_t>(i)];
      a[row + i % 2 * 8][pair + i / 2 * 8] = low(both);
      a[row + i % 2 * 8][pair + i / 2 * 8 + 1] = high(both);
    }
  }
  const Operand& o = product.lanes[0].operand;
  const char* shared = static_cast<const char*>(shared_part(0, 0));
  for_pieces(o, [&](uint32_t row, uint32_t piece, uint32_t at) {
    bf16 values[kPiece / 2];
    std::memcpy(values, shared + at, kPiece);
    for (uint32_t i = 0; i < kPiece / 2; ++i) b[piece * 8 + i][row] = to_float(values[i]);
    note_operand(at, kPiece);
  });
  for (int m = 0; m < 16; ++m) {
    float sums[kProductColumns] = {};
    for (uint32_t k = 0; k < kDepth; ++k)
      for (int n = 0; n < kProductColumns; ++n) sums[n] += a[m][k] * b[k][n];
    // A lane holds two neighbouring columns of each eight, of rows lane / 4 and that + 8.
    for (int n = 0; n < kProductColumns; ++n) {
      const ProductLane& l = product.lanes[static_cast<size_t>(m % 8 * 4 + n % 8 / 2)];
      l.sums[n / 8 * 4 + m / 8 * 2 + n % 2] += sums[n];
    }
  }
  for (const ProductLane& lane : product.lanes) {
    --lane.sums_use->under_way;
    --lane.rows_use->under_way;
  }
  const auto first = std::find_if(reading_.begin(), reading_.end(),
                                  [&](const Range& r) { return r.warp == warp; });
  reading_.erase(first);
}

void Warpgroups::set_registers(unsigned warp, unsigned count) {
  note(warp, Kind::kRegisters, count);
  if (count % 8 != 0 || count < 24 || count > 256)
    fail_thread("asks for a number of registers that there is not");
  warps_[warp].registers = count;
}

bool Warpgroups::reads(size_t offset, size_t bytes) const {
  return std::any_of(reading_.begin(), reading_.end(),
                     [&](const Range& r) { return offset < r.end && offset + bytes > r.begin; });
}

const char* Warpgroups::unfinished() const {
  constexpr unsigned kRegisters = 65536;
  unsigned registers = 0, set = 0;
  for (unsigned i = 0; i < threads_ / 32; ++i) {
    const Warp& w = warps_[i];
    if (!w.open.empty() || !w.groups.empty()) return "ends while products are under way";
    if (w.done != logs_[i / 4].size())
      return "ends with operations of a warpgroup that not all its warps asked for";
    registers += 32 * w.registers;
    set += w.registers > 0;
  }
  if (set != 0 && set != threads_ / 32) return "ends with registers set by some warpgroups only";
  if (registers > kRegisters) return "asks for more registers than a multiprocessor has";
  return nullptr;
}

}  // namespace ddpm::simt
