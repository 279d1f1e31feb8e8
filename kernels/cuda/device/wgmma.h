// The warpgroup's matrix product of sm_90a: asynchronous, sums and left operand in registers, right
// operand in shared memory. All threads of the warpgroup take part in each operation.
#pragma once

#include <device/mma.h>

#include <cstdint>

#include "kernels/bf16.h"

namespace ddpm::cuda {

// Whether the kernel is compiled for a chip that has it; elsewhere it must not be started.
#if defined(__CUDA_ARCH_FEAT_SM90_ALL) || !defined(__CUDA_ARCH__)
inline constexpr bool kHasWgmma = true;
#else
inline constexpr bool kHasWgmma = false;
#endif
__device__ __forceinline__ void refuse_to_run() { __trap(); }

inline constexpr int kWgmmaRows = 64, kWgmmaColumns = 128, kWgmmaDepth = 16;

// (64,128) in fp32. With row = 16 warp + lane / 4 and column = 8 j + 2 (lane % 4), a lane holds
//   v[4 j ..] = D[row, column], D[row, column + 1], D[row + 8, column], D[row + 8, column + 1]
struct WgmmaSums {
  float v[kWgmmaColumns / 2];

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (float& x : v) x = 0;
  }
  __device__ __forceinline__ float operator[](int i) const { return v[i]; }
  // After wgmma_wait, before they are read: keeps the compiler from reading them earlier.
  __device__ __forceinline__ void settle() {
    asm volatile(""
                 : "+f"(v[0]), "+f"(v[1]), "+f"(v[2]), "+f"(v[3]), "+f"(v[4]), "+f"(v[5]),
                   "+f"(v[6]), "+f"(v[7]), "+f"(v[8]), "+f"(v[9]), "+f"(v[10]), "+f"(v[11]),
                   "+f"(v[12]), "+f"(v[13]), "+f"(v[14]), "+f"(v[15]), "+f"(v[16]), "+f"(v[17]),
                   "+f"(v[18]), "+f"(v[19]), "+f"(v[20]), "+f"(v[21]), "+f"(v[22]), "+f"(v[23]),
                   "+f"(v[24]), "+f"(v[25]), "+f"(v[26]), "+f"(v[27]), "+f"(v[28]), "+f"(v[29]),
                   "+f"(v[30]), "+f"(v[31]), "+f"(v[32]), "+f"(v[33]), "+f"(v[34]), "+f"(v[35]),
                   "+f"(v[36]), "+f"(v[37]), "+f"(v[38]), "+f"(v[39]), "+f"(v[40]), "+f"(v[41]),
                   "+f"(v[42]), "+f"(v[43]), "+f"(v[44]), "+f"(v[45]), "+f"(v[46]), "+f"(v[47]),
                   "+f"(v[48]), "+f"(v[49]), "+f"(v[50]), "+f"(v[51]), "+f"(v[52]), "+f"(v[53]),
                   "+f"(v[54]), "+f"(v[55]), "+f"(v[56]), "+f"(v[57]), "+f"(v[58]), "+f"(v[59]),
                   "+f"(v[60]), "+f"(v[61]), "+f"(v[62]), "+f"(v[63])::"memory");
  }
};

// (64,16) in bf16: lane l of a warp gives the address of 16 bytes of the warp's 16 rows, as for
// ldmatrix_x4: row l % 16, elements 8 (l / 16) on.
struct WgmmaRows {
  uint32_t r[4];

  __device__ __forceinline__ void load(const bf16* row) { ldmatrix_x4(r, row); }
};

// Columns (128, RowBytes / 2) of the right operand in shared memory. Each is a row of RowBytes, 64
// or 128, of consecutive elements; its 16-byte pieces are swizzled: piece p of row i lies where
// piece p ^ (i % 8) would, for 64 bytes p ^ (i / 2 % 4). Aligned to eight rows. The first product
// reads elements 0 to 15.
struct WgmmaOperand {
  uint64_t bits;

