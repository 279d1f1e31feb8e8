// As test_simt.cpp, for what sm_90 adds: mbarriers, bulk copies, barriers of some warps, the
// warpgroup's product. Each planted error is found, and the same kernel without it is right.
#include <device/launch.h>
#include <device/mbarrier.h>
#include <device/memory.h>
#include <device/warp.h>
#include <device/warpgroup.h>
#include <device/wgmma.h>
#include <catch2/catch.hpp>

#include "tests/reference/gemm.h"
#include "tests/simt/simt_backend.h"
#include "tests/support.h"

using namespace ddpm;
using namespace ddpm::cuda;
using Catch::Contains;

namespace {

struct Floats {
  std::unique_ptr<Backend> backend = test::make_simt_backend(DType::kF32);
  std::unique_ptr<Memory> memory;
  explicit Floats(int count) : memory(backend->allocate(static_cast<size_t>(count) * 4)) {
    for (int i = 0; i < count; ++i) data()[i] = static_cast<float>(i);
  }
  float* data() { return static_cast<float*>(memory->data()); }
};

enum class Ring {
  kRight,
  kNoWaitForFull,
  kNoWaitForEmpty,
  kNoFence,
  kNoBlockBarrier,
  kMadeTwice,
  kNeverMade,
  kTooManyArrivals,
  kTooFewArrivals,
  kTooFewBytes,
  kTooManyBytes,
  kNoArrival,
  kOneLaneWaits,
  kOddBytes,
  kLeftUnderWay,
};

// y = x, six times 32 floats, by bulk copies of warp 0 through two slots that warp 1 reads.
template <Ring Plant>
__global__ void ring_kernel(Global<const float> x, Global<float> y) {
  SharedMemory shared;
  const Smem<float> slots = shared.take<float>(64);
  const Smem<Mbarrier> full = shared.take<Mbarrier>(2), empty = shared.take<Mbarrier>(2);
  if (threadIdx.x == 0) {
    for (int i = 0; i < 2; ++i) {
      mbarrier_init(full + i, Plant == Ring::kTooManyArrivals ? 2 : 1);
      if (Plant != Ring::kNeverMade)
        mbarrier_init(empty + i, Plant == Ring::kTooFewArrivals ? 32 : 1);
    }
    if (Plant == Ring::kMadeTwice) mbarrier_init(full, 1);
    if (Plant != Ring::kNoFence) mbarrier_init_fence();
  }
  if (Plant != Ring::kNoBlockBarrier) block_sync();
  const bool leader = lane_id() == 0;
  for (int i = 0; i < 6; ++i) {
    const int slot = i % 2;
    const unsigned parity = static_cast<unsigned>(i / 2 % 2);
    if (warp_id() == 0) {
      if (Plant != Ring::kNoWaitForEmpty) mbarrier_wait(empty + slot, parity ^ 1);
      if (leader) {
        constexpr unsigned kBytes = Plant == Ring::kOddBytes ? 120 : 128;
        mbarrier_arrive_expect(full + slot, Plant == Ring::kTooFewBytes    ? 112
                                            : Plant == Ring::kTooManyBytes ? 144
                                                                           : kBytes);
        bulk_copy(slots + slot * 32, x + i * 32, kBytes, full + slot);
      }
    } else if (Plant != Ring::kLeftUnderWay) {
      if (Plant == Ring::kOneLaneWaits) {
        if (leader) mbarrier_wait(full + slot, parity);
      } else if (Plant != Ring::kNoWaitForFull) {
        mbarrier_wait(full + slot, parity);
      }
      y[i * 32 + lane_id()] = slots[slot * 32 + (lane_id() ^ 1)];
      warp_sync();
      if (leader && Plant != Ring::kNoArrival) mbarrier_arrive(empty + slot);
    } else if (i == 1) {
      break;
    }
    if (Plant == Ring::kLeftUnderWay && i == 1) break;
  }
}

// Ordinary stores of warp 0, which warp 1 reads after the mbarrier.
template <bool Sync>
__global__ void hand_over_kernel(Global<float> y) {
  SharedMemory shared;
  const Smem<float> part = shared.take<float>(32);
  const Smem<Mbarrier> full = shared.take<Mbarrier>(1);
  if (threadIdx.x == 0) {
    mbarrier_init(full, 1);
    mbarrier_init_fence();
  }
  block_sync();
  if (warp_id() == 0) {
    part[lane_id()] = static_cast<float>(lane_id());
    if constexpr (Sync) warp_sync();
    if (lane_id() == 0) mbarrier_arrive(full);
  } else {
    mbarrier_wait(full, 0);
    y[lane_id()] = part[31 - lane_id()];
  }
}

// Warps 0 to 2 hand one slot on: who is ordered after 1 is after 0 as well. Both read before 0
// writes again.
template <bool AllArrive>
__global__ void chain_kernel(Global<float> y) {
  SharedMemory shared;
  const Smem<float> part = shared.take<float>(32);
  const Smem<Mbarrier> first = shared.take<Mbarrier>(3), second = first + 1, back = first + 2;
  if (threadIdx.x == 0) {
    mbarrier_init(first, 1);
    mbarrier_init(second, 1);
    mbarrier_init(back, AllArrive ? 2 : 1);
    mbarrier_init_fence();
  }
  block_sync();
  const bool leader = lane_id() == 0;
  const int warp = warp_id();
  if (warp == 0) {
    part[lane_id()] = 1;
    warp_sync();
    if (leader) mbarrier_arrive(first);
    mbarrier_wait(back, 0);
    part[31 - lane_id()] = 2;
    return;
  }
  mbarrier_wait(warp == 1 ? first : second, 0);
  y[warp * 32 + lane_id()] = part[31 - lane_id()];
  warp_sync();
  if (leader && warp == 1) mbarrier_arrive(second);
  if (leader && (AllArrive || warp == 1)) mbarrier_arrive(back);
}

// Warps 0 and 1 meet without warp 2.
template <unsigned Threads, bool ThirdReads>
__global__ void named_kernel(Global<float> y) {
  SharedMemory shared;
  const Smem<float> part = shared.take<float>(64);
  if (warp_id() < 2) {
    for (int i = 0; i < 2; ++i) {
      part[threadIdx.x] = static_cast<float>(threadIdx.x);
      named_barrier(3, Threads);
      y[threadIdx.x] = part[63 - threadIdx.x];
      named_barrier(3, Threads);
    }
  } else if (ThirdReads) {
    y[threadIdx.x] = part[lane_id()];
  }
}

enum class Product {
  kRight,
  kNoFence,
  kNoFenceAfterLoad,
  kNoWait,
  kSumsChanged,
  kColumnsOverwritten,
  kRowsReloaded,
  kRowsLeft,
  kNoProxyFence,
  kNotWritten,
  kWarpMissing,
  kOtherColumns,
  kNotAligned,
  kLeftUnderWay,
};

// c (64,128) = a (64, depth) b (128, depth) transposed, b swizzled already; twice, so 2 a b.
template <int RowBytes, Product Plant>
__global__ void product_kernel(Global<const bf16> a, Global<const bf16> b, Global<float> c) {
  constexpr int kDepth = RowBytes / 2, kPitch = kDepth + 8;
  SharedMemory shared;
  const Smem<bf16> columns = shared.take<bf16>(256 * kDepth), rows = shared.take<bf16>(64 * kPitch);
  const int thread = static_cast<int>(threadIdx.x);
  for (int i = thread; i < 64 * kDepth; i += 128) rows[i / kDepth * kPitch + i % kDepth] = a[i];
  for (int i = thread; i < 128 * kDepth; i += 128)
    if (Plant != Product::kNotWritten || i > 0) {
      columns[i] = b[i];
      columns[i + 128 * kDepth] = b[i];
    }
  if (Plant != Product::kNoProxyFence) proxy_fence();
  block_sync();
  WgmmaSums sums;
  sums.clear();
  const int row = warp_id() * 16 + lane_id() % 16;
  const int moved = Plant == Product::kNotAligned                       ? RowBytes / 2
                    : Plant == Product::kOtherColumns && warp_id() == 2 ? 128 * kDepth
                                                                        : 0;
  const WgmmaOperand operand = wgmma_operand<RowBytes>(columns + moved);
  if (Plant == Product::kWarpMissing && warp_id() == 3) return;
  for (int times = 0; times < 2; ++times) {
    WgmmaRows of_step[kDepth / 16];
    if (Plant == Product::kNoFenceAfterLoad) wgmma_fence();
    for (int k = 0; k < kDepth; k += 16)
      of_step[k / 16].load(rows + row * kPitch + k + lane_id() / 16 * 8);
    if (Plant != Product::kNoFence && Plant != Product::kNoFenceAfterLoad) wgmma_fence();
    for (int k = 0; k < kDepth; k += 16) wgmma(sums, of_step[k / 16], operand.at(k));
    if (Plant == Product::kLeftUnderWay && times == 1) return;
    wgmma_commit();
    if (Plant == Product::kSumsChanged) sums.clear();
    if (Plant == Product::kRowsReloaded) of_step[0].load(rows + row * kPitch);
    if (Plant == Product::kColumnsOverwritten) {
      block_sync();  // which does not wait for products
      if (thread == 0) columns[5] = bf16{0};
      block_sync();
    }
    if (Plant == Product::kRowsLeft) continue;
    if (Plant != Product::kNoWait) wgmma_wait<0>();
    sums.settle();
  }
  for (int i = 0; i < 64; ++i)
    c[(warp_id() * 16 + lane_id() / 4 + i / 2 % 2 * 8) * 128 + i / 4 * 8 + lane_id() % 4 * 2 +
      i % 2] = sums[i];
}

// Warpgroup 0 gives registers up, warpgroup 1 takes them.
template <int Given, int Taken, bool All>
__global__ void registers_kernel() {
  if (warp_id() < 4) {
    if (All || warp_id() != 2) give_up_registers<Given>();
  } else {
    take_registers<Taken>();
  }
}

template <Ring Plant>
void run_ring(Floats& y) {
  Floats x(192);
  launch<ring_kernel<Plant>>({.block = 64, .shared = 1024}, nullptr, x.data(), y.data());
}

// What the hardware makes of addresses, over the whole of 128 rows: bits 4.. by bits 7...
std::vector<float> swizzled(const std::vector<float>& rows, int row_bytes) {
  std::vector<float> to(rows.size());
  const size_t mask = row_bytes == 128 ? 7 : 3;
  for (size_t i = 0; i < rows.size(); ++i) {
    const size_t byte = 2 * i;
    to[(byte ^ (byte >> 7 & mask) << 4) / 2] = rows[i];
  }
  return to;
}

template <int RowBytes, Product Plant>
void run_product() {
  constexpr int kDepth = RowBytes / 2;
  const auto backend = test::make_simt_backend(DType::kBF16);
  const auto a = test::rounded(*backend, test::random_values(64 * kDepth, 1));
  const auto b = test::rounded(*backend, test::random_values(128 * kDepth, 2));
  test::Bench bench(*backend);
  const In as = bench.activation(a), bs = bench.activation(swizzled(b, RowBytes));
  const Out c = bench.out(64 * 128);
  bench.run({"product", {as, bs}, {c}, 0, [=](const Run& r) {
               launch<product_kernel<RowBytes, Plant>>({.block = 128, .shared = 65536}, nullptr,
                                                       r.in<bf16>(as), r.in<bf16>(bs),
                                                       r.out<float>(c));
             }});
  std::vector<float> turned(b.size());  // (depth, 128)
  for (size_t n = 0; n < 128; ++n)
    for (size_t k = 0; k < kDepth; ++k) turned[k * 128 + n] = 2 * b[n * kDepth + k];
  const auto expected = ref::gemm({.m = 64, .n = 128, .k = kDepth}, test::to_double(a),
                                  test::to_double(turned), {}, {});
  CHECK(test::relative_error(bench.get(c), expected) <= 1e-6);
}

}  // namespace

