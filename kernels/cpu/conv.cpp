// Convolutions: oneDNN's direct NHWC kernels, whose bits do not depend on the batch size (tested),
// or Winograd where precision and shape allow. Fused are bias, residual and per-(n,k) bias; what
// else a desc asks for is the caller's to compose.
#include <algorithm>
#include <memory>

#include "kernels/cpu/cpu_backend.h"
#include "kernels/cpu/onednn.h"
#include "kernels/cpu/parallel.h"
#include "kernels/cpu/winograd.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/conv.cpp"
#include <hwy/foreach_target.h>

#include "kernels/cpu/simd-inl.h"

HWY_BEFORE_NAMESPACE();
namespace ddpm::cpu::HWY_NAMESPACE {

// y[i] += x[i]
void conv_add_loop(const float* x, float* y, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; i += lanes())
    store(hn::Add(load(y + i, end - i), load(x + i, end - i)), y + i, end - i);
}

// y[row, k] += sample_bias[k of the row's image] + residual[row, k]; residual may be null.
void conv_epilogue_loop(const float* sample_bias, int64_t stride, const float* residual,
                        int64_t pixels, int64_t k, float* y, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const float* add = sample_bias + row / pixels * stride;
    for (int64_t i = 0; i < k; i += lanes()) {
      Float v = hn::Add(load(y + row * k + i, k - i), load(add + i, k - i));
      if (residual != nullptr) v = hn::Add(v, load(residual + row * k + i, k - i));
      store(v, y + row * k + i, k - i);
    }
  }
}

}  // namespace ddpm::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace ddpm::cpu {

HWY_EXPORT(conv_add_loop);
HWY_EXPORT(conv_epilogue_loop);

namespace {

void check(const ConvDesc& d, const char* op) {
  DDPM_CHECK(d.x.n > 0 && d.x.h > 0 && d.x.w > 0 && d.x.c > 0 && d.c2 >= 0 && d.k > 0,
             "%s: x %s, c2 %d, k %d", op, to_string(d.x).c_str(), d.c2, d.k);
  DDPM_CHECK(d.r > 0 && d.s > 0 && d.stride > 0 && d.pad_top >= 0 && d.pad_left >= 0 &&
                 d.pad_bottom >= 0 && d.pad_right >= 0,
             "%s: filter %dx%d, stride %d, pads %d %d %d %d", op, d.r, d.s, d.stride, d.pad_top,
             d.pad_left, d.pad_bottom, d.pad_right);
  DDPM_CHECK(
      d.in_h() + d.pad_top + d.pad_bottom >= d.r && d.in_w() + d.pad_left + d.pad_right >= d.s,
      "%s: a %dx%d filter does not fit %s", op, d.r, d.s, to_string(d.x).c_str());
  DDPM_CHECK(d.sample_bias_stride == 0 ||
                 (d.sample_bias_offset >= 0 && d.sample_bias_offset + d.k <= d.sample_bias_stride),
             "%s: sample bias %d + %d of stride %d", op, d.sample_bias_offset, d.k,
             d.sample_bias_stride);
}

// What oneDNN is asked for: a residual rides in its epilogue, or in ours where that runs anyway.
ConvDesc direct(ConvDesc d) {
  if (d.sample_bias_stride > 0) d.residual = false;
  return d;
}

bool by_winograd(const BackendOptions& o, const ConvDesc& d, ConvPass pass) {
  return o.precision == Precision::kAuto && !o.batch_invariant && winograd::takes(d, pass);
}

size_t align(size_t bytes) { return (bytes + 63) / 64 * 64; }

void add(int threads, const float* x, float* y, int64_t count) {
  parallel_elements(threads, count, [=](int64_t begin, int64_t end) {
    HWY_DYNAMIC_DISPATCH(conv_add_loop)(x, y, begin, end);
  });
}

}  // namespace

