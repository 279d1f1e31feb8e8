// Matrix products by oneDNN. Its kernels sum over k in one order whatever m is, so a row's bits do
// not depend on the number of rows (tested).
#include <memory>

#include "kernels/cpu/cpu_backend.h"
#include "kernels/cpu/onednn.h"

namespace ddpm::cpu {

Call CpuBackend::gemm(const GemmDesc& g, In a, In b, In bias, In residual, Out c, Write write) {
  DDPM_CHECK(g.in == DType::kF32 && g.out == DType::kF32, "gemm: %s to %s", name_of(g.in),
             name_of(g.out));
  DDPM_CHECK(g.m > 0 && g.n > 0 && g.k > 0 && g.batch > 0, "gemm: batch %d of (%d,%d,%d)", g.batch,
             g.m, g.n, g.k);
  DDPM_CHECK(a && b && c, "gemm: a, b and c must be present");
  DDPM_CHECK(g.bias == static_cast<bool>(bias) && g.residual == static_cast<bool>(residual),
             "gemm: bias and residual must be present as the desc says");
  Call call{"gemm", {a, b}, {c}, 0, nullptr};
  if (bias) call.reads.push_back(bias);
  if (residual) call.reads.push_back(residual);
  const DnnPrimitivePtr product = dnn_->matmul(g, write == Write::kAccumulate);
  call.workspace = product->scratchpad_bytes();
  call.run = [=](const Run& r) {
    product->run({.src = r.in<float>(a),
                  .weights = r.in<float>(b),
                  .bias = r.in<float>(bias),
                  .addend = r.in<float>(residual),
                  .dst = r.out<float>(c),
                  .scratchpad = r.workspace});
  };
  return call;
}

}  // namespace ddpm::cpu