TEST_CASE("simt.machine: bulk copies through a ring of mbarriers", "[simt]") {
  Floats y(192);
  for (uint64_t seed = 0; seed < 3; ++seed) {
    simt::options().seed = seed;
    std::fill(y.data(), y.data() + 192, 0.0f);
    run_ring<Ring::kRight>(y);
    for (int i = 0; i < 192; ++i) REQUIRE(y.data()[i] == static_cast<float>(i ^ 1));
  }
  simt::options().seed = 0;
  CHECK_THROWS_WITH(run_ring<Ring::kNoWaitForFull>(y),
                    Contains("copy has not finished") || Contains("never written"));
  CHECK_THROWS_WITH(run_ring<Ring::kNoWaitForEmpty>(y), Contains("copy has not finished") ||
                                                            Contains("wrote since") ||
                                                            Contains("read since"));
  CHECK_THROWS_WITH(run_ring<Ring::kNoFence>(y), Contains("made without a fence"));
  CHECK_THROWS_WITH(run_ring<Ring::kNoBlockBarrier>(y),
                    Contains("made since the last barrier") || Contains("where none was made"));
  CHECK_THROWS_WITH(run_ring<Ring::kMadeTwice>(y), Contains("twice"));
  CHECK_THROWS_WITH(run_ring<Ring::kNeverMade>(y), Contains("where none was made"));
  CHECK_THROWS_WITH(run_ring<Ring::kTooManyArrivals>(y),
                    Contains("not all threads meet") && Contains("1 of 2 arrivals"));
  CHECK_THROWS_WITH(run_ring<Ring::kTooFewArrivals>(y), Contains("31 of 32 arrivals"));
  CHECK_THROWS_WITH(run_ring<Ring::kTooFewBytes>(y),
                    Contains("waits at an mbarrier") && Contains("-16 bytes missing"));
  CHECK_THROWS_WITH(run_ring<Ring::kTooManyBytes>(y), Contains("16 bytes missing"));
  CHECK_THROWS_WITH(run_ring<Ring::kNoArrival>(y), Contains("waits at an mbarrier"));
  CHECK_THROWS_WITH(run_ring<Ring::kOneLaneWaits>(y),
                    Contains("has not finished") || Contains("never written"));
  CHECK_THROWS_WITH(run_ring<Ring::kOddBytes>(y), Contains("multiple of 16"));
  CHECK_THROWS_WITH(run_ring<Ring::kLeftUnderWay>(y), Contains("bulk copies are under way"));
}