size_t CpuBackend::packed_bytes(const ConvDesc& d, ConvPass pass) const {
  check(d, "packed_bytes");
  if (pass == ConvPass::kWgrad || !d.basic()) return 0;
  if (by_winograd(options_, d, pass)) return winograd::filter_bytes(d);
  return dnn_->filter_bytes(direct(d), pass);
}

Call CpuBackend::conv_pack(const ConvDesc& d, ConvPass pass, In filter, Out packed) {
  DDPM_CHECK(packed_bytes(d, pass) > 0, "conv_pack: the filter %s is read as it is",
             to_string(d.filter()).c_str());
  DDPM_CHECK(filter && packed, "conv_pack: filter and packed must be present");
  if (by_winograd(options_, d, pass))
    return {"conv_pack", {filter}, {packed}, 0, [=, threads = threads_](const Run& r) {
              winograd::pack(d, pass, threads, r.in<float>(filter), r.out<float>(packed));
            }};
  const DnnPrimitivePtr reorder = dnn_->reorder_filter(direct(d), pass);
  return {
      "conv_pack", {filter}, {packed}, reorder->scratchpad_bytes(), [=](const Run& r) {
        reorder->run(
            {.src = r.in<float>(filter), .dst = r.out<float>(packed), .scratchpad = r.workspace});
      }};
}

std::optional<Call> CpuBackend::conv_forward(const ConvDesc& d, const ConvSlots& s, Out y, Out) {
  check(d, "conv_forward");
  if (!d.basic()) return std::nullopt;
  DDPM_CHECK(s.x && s.filter && y, "conv_forward: x, filter and y must be present");
  DDPM_CHECK(d.bias == static_cast<bool>(s.bias) && d.residual == static_cast<bool>(s.residual) &&
                 (d.sample_bias_stride > 0) == static_cast<bool>(s.sample_bias),
             "conv_forward: biases and residual must be present as the desc says");
  Call call{"conv_forward", {s.x, s.filter}, {y}, 0, nullptr};
  for (const In in : {s.bias, s.sample_bias, s.residual})
    if (in) call.reads.push_back(in);

  if (by_winograd(options_, d, ConvPass::kForward)) {
    call.workspace = winograd::workspace_bytes(d, ConvPass::kForward, threads_);
    call.run = [=, threads = threads_](const Run& r) {
      winograd::Epilogue e{r.in<float>(s.bias), r.in<float>(s.sample_bias), d.sample_bias_stride,
                           r.in<float>(s.residual)};
      if (e.sample_bias != nullptr) e.sample_bias += d.sample_bias_offset;
      winograd::run(d, ConvPass::kForward, threads, r.in<float>(s.x), r.in<float>(s.filter), e,
                    r.out<float>(y), r.workspace);
    };
    return call;
  }
  const bool epilogue = d.sample_bias_stride > 0;
  const DnnPrimitivePtr conv = dnn_->conv(direct(d), ConvPass::kForward);
  call.workspace = conv->scratchpad_bytes();
  call.run = [=, threads = threads_](const Run& r) {
    conv->run({.src = r.in<float>(s.x),
               .weights = r.in<float>(s.filter),
               .bias = r.in<float>(s.bias),
               .addend = r.in<float>(s.residual),
               .dst = r.out<float>(y),
               .scratchpad = r.workspace});
    if (!epilogue) return;
    const Shape out = d.y();
    parallel_for(threads, out.n * out.pixels(), [&](int64_t begin, int64_t end) {
      HWY_DYNAMIC_DISPATCH(conv_epilogue_loop)
      (r.in<float>(s.sample_bias) + d.sample_bias_offset, d.sample_bias_stride,
       r.in<float>(s.residual), out.pixels(), out.c, r.out<float>(y), begin, end);
    });
  };
  return call;
}

