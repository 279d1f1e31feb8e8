// The warp's matrix product of sm_80, and the loads that fill its fragments.
#pragma once

#include <cstdint>

#include "kernels/bf16.h"

namespace ddpm::cuda {

// d (16,8) += a (16,16) b (16,8), bf16 with fp32 accumulation. With row = lane / 4 and
// pair = 2 (lane % 4), a lane holds
//   a[0..3] = A[row, pair..], A[row+8, pair..], A[row, pair+8..], A[row+8, pair+8..]
//   b[0..1] = B[pair.., row], B[pair+8.., row]
//   d[0..3] = D[row, pair], D[row, pair+1], D[row+8, pair], D[row+8, pair+1]
__device__ __forceinline__ void mma_16816(float (&d)[4], const uint32_t (&a)[4],
                                          const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};\n"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// Four 8x8 matrices of bf16: lane l names the 16-byte row l % 8 of matrix l / 8. Register i then
// holds elements (lane / 4, 2 (lane % 4) ..) of matrix i; transposed, (2 (lane % 4) .., lane / 4).
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&r)[4], const bf16* row) {
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];\n"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}
__device__ __forceinline__ void ldmatrix_x4_transposed(uint32_t (&r)[4], const bf16* row) {
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];\n"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}

}  // namespace ddpm::cuda