  // From elements `depth` on, a multiple of 16.
  __device__ __forceinline__ WgmmaOperand at(int depth) const {
    return {bits + static_cast<uint64_t>(depth * 2 >> 4)};
  }
};
template <int RowBytes>
__device__ __forceinline__ WgmmaOperand wgmma_operand(const bf16* columns) {
  static_assert(RowBytes == 64 || RowBytes == 128);
  constexpr uint64_t kSwizzle = RowBytes == 128 ? 1 : 2, kEightRows = 8 * RowBytes >> 4;
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(columns));
  return {kSwizzle << 62 | kEightRows << 32 | uint64_t{1} << 16 | (address & 0x3FFFF) >> 4};
}

// Before the first product, and after registers that one reads or adds to were changed otherwise.
__device__ __forceinline__ void wgmma_fence() {
  asm volatile("wgmma.fence.sync.aligned;\n" ::: "memory");
}
// d += a b. Until it is waited for, d may not be touched, a and what b names may not be changed.
__device__ __forceinline__ void wgmma(WgmmaSums& d, const WgmmaRows& a, const WgmmaOperand& b) {
  asm volatile(
      "{\n"
      ".reg .pred add;\n"
      "setp.eq.u32 add, 0, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 "
      "{%0, %1, %2, %3, %4, %5, %6, %7, "
      " %8, %9, %10, %11, %12, %13, %14, %15, "
      " %16, %17, %18, %19, %20, %21, %22, %23, "
      " %24, %25, %26, %27, %28, %29, %30, %31, "
      " %32, %33, %34, %35, %36, %37, %38, %39, "
      " %40, %41, %42, %43, %44, %45, %46, %47, "
      " %48, %49, %50, %51, %52, %53, %54, %55, "
      " %56, %57, %58, %59, %60, %61, %62, %63}, "
      "{%64, %65, %66, %67}, %68, add, 1, 1, 0;\n"
      "}\n"
      : "+f"(d.v[0]), "+f"(d.v[1]), "+f"(d.v[2]), "+f"(d.v[3]), "+f"(d.v[4]), "+f"(d.v[5]),
        "+f"(d.v[6]), "+f"(d.v[7]), "+f"(d.v[8]), "+f"(d.v[9]), "+f"(d.v[10]), "+f"(d.v[11]),
        "+f"(d.v[12]), "+f"(d.v[13]), "+f"(d.v[14]), "+f"(d.v[15]), "+f"(d.v[16]), "+f"(d.v[17]),
        "+f"(d.v[18]), "+f"(d.v[19]), "+f"(d.v[20]), "+f"(d.v[21]), "+f"(d.v[22]), "+f"(d.v[23]),
        "+f"(d.v[24]), "+f"(d.v[25]), "+f"(d.v[26]), "+f"(d.v[27]), "+f"(d.v[28]), "+f"(d.v[29]),
        "+f"(d.v[30]), "+f"(d.v[31]), "+f"(d.v[32]), "+f"(d.v[33]), "+f"(d.v[34]), "+f"(d.v[35]),
        "+f"(d.v[36]), "+f"(d.v[37]), "+f"(d.v[38]), "+f"(d.v[39]), "+f"(d.v[40]), "+f"(d.v[41]),
        "+f"(d.v[42]), "+f"(d.v[43]), "+f"(d.v[44]), "+f"(d.v[45]), "+f"(d.v[46]), "+f"(d.v[47]),
        "+f"(d.v[48]), "+f"(d.v[49]), "+f"(d.v[50]), "+f"(d.v[51]), "+f"(d.v[52]), "+f"(d.v[53]),
        "+f"(d.v[54]), "+f"(d.v[55]), "+f"(d.v[56]), "+f"(d.v[57]), "+f"(d.v[58]), "+f"(d.v[59]),
        "+f"(d.v[60]), "+f"(d.v[61]), "+f"(d.v[62]), "+f"(d.v[63])
      : "r"(a.r[0]), "r"(a.r[1]), "r"(a.r[2]), "r"(a.r[3]), "l"(b.bits));
}
// Closes a group of products.
__device__ __forceinline__ void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;\n" ::: "memory");
}
// Waits until at most `Newest` groups are under way.
template <int Newest>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;\n" ::"n"(Newest) : "memory");
}

}  // namespace ddpm::cuda
