// Proof that the proof works: kernels with planted errors, each found by the host's execution.
#include <device/async.h>
#include <device/launch.h>
#include <device/memory.h>
#include <device/mma.h>
#include <device/warp.h>
#include <catch2/catch.hpp>

#include "kernels/cuda/block.h"
#include "kernels/cuda/vec.h"
#include "tests/reference/gemm.h"
#include "tests/simt/simt_backend.h"
#include "tests/support.h"

using namespace ddpm;
using namespace ddpm::cuda;
using Catch::Contains;

namespace {

// A device tensor of floats.
struct Floats {
  std::unique_ptr<Backend> backend = test::make_simt_backend(DType::kF32);
  std::unique_ptr<Memory> memory;
  explicit Floats(int count) : memory(backend->allocate(static_cast<size_t>(count) * 4)) {}
  float* data() { return static_cast<float*>(memory->data()); }
};

// y = x reversed within a block, through shared memory.
template <bool Barrier>
__global__ void reverse_kernel(Global<const float> x, Global<float> y) {
  SharedMemory shared;
  const Smem<float> part = shared.take<float>(static_cast<int>(blockDim.x));
  const int64_t first = int64_t{blockIdx.x} * blockDim.x;
  part[threadIdx.x] = x[first + threadIdx.x];
  if constexpr (Barrier) block_sync();
  y[first + threadIdx.x] = part[blockDim.x - 1 - threadIdx.x];
}

__global__ void unwritten_kernel(Global<float> y) {
  SharedMemory shared;
  const Smem<float> part = shared.take<float>(64);
  if (threadIdx.x < 63) part[threadIdx.x] = 1;
  block_sync();
  y[threadIdx.x] = part[threadIdx.x];
}

// The second write comes while other threads may still read.
template <bool Barrier>
__global__ void reuse_kernel(Global<float> y) {
  SharedMemory shared;
  const Smem<float> part = shared.take<float>(64);
  for (int i = 0; i < 2; ++i) {
    part[threadIdx.x] = static_cast<float>(i);
    block_sync();
    y[threadIdx.x] = part[63 - threadIdx.x];
    if constexpr (Barrier) block_sync();
  }
}

template <bool Sync>
__global__ void warp_exchange_kernel(Global<float> y) {
  SharedMemory shared;
  const Smem<float> part = shared.take<float>(32);
  part[threadIdx.x] = static_cast<float>(threadIdx.x);
  if constexpr (Sync) warp_sync();
  y[threadIdx.x] = part[31 - threadIdx.x];
}

__global__ void missed_barrier_kernel() {
  if (threadIdx.x != 5) block_sync();
}
__global__ void missed_shuffle_kernel(Global<float> y) {
  if (threadIdx.x == 7) return;
  y[threadIdx.x] = shuffle_xor(1.0f, 1);
}
__global__ void offset_kernel(Global<float> y, int64_t offset) { y[offset + threadIdx.x] = 1; }
__global__ void read_offset_kernel(Global<const float> x, Global<float> y, int64_t offset) {
  y[threadIdx.x] = x[offset + threadIdx.x];
}
__global__ void shared_overflow_kernel() {
  SharedMemory shared;
  const Smem<float> first = shared.take<float>(32);
  shared.take<float>(32);
  first[threadIdx.x + 1] = 1;
}
// Every block writes element 0, or reads what block 0 writes.
__global__ void block_write_race_kernel(Global<float> y) {
  if (threadIdx.x == 0) y[0] = static_cast<float>(blockIdx.x);
}
__global__ void block_read_race_kernel(Global<float> y) {
  if (threadIdx.x != 0) return;
  if (blockIdx.x == 0)
    y[0] = 1;
  else
    y[blockIdx.x] = y[0];
}
__global__ void flag_kernel(Global<uint32_t> flags) { atomic_or(flags, 1u << (threadIdx.x % 32)); }
__global__ void misaligned_kernel(Global<const float> x, Global<float> y) {
  float v[4];
  load_floats<float>(x + 1, v);
  store_floats<float>(y, v);
}

template <bool Wait>
__global__ void async_kernel(Global<const float> x, Global<float> y) {
  SharedMemory shared;
  const Smem<float> part = shared.take<float>(256);
  copy_async(part + 4 * int64_t{threadIdx.x}, x + 4 * int64_t{threadIdx.x}, threadIdx.x < 60);
  copy_async_commit();
  if constexpr (Wait) copy_async_wait<0>();
  block_sync();
  for (int i = 0; i < 4; ++i) y[threadIdx.x + 64 * i] = part[threadIdx.x + 64 * i];
  if constexpr (!Wait) copy_async_wait<0>();
}

// c (16,8) = a (16,16) b (16,8), a and b row-major.
__global__ void product_kernel(Global<const bf16> a, Global<const bf16> b, Global<float> c) {
  SharedMemory shared;
  const Smem<bf16> as = shared.take<bf16>(256), bs = shared.take<bf16>(256);
  for (int i = lane_id(); i < 256; i += 32) as[i] = a[i];
  for (int i = lane_id(); i < 256; i += 32) bs[i] = i % 16 < 8 ? b[i / 16 * 8 + i % 16] : bf16{0};
  block_sync();
  const int row = lane_id() % 8 + lane_id() / 8 % 2 * 8, column = lane_id() / 16 * 8;
  uint32_t af[4], bf[4];
  ldmatrix_x4(af, as + row * 16 + column);
  ldmatrix_x4_transposed(bf, bs + row * 16 + column);
  float d[4] = {};
  mma_16816(d, af, {bf[0], bf[1]});
  const int r = lane_id() / 4, k = lane_id() % 4 * 2;
  c[r * 8 + k] = d[0];
  c[r * 8 + k + 1] = d[1];
  c[(r + 8) * 8 + k] = d[2];
  c[(r + 8) * 8 + k + 1] = d[3];
}

__global__ void sum_kernel(Global<const float> x, Global<float> y) {
  SharedMemory shared;
  const float sum = block_sum(static_cast<float>(x[threadIdx.x]), shared.take<float>(8));
  y[threadIdx.x] = sum;
}

constexpr LaunchShape kOneWarp{.block = 32, .shared = 4096};
constexpr LaunchShape kTwoWarps{.block = 64, .shared = 4096};

}  // namespace

