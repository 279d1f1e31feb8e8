#include "kernels/cuda/cublaslt.h"

#include <utility>

#include "kernels/cuda/check.h"

namespace ddpm::cuda {
namespace {

constexpr size_t kMaxWorkspace = size_t{32} << 20;

cudaDataType_t type_of(DType t) { return t == DType::kBF16 ? CUDA_R_16BF : CUDA_R_32F; }

// A handle of the library with its destructor.
template <typename T, cublasStatus_t (*Destroy)(T)>
class Handle {
 public:
  Handle() = default;
  ~Handle() {
    if (value_ != nullptr) Destroy(value_);
  }
  Handle(const Handle&) = delete;
  Handle& operator=(const Handle&) = delete;
  // Empty, to be filled.
  T* address() {
    if (value_ != nullptr) Destroy(std::exchange(value_, nullptr));
    return &value_;
  }
  T get() const { return value_; }

 private:
  T value_ = nullptr;
};

using Layout = Handle<cublasLtMatrixLayout_t, cublasLtMatrixLayoutDestroy>;

// The library counts rows along columns: our row-major (rows, columns) is its (columns, rows).
void make_layout(Layout& layout, DType type, int rows, int columns, int batch) {
  check(cublasLtMatrixLayoutCreate(layout.address(), type_of(type), columns, rows, columns),
        "matrix layout");
  const int64_t stride = int64_t{rows} * columns;
  check(cublasLtMatrixLayoutSetAttribute(layout.get(), CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT, &batch,
                                         sizeof batch),
        "batch count");
  check(cublasLtMatrixLayoutSetAttribute(layout.get(), CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET,
                                         &stride, sizeof stride),
        "batch stride");
}

// c = op(a) op(b) row-major is c^T = op(b)^T op(a)^T in the library's order, so b comes first and
// the bias of a column of c is its bias of a row.
struct Product {
  Handle<cublasLtMatmulDesc_t, cublasLtMatmulDescDestroy> operation;
  Layout a, b, c;
  cublasLtMatmulAlgo_t algorithm{};
  size_t workspace = 0;