TEST_CASE("simt.machine: an mbarrier hands on what came before it", "[simt]") {
  Floats y(96);
  const LaunchShape two{.block = 64, .shared = 1024}, three{.block = 96, .shared = 1024};
  for (uint64_t seed = 0; seed < 4; ++seed) {
    simt::options().seed = seed;
    launch<hand_over_kernel<true>>(two, nullptr, y.data());
    for (int i = 0; i < 32; ++i) REQUIRE(y.data()[i] == static_cast<float>(31 - i));
    CHECK_THROWS_WITH(launch<hand_over_kernel<false>>(two, nullptr, y.data()),
                      Contains("another thread wrote since"));
    CHECK_NOTHROW(launch<chain_kernel<true>>(three, nullptr, y.data()));
    CHECK_THROWS_WITH(
        launch<chain_kernel<false>>(three, nullptr, y.data()),
        Contains("another thread read since") || Contains("another thread wrote since"));
  }
  simt::options().seed = 0;
}

TEST_CASE("simt.machine: named barriers order those that meet", "[simt]") {
  Floats y(96);
  const LaunchShape three{.block = 96, .shared = 1024};
  launch<named_kernel<64, false>>(three, nullptr, y.data());
  for (int i = 0; i < 64; ++i) REQUIRE(y.data()[i] == static_cast<float>(63 - i));
  for (uint64_t seed = 0; seed < 4; ++seed) {
    simt::options().seed = seed;
    CHECK_THROWS_WITH(
        (launch<named_kernel<64, true>>(three, nullptr, y.data())),
        Contains("wrote since") || Contains("read since") || Contains("never written"));
  }
  simt::options().seed = 0;
  CHECK_THROWS_WITH((launch<named_kernel<96, false>>(three, nullptr, y.data())),
                    Contains("waits at a named barrier"));
  CHECK_THROWS_WITH(
      (launch<named_kernel<32, false>>(three, nullptr, y.data())),
      Contains("not of so many threads") || Contains("wrote since") || Contains("never written"));
}

