// Matrix products by cuBLASLt, in one file. Algorithms are chosen when a call is prepared, among
// those that sum in a fixed order.
#pragma once

#include <memory>

#include "kernels/backend.h"

namespace ddpm::cuda {

struct CublasLtOptions {
  bool tf32 = false;             // fp32 products may round their inputs to 10 bits of mantissa
  bool batch_invariant = false;  // one algorithm per matrix b, whatever the rows of a
};

class CublasLt {
 public:
  explicit CublasLt(const CublasLtOptions&);
  ~CublasLt();

  Call gemm(const GemmDesc&, In a, In b, In bias, In residual, Out c, Write);

 private:
  struct Impl;
  std::shared_ptr<Impl> impl_;
};

}  // namespace ddpm::cuda