  template <typename T>
  void set(cublasLtMatmulDescAttributes_t attribute, const T& value) {
    check(cublasLtMatmulDescSetAttribute(operation.get(), attribute, &value, sizeof value),
          "matmul attribute");
  }
};

// c = a b, of `rows` rows.
void make_layouts(Product& p, const GemmDesc& g, int rows) {
  make_layout(p.a, g.in, g.transpose_a ? g.k : rows, g.transpose_a ? rows : g.k, g.batch);
  make_layout(p.b, g.in, g.transpose_b ? g.n : g.k, g.transpose_b ? g.k : g.n, g.batch);
  make_layout(p.c, g.out, rows, g.n, g.batch);
}

void choose_algorithm(cublasLtHandle_t library, const GemmDesc& g, bool in_order, Product& p) {
  Handle<cublasLtMatmulPreference_t, cublasLtMatmulPreferenceDestroy> preference;
  check(cublasLtMatmulPreferenceCreate(preference.address()), "preference");
  const auto set = [&](cublasLtMatmulPreferenceAttributes_t attribute, const auto& value) {
    check(cublasLtMatmulPreferenceSetAttribute(preference.get(), attribute, &value, sizeof value),
          "preference attribute");
  };
  set(CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, kMaxWorkspace);
  // Partial sums are added in their order, in fp32, or there are none.
  set(CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK,
      in_order ? uint32_t{CUBLASLT_REDUCTION_SCHEME_NONE}
               : uint32_t{CUBLASLT_REDUCTION_SCHEME_NONE | CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE});
  // Tensors lie where the planner puts them; parameters are the least aligned.
  for (const auto attribute :
       {CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES,
        CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES})
    set(attribute, uint32_t{32});
  cublasLtMatmulHeuristicResult_t best{};
  int found = 0;
  const cublasStatus_t status =
      cublasLtMatmulAlgoGetHeuristic(library, p.operation.get(), p.b.get(), p.a.get(), p.c.get(),
                                     p.c.get(), preference.get(), 1, &best, &found);
  if (status != CUBLAS_STATUS_SUCCESS || found == 0)
    fail(Status::kDevice, "cuBLASLt has no product of %d x (%d,%d,%d), %s to %s", g.batch, g.m, g.n,
         g.k, name_of(g.in), name_of(g.out));
  p.algorithm = best.algo;
  p.workspace = best.workspaceSize;
}

// The algorithm for a fixed number of rows serves all, so that a row's bits depend on no other.
void choose_for_any_rows(cublasLtHandle_t library, const GemmDesc& g, Product& p) {
  constexpr int kRows = 256;
  make_layouts(p, g, kRows);
  choose_algorithm(library, g, true, p);
  make_layouts(p, g, g.m);
  cublasLtMatmulHeuristicResult_t result{};
  check(cublasLtMatmulAlgoCheck(library, p.operation.get(), p.b.get(), p.a.get(), p.c.get(),
                                p.c.get(), &p.algorithm, &result),
        "one algorithm for any number of rows");
  p.workspace = result.workspaceSize;
}

}  // namespace

struct CublasLt::Impl {
  Handle<cublasLtHandle_t, cublasLtDestroy> library;
  CublasLtOptions options;
};

CublasLt::CublasLt(const CublasLtOptions& options) : impl_(std::make_shared<Impl>()) {
  impl_->options = options;
  check(cublasLtCreate(impl_->library.address()), "start");
}

CublasLt::~CublasLt() = default;

Call CublasLt::gemm(const GemmDesc& g, In a, In b, In bias, In residual, Out c, Write write) {
  DDPM_CHECK(g.m > 0 && g.n > 0 && g.k > 0 && g.batch > 0, "gemm: batch %d of (%d,%d,%d)", g.batch,
             g.m, g.n, g.k);
  DDPM_CHECK(static_cast<bool>(bias) == g.bias && static_cast<bool>(residual) == g.residual,
             "gemm: bias or residual on one side only");
  DDPM_CHECK(!g.residual || write == Write::kOverwrite, "gemm: a residual that is accumulated");
  auto p = std::make_shared<Product>();
  const cublasComputeType_t compute = g.in == DType::kF32 && impl_->options.tf32
                                          ? CUBLAS_COMPUTE_32F_FAST_TF32
                                          : CUBLAS_COMPUTE_32F;
  check(cublasLtMatmulDescCreate(p->operation.address(), compute, CUDA_R_32F), "matmul");
  p->set(CUBLASLT_MATMUL_DESC_TRANSA, g.transpose_b ? CUBLAS_OP_T : CUBLAS_OP_N);
  p->set(CUBLASLT_MATMUL_DESC_TRANSB, g.transpose_a ? CUBLAS_OP_T : CUBLAS_OP_N);
  if (g.bias) {
    p->set(CUBLASLT_MATMUL_DESC_EPILOGUE, CUBLASLT_EPILOGUE_BIAS);
    p->set(CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE, type_of(g.out));
  }
  if (impl_->options.batch_invariant && !g.transpose_a) {
    choose_for_any_rows(impl_->library.get(), g, *p);
  } else {
    make_layouts(*p, g, g.m);
    choose_algorithm(impl_->library.get(), g, false, *p);
  }

  Call call{"gemm", {a, b}, {c}, p->workspace, {}};
  if (bias) call.reads.push_back(bias);
  if (residual) call.reads.push_back(residual);
  call.run = [=, impl = impl_](const Run& r) {
    if (bias) p->set(CUBLASLT_MATMUL_DESC_BIAS_POINTER, r.in<void>(bias));
    const float one = 1, beta = residual || write == Write::kAccumulate ? 1 : 0;
    void* out = r.out<void>(c);
    const void* added = residual ? r.in<void>(residual) : out;
    check(cublasLtMatmul(impl->library.get(), p->operation.get(), &one, r.in<void>(b), p->b.get(),
                         r.in<void>(a), p->a.get(), &beta, added, p->c.get(), out, p->c.get(),
                         &p->algorithm, r.workspace, p->workspace,
                         static_cast<cudaStream_t>(r.stream)),
          "product");
  };
  return call;
}

}  // namespace ddpm::cuda