TEST_CASE("simt.machine: a missing barrier is a race", "[simt]") {
  Floats x(128), y(128);
  for (int i = 0; i < 128; ++i) x.data()[i] = static_cast<float>(i);
  const LaunchShape shape{.grid_x = 2, .block = 64, .shared = 256};
  CHECK_THROWS_WITH(launch<reverse_kernel<false>>(shape, nullptr, x.data(), y.data()),
                    Contains("reverse_kernel<false> block (") && Contains("thread") &&
                        Contains("shared memory that"));
  launch<reverse_kernel<true>>(shape, nullptr, x.data(), y.data());
  for (int i = 0; i < 128; ++i) REQUIRE(y.data()[i] == i / 64 * 64 + 63 - i % 64);
  CHECK_THROWS_WITH(launch<reuse_kernel<false>>(kTwoWarps, nullptr, y.data()),
                    Contains("another thread read since the last barrier") ||
                        Contains("another thread wrote since the last barrier"));
  CHECK_NOTHROW(launch<reuse_kernel<true>>(kTwoWarps, nullptr, y.data()));
}

TEST_CASE("simt.machine: lanes of a warp need warp_sync", "[simt]") {
  Floats y(32);
  CHECK_THROWS_WITH(launch<warp_exchange_kernel<false>>(kOneWarp, nullptr, y.data()),
                    Contains("shared memory that"));
  launch<warp_exchange_kernel<true>>(kOneWarp, nullptr, y.data());
  for (int i = 0; i < 32; ++i) REQUIRE(y.data()[i] == 31 - i);
}

TEST_CASE("simt.machine: shared memory that nobody wrote", "[simt]") {
  Floats y(64);
  CHECK_THROWS_WITH(launch<unwritten_kernel>(kTwoWarps, nullptr, y.data()),
                    Contains("thread 63") && Contains("never written"));
}

TEST_CASE("simt.machine: a barrier or a warp operation that a thread misses", "[simt]") {
  Floats y(64);
  CHECK_THROWS_WITH(launch<missed_barrier_kernel>(kTwoWarps, nullptr),
                    Contains("missed_barrier_kernel block (0,0,0)") &&
                        Contains("waits at a barrier") && Contains("thread 5 has left"));
  CHECK_THROWS_WITH(launch<missed_shuffle_kernel>(kTwoWarps, nullptr, y.data()),
                    Contains("waits for its warp in shuffle_xor") && Contains("thread 7 has left"));
}

