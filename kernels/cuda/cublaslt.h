// Matrix products by cuBLASLt, in one file. Algorithms are chosen when a call is prepared, among
// those that sum in a fixed order.
#pragma once

#include <memory>

#include "kernels/backend.h"

namespace ddpm::cuda {

class CublasLt {
 public:
  // tf32: fp32 products may round their inputs to 10 bits of mantissa.
  explicit CublasLt(bool tf32);
  ~CublasLt();

  Call gemm(const GemmDesc&, In a, In b, In bias, In residual, Out c, Write);

 private:
  struct Impl;
  std::shared_ptr<Impl> impl_;
};

}  // namespace ddpm::cuda