TEST_CASE("simt.machine: the warpgroup's product", "[simt]") {
  run_product<64, Product::kRight>();
  run_product<128, Product::kRight>();
  CHECK_THROWS_WITH((run_product<64, Product::kNoFence>()),
                    Contains("since the last warpgroup_fence"));
  CHECK_THROWS_WITH((run_product<64, Product::kNoFenceAfterLoad>()),
                    Contains("since the last warpgroup_fence"));
  CHECK_THROWS_WITH((run_product<64, Product::kNoWait>()),
                    Contains("reads registers that a product under way"));
  CHECK_THROWS_WITH((run_product<64, Product::kSumsChanged>()), Contains("changes registers"));
  CHECK_THROWS_WITH((run_product<64, Product::kColumnsOverwritten>()),
                    Contains("a product still reads"));
  CHECK_THROWS_WITH((run_product<64, Product::kRowsReloaded>()), Contains("changes registers"));
  CHECK_THROWS_WITH((run_product<64, Product::kRowsLeft>()), Contains("leaves registers"));
  CHECK_THROWS_WITH((run_product<64, Product::kNoProxyFence>()), Contains("without a proxy fence"));
  CHECK_THROWS_WITH((run_product<64, Product::kNotWritten>()), Contains("never written"));
  CHECK_THROWS_WITH((run_product<64, Product::kWarpMissing>()), Contains("not all its warps"));
  CHECK_THROWS_WITH((run_product<64, Product::kOtherColumns>()), Contains("of other operands"));
  CHECK_THROWS_WITH((run_product<128, Product::kNotAligned>()), Contains("not aligned"));
  CHECK_THROWS_WITH((run_product<64, Product::kLeftUnderWay>()),
                    Contains("leaves registers") || Contains("under way"));
}

TEST_CASE("simt.machine: registers pass between warpgroups", "[simt]") {
  const LaunchShape shape{.block = 256};
  CHECK_NOTHROW(launch<registers_kernel<40, 216, true>>(shape, nullptr));
  CHECK_THROWS_WITH((launch<registers_kernel<40, 216, false>>(shape, nullptr)),
                    Contains("not all its warps"));
  CHECK_THROWS_WITH((launch<registers_kernel<42, 216, true>>(shape, nullptr)),
                    Contains("that there is not"));
}