TEST_CASE("simt.machine: accesses outside a tensor or a part of shared memory", "[simt]") {
  Floats x(64), y(64);
  CHECK_THROWS_WITH(launch<offset_kernel>(kTwoWarps, nullptr, y.data(), 1),
                    Contains("thread 63: writes outside a tensor of 256 bytes, at byte 256"));
  CHECK_THROWS_WITH(launch<offset_kernel>(kTwoWarps, nullptr, y.data(), -1),
                    Contains("at byte -4"));
  CHECK_THROWS_WITH(launch<read_offset_kernel>(kTwoWarps, nullptr, x.data(), y.data(), 2),
                    Contains("thread 62: reads outside"));
  CHECK_THROWS_WITH(launch<offset_kernel>(kTwoWarps, nullptr, nullptr, 0), Contains("null"));
  CHECK_THROWS_WITH(launch<shared_overflow_kernel>(kOneWarp, nullptr),
                    Contains("thread 31: is outside a part of 128 bytes"));
  const LaunchShape little{.block = 32, .shared = 128};
  CHECK_THROWS_WITH(launch<shared_overflow_kernel>(little, nullptr),
                    Contains("of which the launch gives 128"));
  CHECK_THROWS_WITH(launch<misaligned_kernel>(kOneWarp, nullptr, x.data(), y.data()),
                    Contains("not aligned"));
}

TEST_CASE("simt.machine: races between blocks", "[simt]") {
  Floats y(64);
  const LaunchShape four{.grid_x = 4, .block = 32};
  CHECK_THROWS_WITH(launch<block_write_race_kernel>(four, nullptr, y.data()),
                    Contains("another block wrote"));
  for (uint64_t seed = 0; seed < 4; ++seed) {  // in whatever order the blocks come
    simt::options().seed = seed;
    CHECK_THROWS_WITH(launch<block_read_race_kernel>(four, nullptr, y.data()),
                      Contains("another block"));
  }
  simt::options().seed = 0;
  auto flags = y.backend->allocate(4);
  CHECK_NOTHROW(launch<flag_kernel>(four, nullptr, static_cast<uint32_t*>(flags->data())));
  CHECK(*static_cast<uint32_t*>(flags->data()) == 0xFFFFFFFFu);
}

TEST_CASE("simt.machine: asynchronous copies are late", "[simt]") {
  Floats x(256), y(256);
  for (int i = 0; i < 256; ++i) x.data()[i] = static_cast<float>(i);
  CHECK_THROWS_WITH(launch<async_kernel<false>>(kTwoWarps, nullptr, x.data(), y.data()),
                    Contains("asynchronous copy has not finished"));
  launch<async_kernel<true>>(kTwoWarps, nullptr, x.data(), y.data());
  for (int i = 0; i < 256; ++i) REQUIRE(y.data()[i] == (i < 240 ? i : 0));
}

TEST_CASE("simt.machine: the matrix product and its loads", "[simt]") {
  const auto backend = test::make_simt_backend(DType::kBF16);
  const auto a = test::rounded(*backend, test::random_values(256, 1));
  const auto b = test::rounded(*backend, test::random_values(128, 2));
  test::Bench bench(*backend);
  const In as = bench.activation(a), bs = bench.activation(b);
  const Out c = bench.out(128);
  bench.run({"product", {as, bs}, {c}, 0, [=](const Run& r) {
               launch<product_kernel>({.block = 32, .shared = 1024}, nullptr, r.in<bf16>(as),
                                      r.in<bf16>(bs), r.out<float>(c));
             }});
  const auto expected =
      ref::gemm({.m = 16, .n = 8, .k = 16}, test::to_double(a), test::to_double(b), {}, {});
  CHECK(test::relative_error(bench.get(c), expected) <= 1e-6);
}

TEST_CASE("simt.machine: sums over a block", "[simt]") {
  Floats x(256), y(256);
  for (int i = 0; i < 256; ++i) x.data()[i] = static_cast<float>(i);
  launch<sum_kernel>({.block = 256, .shared = 128}, nullptr, x.data(), y.data());
  for (int i = 0; i < 256; ++i) REQUIRE(y.data()[i] == 255 * 128);
}

TEST_CASE("simt.machine: chosen blocks of a large grid", "[simt]") {
  Floats x(64 * 100), y(64 * 100);
  for (int i = 0; i < 6400; ++i) x.data()[i] = 1;
  simt::options().max_blocks = 5;
  launch<reverse_kernel<true>>({.grid_x = 100, .block = 64, .shared = 256}, nullptr, x.data(),
                               y.data());
  simt::options().max_blocks = 0;
  CHECK(std::count(y.data(), y.data() + 6400, 1.0f) == 5 * 64);
  CHECK(y.data()[0] == 1);
  CHECK(y.data()[6399] == 1);
}
