// Attention's calls. The kernels are in attention_forward.cu and attention_backward.cu (tensor
// cores) and attention_plain.cu (fp32, and heads that those cannot take); here is the
// backward pass's first step, delta = do . o of every query, which reads do and o once and is
// limited by memory.
#include "kernels/cuda/attention.h"
#include "kernels/cuda/block.h"
#include "kernels/cuda/cuda_backend.h"
#include "kernels/cuda/vec.h"

namespace ddpm::cuda {
namespace {

// A warp per row of stats; N elements a lane and step. The scale of lse is the reader's.
template <typename T, int N>
__global__ void attention_stats_kernel(Global<const T> o, Global<const T> d_o,
                                       Global<const float> lse, Global<float> stats,
                                       float lse_scale, AttentionProblem p) {
  const int64_t row = int64_t{blockIdx.x} * (blockDim.x / 32) + warp_id();
  if (row >= int64_t{p.units} * p.padded()) return;
  const int unit = static_cast<int>(row / p.padded());
  const int token = static_cast<int>(row % p.padded());
  float pair[2] = {INFINITY, 0};
  if (token < p.tokens) {
    const int64_t at = p.at(unit, p.width()) + int64_t{token} * p.width();
    float dot = 0;
    for (int i = lane_id() * N; i < p.head_dim; i += 32 * N) {
      float a[N], b[N];
      load_floats<T>(o + (at + i), a);
      load_floats<T>(d_o + (at + i), b);
#pragma unroll
      for (int j = 0; j < N; ++j) dot = fmaf(a[j], b[j], dot);
    }
    pair[0] = lse[int64_t{unit} * p.tokens + token] * lse_scale;
    pair[1] = warp_sum(dot);
  }
  if (lane_id() == 0) store_floats<float>(stats + 2 * row, pair);
}

template <typename T>
void compute_stats(const AttentionProblem& p, const T* o, const T* d_o, const float* lse,
                   float* stats, float lse_scale, void* stream) {
  const LaunchShape shape{.grid_x = blocks_for(p.stats_count() / 2, 1, 8)};  // 8 warps
  if (p.head_dim % 8 == 0)
    launch<attention_stats_kernel<T, 8>>(shape, stream, o, d_o, lse, stats, lse_scale, p);
  else
    launch<attention_stats_kernel<T, 1>>(shape, stream, o, d_o, lse, stats, lse_scale, p);
}

bool on_tensor_cores(DType type, const AttentionDesc& d) {
  return type == DType::kBF16 && d.head_dim % 8 == 0 && d.head_dim <= kMaxTensorHead;
}

AttentionProblem problem(const char* op, const AttentionDesc& d) {
  const bool positive = d.n > 0 && d.tokens > 0 && d.heads > 0 && d.head_dim > 0;
  constexpr int64_t kMost = 1 << 30;  // blocks and elements of a row are counted in 32 bits
  DDPM_CHECK(positive && d.tokens < 1 << 24 && int64_t{d.heads} * d.head_dim < 1 << 24 &&
                 int64_t{d.n} * d.heads * ((d.tokens + 31) / 32) < kMost,
             "%s: %d images of %d tokens, %d heads of %d", op, d.n, d.tokens, d.heads, d.head_dim);
  return {d.n * d.heads, d.tokens, d.heads, d.head_dim, d.scale()};
}

template <typename T>
Call backward_call(const AttentionProblem& p, AttentionBackward<T> tensor, In qkv, In o, In lse,
                   In d_o, Out dqkv) {
  const AttentionBackward<T> backward = tensor != nullptr ? tensor : plain_attention_backward<T>;
  return {"attention_backward",
          {qkv, o, lse, d_o},
          {dqkv},
          static_cast<size_t>(p.stats_count()) * sizeof(float),
          [=](const Run& r) {
            const auto stats = static_cast<float*>(r.workspace);
            compute_stats(p, r.in<T>(o), r.in<T>(d_o), r.in<float>(lse), stats,
                          tensor != nullptr ? kLog2E : 1.0f, r.stream);
            backward(p, r.in<T>(qkv), r.in<T>(d_o), stats, r.out<T>(dqkv), r.stream);
          }};
}

}  // namespace

Call CudaBackend::attention_forward(const AttentionDesc& d, In qkv, Out o, Out lse) {
  const AttentionProblem p = problem("attention_forward", d);
  DDPM_CHECK(qkv && o, "attention_forward: %d tokens, %d heads of %d: a tensor is missing",
             d.tokens, d.heads, d.head_dim);
  std::vector<Out> writes{o};
  if (lse) writes.push_back(lse);
  return dispatch(type_, [&]<typename T>(T) -> Call {
    AttentionForward<T> forward = nullptr;
    if constexpr (sizeof(T) == sizeof(bf16))
      if (on_tensor_cores(type_, d)) forward = tensor_attention_forward(p.head_dim, shared_bytes_);
    if (forward == nullptr) forward = plain_attention_forward<T>;
    return {"attention_forward", {qkv}, writes, 0, [=](const Run& r) {
              forward(p, r.in<T>(qkv), r.out<T>(o), r.out<float>(lse), r.stream);
            }};
  });
}

Call CudaBackend::attention_backward(const AttentionDesc& d, In qkv, In o, In lse, In d_o,
                                     Out dqkv) {
  const AttentionProblem p = problem("attention_backward", d);
  DDPM_CHECK(qkv && o && lse && d_o && dqkv,
             "attention_backward: %d tokens, %d heads of %d: a tensor is missing", d.tokens,
             d.heads, d.head_dim);
  return dispatch(type_, [&]<typename T>(T) {
    AttentionBackward<T> tensor = nullptr;
    if constexpr (sizeof(T) == sizeof(bf16))
      if (on_tensor_cores(type_, d)) tensor = tensor_attention_backward(p.head_dim, shared_bytes_);
    return backward_call<T>(p, tensor, qkv, o, lse, d_o, dqkv);
  });
}

}  // namespace ddpm::cuda
