// The convolutions' factories: checks, and the choice of a kernel. Also the sum of split weight
// gradients, which moves (splits + 1) x the filter in fp32 and is limited by memory (mostly L2).
#include "kernels/cuda/conv_plan.h"
#include "kernels/cuda/cuda_backend.h"

namespace ddpm::cuda {
namespace {

template <bool Accumulate>
__global__ void filter_sum_kernel(Global<const float> partial, Global<float> dfilter, int64_t count,
                                  int splits) {
  const auto sum = [&]<int N>(int64_t i) {
    float v[N], more[N];
    load_floats<float>(partial + i, v);
    for (int split = 1; split < splits; ++split) {
      load_floats<float>(partial + (split * count + i), more);
#pragma unroll
      for (int j = 0; j < N; ++j) v[j] += more[j];
    }
    if constexpr (Accumulate) {
      load_floats<float>(dfilter + i, more);
#pragma unroll
      for (int j = 0; j < N; ++j) v[j] += more[j];
    }
    store_floats<float>(dfilter + i, v);
  };
  if (count % 4 == 0) {
    for_run<4>(count, sum);
  } else {  // rows of the partial sums are not aligned
    const int64_t first = (int64_t{blockIdx.x} * blockDim.x + threadIdx.x) * 4;
    for (int64_t i = first; i < count && i < first + 4; ++i) sum.template operator()<1>(i);
  }
}

Call finish(Call call, ConvPlan plan) {
  call.workspace = plan.workspace;
  call.run = std::move(plan.run);
  return call;
}

// Reads its input as it is: what is left of the desc is taps and what is added behind them.
bool reads_plainly(ConvDesc d) {
  d.statistics = false;
  d.shortcut_c = 0;
  return d.basic();
}

Call dgrad(DType type, const ConvChip& chip, const ConvDesc& d, const ConvSlots& s, In dy,
           const GradientSlots& to, Call call) {
  ConvPlan plan;
  if (type == DType::kBF16) plan = hopper_dgrad(chip, d, s, dy, to);
  if (!plan.run && type == DType::kBF16) plan = tensor_dgrad(chip.shared_bytes, d, s, dy, to);
  if (!plan.run) plan = direct_dgrad(type, d, s, dy, to);
  return finish(std::move(call), std::move(plan));
}

Call wgrad_call(const char* op, const ConvDesc& d, const ConvSlots& s, In dy, Out dfilter) {
  check_conv(d, op);
  check_input(d, s, op);
  DDPM_CHECK(dy && dfilter, "%s: dy and dfilter must be present", op);
  Call call{op, {}, {dfilter}, 0, nullptr};
  add_input_reads(d, s, call);
  call.reads.push_back(dy);
  return call;
}

}  // namespace

void launch_filter_sum(void* stream, const float* partial, float* dfilter, int64_t count,
                       int splits, Write write) {
  const LaunchShape shape{.grid_x = blocks_for(count, 4)};
  if (write == Write::kAccumulate)
    launch<filter_sum_kernel<true>>(shape, stream, partial, dfilter, count, splits);
  else
    launch<filter_sum_kernel<false>>(shape, stream, partial, dfilter, count, splits);
}

std::optional<Call> conv_forward(DType type, const ConvChip& chip, const ConvDesc& d,
                                 const ConvSlots& s, Out y, Out statistics, bool batch_invariant) {
  const char* op = "conv_forward";
  check_conv(d, op);
  if (d.e4m3) return std::nullopt;
  check_input(d, s, op);
  DDPM_CHECK(s.filter && y && d.statistics == static_cast<bool>(statistics),
             "%s: filter, y and statistics must be present as the desc says", op);
  DDPM_CHECK(d.bias == static_cast<bool>(s.bias) && d.residual == static_cast<bool>(s.residual) &&
                 (d.sample_bias_stride > 0) == static_cast<bool>(s.sample_bias),
             "%s: biases and residual must be present as the desc says", op);
  DDPM_CHECK((d.shortcut_c > 0) == static_cast<bool>(s.shortcut) &&
                 (d.shortcut_c2 > 0) == static_cast<bool>(s.shortcut2) &&
                 (d.shortcut_c > 0) == static_cast<bool>(s.shortcut_filter),
             "%s: shortcut and its filter must be present as the desc says", op);
  Call call{op, {}, {y}, 0, nullptr};
  add_input_reads(d, s, call);
  for (const In in : {s.filter, s.bias, s.sample_bias, s.residual, s.shortcut, s.shortcut2,
                      s.shortcut_filter, s.shortcut_bias})
    if (in) call.reads.push_back(in);
  if (d.statistics) call.writes.push_back(statistics);
  ConvPlan plan;
  if (type == DType::kBF16) plan = hopper_forward(chip, d, s, y, statistics);
  if (!plan.run && type == DType::kBF16)
    plan = tensor_forward(chip.shared_bytes, d, s, y, statistics, batch_invariant);
  if (!plan.run) plan = direct_forward(type, d, s, y, statistics);
  return finish(std::move(call), std::move(plan));
}

std::optional<Call> conv_dgrad(DType type, const ConvChip& chip, const ConvDesc& d,
                               const ConvSlots& s, In dy, Out dx, Write write) {
  const char* op = "conv_dgrad";
  check_conv(d, op);
  if (!reads_plainly(d)) return std::nullopt;
  DDPM_CHECK(s.filter && dy && dx, "%s: filter, dy and dx must be present", op);
  return dgrad(type, chip, d, s, dy, {.dx = dx, .write = write},
               {op, {s.filter, dy}, {dx}, 0, nullptr});
}

std::optional<Call> conv_dgrad_norm(DType type, const ConvChip& chip, const ConvDesc& d,
                                    const ConvSlots& s, const GroupNormDesc& norm, In mean_rstd,
                                    In dy, Out dz, Out sums) {
  const char* op = "conv_dgrad_norm";
  check_conv(d, op);
  if (d.e4m3 || d.upsample) return std::nullopt;
  check_input(d, s, op);
  DDPM_CHECK(s.filter && dy && dz && sums && mean_rstd && d.transform.affine && norm.groups > 0 &&
                 norm.c() == d.c() && d.c() % norm.groups == 0 && norm.tile == StatsDesc{}.tile,
             "%s: filter, dy, dz, sums, mean_rstd and a norm of %d channels must be present", op,
             d.c());
  Call call{op, {s.filter, dy, mean_rstd}, {dz, sums}, 0, nullptr};
  add_input_reads(d, s, call);
  return dgrad(type, chip, d, s, dy,
               {.dx = dz, .groups = norm.groups, .mean_rstd = mean_rstd, .sums = sums},
               std::move(call));
}

std::optional<Call> conv_wgrad(DType type, const ConvChip& chip, const ConvDesc& d,
                               const ConvSlots& s, In dy, Out dfilter, Write write) {
  if (d.e4m3) return std::nullopt;
  Call call = wgrad_call("conv_wgrad", d, s, dy, dfilter);
  ConvPlan plan;
  if (type == DType::kBF16) plan = tensor_wgrad(chip.shared_bytes, d, s, dy, dfilter, write);
  if (!plan.run) plan = direct_wgrad(type, d, s, dy, dfilter, write);
  return finish(std::move(call), std::move(plan));
}

std::optional<Call> conv_wgrad_sums(DType type, const ConvChip& chip, const ConvDesc& d,
                                    const ConvSlots& s, In dy, Out dfilter, Write write, Out sums,
                                    int stride, int offset) {
  if (d.e4m3 || type != DType::kBF16) return std::nullopt;
  const char* op = "conv_wgrad_sums";
  Call call = wgrad_call(op, d, s, dy, dfilter);
  DDPM_CHECK(sums && offset >= 0 && offset + d.k <= stride, "%s: columns %d.. of %d", op, offset,
             stride);
  call.writes.push_back(sums);
  ConvPlan plan = tensor_wgrad(chip.shared_bytes, d, s, dy, dfilter, write, {sums, stride, offset});
  if (!plan.run) return std::nullopt;
  return finish(std::move(call), std::move(plan));
}

}  // namespace ddpm::cuda