std::optional<Call> CpuBackend::conv_dgrad(const ConvDesc& d, const ConvSlots& s, In dy, Out dx,
                                           Write write) {
  check(d, "conv_dgrad");
  if (!d.basic()) return std::nullopt;
  DDPM_CHECK(s.filter && dy && dx, "conv_dgrad: filter, dy and dx must be present");
  const bool accumulate = write == Write::kAccumulate;
  if (by_winograd(options_, d, ConvPass::kDgrad))
    return Call{"conv_dgrad",
                {s.filter, dy},
                {dx},
                winograd::workspace_bytes(d, ConvPass::kDgrad, threads_),
                [=, threads = threads_](const Run& r) {
                  winograd::Epilogue e;
                  if (accumulate) e.residual = r.out<float>(dx);
                  winograd::run(d, ConvPass::kDgrad, threads, r.in<float>(dy),
                                r.in<float>(s.filter), e, r.out<float>(dx), r.workspace);
                }};
  const DnnPrimitivePtr conv = dnn_->conv(d, ConvPass::kDgrad);
  // Workspace: the scratchpad, then a dx of its own to add from: oneDNN cannot accumulate here.
  const size_t partial = align(conv->scratchpad_bytes());
  const size_t bytes = partial + (accumulate ? sizeof(float) * d.x.count() : 0);
  return Call{"conv_dgrad", {s.filter, dy}, {dx}, bytes, [=, threads = threads_](const Run& r) {
                float* target =
                    accumulate ? reinterpret_cast<float*>(static_cast<char*>(r.workspace) + partial)
                               : r.out<float>(dx);
                conv->run({.src = r.in<float>(dy),
                           .weights = r.in<float>(s.filter),
                           .dst = target,
                           .scratchpad = r.workspace});
                if (accumulate) add(threads, target, r.out<float>(dx), d.x.count());
              }};
}

std::optional<Call> CpuBackend::conv_wgrad(const ConvDesc& d, const ConvSlots& s, In dy,
                                           Out dfilter, Write write) {
  check(d, "conv_wgrad");
  if (!d.basic()) return std::nullopt;
  DDPM_CHECK(s.x && dy && dfilter, "conv_wgrad: x, dy and dfilter must be present");
  const bool accumulate = write == Write::kAccumulate;
  if (by_winograd(options_, d, ConvPass::kWgrad))
    return Call{"conv_wgrad",
                {s.x, dy},
                {dfilter},
                winograd::workspace_bytes(d, ConvPass::kWgrad, threads_),
                [=, threads = threads_](const Run& r) {
                  winograd::run_wgrad(d, threads, r.in<float>(s.x), r.in<float>(dy), accumulate,
                                      r.out<float>(dfilter), r.workspace);
                }};
  const DnnPrimitivePtr conv = dnn_->conv(d, ConvPass::kWgrad);
  const size_t blocked_bytes = dnn_->filter_bytes(d, ConvPass::kWgrad);
  const DnnPrimitivePtr reorder =
      blocked_bytes > 0 ? dnn_->reorder_filter(d, ConvPass::kWgrad) : nullptr;
  // Workspace: scratchpad (of one, then of the other), the gradient in oneDNN's format where that
  // is not ours, and where we accumulate the gradient in our format.
  const size_t scratch =
      std::max(conv->scratchpad_bytes(), reorder ? reorder->scratchpad_bytes() : 0);
  const size_t blocked = align(scratch), plain = blocked + align(blocked_bytes);
  const size_t bytes = plain + (accumulate ? sizeof(float) * d.filter().count() : 0);
  return Call{"conv_wgrad", {s.x, dy}, {dfilter}, bytes, [=, threads = threads_](const Run& r) {
                char* base = static_cast<char*>(r.workspace);
                void* target = accumulate ? base + plain : r.data[dfilter.slot];
                conv->run({.src = r.in<float>(s.x),
                           .weights = r.in<float>(dy),
                           .dst = reorder ? base + blocked : target,
                           .scratchpad = base});
                if (reorder)
                  reorder->run({.src = base + blocked, .dst = target, .scratchpad = base});
                if (accumulate)
                  add(threads, static_cast<const float*>(target), r.out<float>(dfilter),
                      d.filter().count());
              }};
}

}  // namespace ddpm::cpu
#endif
