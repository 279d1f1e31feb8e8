// Everything the engine can ask of a device. A factory checks shapes, chooses an algorithm and
// returns a prepared Call; nothing is chosen or allocated when a Call runs. Slots of one call may
// not alias unless the factory says so.
//
// Activations, their gradients and the filters and matrices they meet are of the backend's compute
// type; these are marked A. All other tensors are fp32 unless said otherwise: parameters and their
// gradients, statistics, sums, losses, images and noise.
//
// Reductions run in a fixed order: equal inputs give equal bits, whatever the thread timing.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "kernels/call.h"
#include "kernels/desc.h"
#include "kernels/dtype.h"
#include "kernels/philox.h"
#include "kernels/step_state.h"

namespace ddpm {

enum class Precision { kAuto, kFp32, kTf32, kBf16 };

// Where a backend's memory comes from instead of the system: of the device, or the host's for a
// CPU.
struct Allocator {
  std::function<void*(size_t bytes)> allocate;  // aligned to 256; null: none is left
  std::function<void(void*, size_t bytes)> release;
  explicit operator bool() const { return allocate != nullptr; }
};

struct BackendOptions {
  Precision precision = Precision::kAuto;
  int threads = 0;               // CPU: 0 = all this process may use
  bool batch_invariant = false;  // only algorithms whose result for an image ignores the batch size
  size_t memory_budget = 0;      // bytes that may be allocated at a time; 0 = what there is
  // CUDA: our own convolutions by wgmma where that kernel takes them. Needs compute capability 9.0;
  // no GPU has run it yet (docs/gpu_only.md).
  bool wgmma = false;
  Allocator allocator;  // absent: the system's
};

// Memory of a backend, freed with the object.
class Memory {
 public:
  virtual ~Memory() = default;
  virtual void* data() const = 0;  // a device address; only the backend may read it
  virtual size_t size() const = 0;
  // Whether a device reads this over its bus, in the host's memory.
  virtual bool on_host() const { return false; }
};

// What a backend has handed out, against what it may. Memory returns its part when it is freed.
class MemoryBudget {
 public:
  explicit MemoryBudget(size_t bytes) : limit_(bytes) {}
  // Of `available` bytes that the device has, those that may still be taken.
  size_t left(size_t available) const {
    if (limit_ == 0) return available;
    const size_t used = used_;
    return std::min(available, used < limit_ ? limit_ - used : 0);
  }
  void take(size_t bytes) { used_ += bytes; }
  void give_back(size_t bytes) { used_ -= bytes; }

 private:
  size_t limit_;
  std::atomic<size_t> used_{0};
};

// A list of calls that runs by one launch, or by one launch many times over. Launches return at
// once and run in order.
class Recording {
 public:
  virtual ~Recording() = default;
  virtual void launch() = 0;
  // As `times` launches, which a host can watch and end.
  virtual void launch_loop(int times) = 0;
  virtual int64_t loop_runs() const = 0;  // times that all loops of it have run by now
  virtual void stop_loops() = 0;  // those launched end after the time they are in; waits for that
};

// A second stream of a device, for messages between ranks beside what is computed.
class Lane {
 public:
  virtual ~Lane() = default;
  virtual void* stream() const = 0;
  // What comes onto the lane from here on waits for what the backend's stream holds by now.
  virtual void fork() = 0;
  // And the other way round.
  virtual void join() = 0;
  // A mark on the backend's stream, which must not be recording. Waits while a few dozen marks are
  // still to be passed.
  virtual void mark() = 0;
  // How many marks the device has passed. From any thread.
  virtual int64_t passed() = 0;
};

// Slots of a convolution's tensors. Which must be present follows from the desc.
struct ConvSlots {
  In x, x2;                  // A (N,H,W,C1), (N,H,W,c2)
  In scale_shift;            // (N,C,2): scale, shift interleaved
  In filter;                 // A (K,R,S,C), or its packed form where packed_bytes() > 0
  In bias;                   // (K)
  In sample_bias;            // (N, sample_bias_stride)
  In residual;               // A (N,P,Q,K)
  In shortcut, shortcut2;    // A (N,P,Q,.)
  In shortcut_filter;        // A (K,1,1,shortcut_c + shortcut_c2)
  In shortcut_bias;          // (K)
  In state;                  // StepState, for dropout
  In x_scale, filter_scale;  // (1), (K): of E4M3
};

class Backend {
 public:
  virtual ~Backend() = default;

  // "cpu", the device in words, and what decides bits: instruction set, precision, threads.
  virtual std::string name() const = 0;
  virtual std::string description() const = 0;
  virtual std::string numerics() const = 0;
  virtual DType compute_type() const = 0;  // kF32 or kBF16
  // What was chosen by measuring, as JSON; "" where nothing is. Given to use_plans() before calls
  // are prepared, the same is chosen again: {"library": what it holds for, "plans": {CALL:
  // CHOICE}}.
  virtual std::string plans() const { return {}; }
  virtual void use_plans(const std::string&) {}
  // Whether all that was asked for since use_plans() could be chosen as it says.
  virtual bool plans_kept() const { return true; }

  // ---- memory: zero-filled on allocation; throws Error(kMemory) naming needed bytes ----
  virtual std::unique_ptr<Memory> allocate(size_t bytes) = 0;
  virtual size_t available_bytes() const = 0;  // within the budget, if there is one
  // Takes over bytes that calls read and nothing writes. A device copies them if they fit beside
  // `reserve` bytes in its memory, and else reads them in the host's, which is pinned for it.
  virtual std::unique_ptr<Memory> hold(std::vector<uint8_t> bytes, size_t reserve) = 0;
  virtual void upload(void* device, const void* host, size_t bytes) = 0;
  virtual void download(void* host, const void* device, size_t bytes) = 0;
  virtual void fill(void* device, uint8_t byte, size_t bytes) = 0;
  // The contents are not needed any more: the memory may go back until it is written again.
  virtual void discard(void* device, size_t bytes) = 0;
  // From one place in this backend's memory to another, in order with its calls.
  virtual void transfer(void* to, const void* from, size_t bytes) = 0;
  virtual void synchronize() = 0;
  // The stream that calls run on, for Run; null on the CPU.
  virtual void* stream() const = 0;
  // Around work on the memory of a caller with streams of its own: what follows `enter` waits for
  // what the caller's stream holds by then, and from `leave` on that stream waits for this work;
  // the caller itself waits where it gives null. The caller's current device is put back.
  virtual void enter(void* callers_stream) = 0;
  virtual void leave(void* callers_stream) = 0;
  // A name in a profiler's timeline for what is asked of the backend until the range ends. Ranges
  // nest; a recording does not keep them.
  virtual void begin_range(const char*) {}
  virtual void end_range() {}
  // What `calls` does, recorded to be done again as one launch; null where the backend cannot. The
  // memory they work on must outlive it.
  virtual std::unique_ptr<Recording> record(const std::function<void()>& calls) = 0;
  // Null where the backend has no streams.
  virtual std::unique_ptr<Lane> make_lane() = 0;

  // ---- convolution: nullopt = not fused here, the caller composes plain calls ----
  // basic() descs are always taken. dgrad and wgrad take filter and bias from the desc and slots.
  // Bytes of the packed filter a pass reads instead of (K,R,S,C); 0 = it reads the plain one.
  // x, y, dy, dx and filters are A, dfilter is fp32.
  virtual size_t packed_bytes(const ConvDesc&, ConvPass) const = 0;
  virtual Call conv_pack(const ConvDesc&, ConvPass, In filter, Out packed) = 0;
  virtual std::optional<Call> conv_forward(const ConvDesc&, const ConvSlots&, Out y,
                                           Out statistics) = 0;
  // dx (N,H,W,C) (+)= the gradient by the convolution's input.
  virtual std::optional<Call> conv_dgrad(const ConvDesc&, const ConvSlots&, In dy, Out dx,
                                         Write) = 0;
  // The same led back through SiLU and dropout, for a convolution that reads a group norm: dz
  // (N,H,W,C) = the gradient at z = x scale + shift, A, and `sums` (N, tiles, 2, C) over the pixel
  // tiles of StatsDesc: of dz, as it is written, and of dz (x - the group's mean). Of the norm's
  // desc the groups are read.
  virtual std::optional<Call> conv_dgrad_norm(const ConvDesc&, const ConvSlots&,
                                              const GroupNormDesc&, In mean_rstd, In dy, Out dz,
                                              Out sums) = 0;
  // dfilter (K,R,S,C) (+)= the gradient by the filter.
  virtual std::optional<Call> conv_wgrad(const ConvDesc&, const ConvSlots&, In dy, Out dfilter,
                                         Write) = 0;
  // The same with pixel_sum of dy at once, which the bias's gradient starts from.
  virtual std::optional<Call> conv_wgrad_sums(const ConvDesc&, const ConvSlots&, In dy, Out dfilter,
                                              Write, Out sums, int stride, int offset) = 0;

  // Types are the desc's; bias and residual are of c's.
  virtual Call gemm(const GemmDesc&, In a, In b, In bias, In residual, Out c, Write) = 0;

  // ---- reductions ----
  // x is A.
  virtual Call channel_stats(const StatsDesc&, In x, Out stats) = 0;
  // sums[n * stride + offset + c] = sum over pixels of x, A (N,H,W,C).
  virtual Call pixel_sum(const Shape& x, In, Out sums, int stride, int offset) = 0;
  // sums[c] (+)= sum over rows r of x[r * stride + offset + c], c < columns; x of the given type.
  virtual Call row_sum(int rows, int columns, int stride, int offset, DType type, In x, Out sums,
                       Write) = 0;

  // ---- group norm: x, x2, y, dy, dx and dx2 are A ----
  // From the statistics of x and x2: scale_shift (N,C,2) such that z = x * scale + shift is the
  // normalised, affine output; mean_rstd (N,G,2) for the backward pass.
  virtual Call group_norm_scale_shift(const GroupNormDesc&, In stats, In stats2, In gamma, In beta,
                                      Out scale_shift, Out mean_rstd) = 0;
  // y (N,H,W,C) = dropout(silu(concat(x, x2) * scale + shift)), each part as the desc says.
  virtual Call group_norm_apply(const GroupNormDesc&, In x, In x2, In scale_shift, In state,
                                Out y) = 0;
  // From dy at apply's output: gradients by x, x2, gamma, beta. Where `sums` is present, which only
  // a backend that has conv_dgrad_norm takes, dy and sums are what that wrote.
  virtual Call group_norm_backward(const GroupNormDesc&, In x, In x2, In scale_shift, In mean_rstd,
                                   In gamma, In state, In dy, In sums, Out dx, Write, Out dx2,
                                   Write, Out dgamma, Out dbeta, Write) = 0;

  // ---- attention: qkv, o and their gradients are A ----
  // lse (N, heads, L): log of the softmax denominator, for the backward pass; may be absent.
  virtual Call attention_forward(const AttentionDesc&, In qkv, Out o, Out lse) = 0;
  virtual Call attention_backward(const AttentionDesc&, In qkv, In o, In lse, In d_o, Out dqkv) = 0;

  // ---- pointwise and resampling ----
  virtual Call silu(int64_t count, In x, Out y) = 0;
  virtual Call silu_backward(int64_t count, In x, In dy, Out dx, Write) = 0;
  // y = x in another type; one of the two is fp32.
  virtual Call cast(int64_t count, DType from, In x, DType to, Out y) = 0;
  // y (+)= x, both of the given type, which is A's or fp32.
  virtual Call copy(int64_t count, DType, In x, Out y, Write) = 0;
  // From here to pool all tensors are A.
  // y (N,H,W,C1+c2) = concat(x, x2) along channels, and back. x and x2 may be one.
  virtual Call concat(const Shape& x, int c2, In, In x2, Out y) = 0;
  virtual Call split(const Shape& x, int c2, In dy, Out dx, Write, Out dx2, Write) = 0;
  // y (N,2H,2W,C)[i,j] = x[i/2, j/2], and dx (+)= the sum of its four gradients.
  virtual Call upsample(const Shape& x, In, Out y) = 0;
  virtual Call upsample_backward(const Shape& x, In dy, Out dx, Write) = 0;
  // y (N,H,W,columns) at x's = max(x, 0); a NaN stays one.
  virtual Call relu(const Shape& x, In, Out y, const Columns&) = 0;
  // y (N,P,Q,columns) at x's. A window with a NaN is NaN.
  virtual Call pool(const PoolDesc&, In x, Out y, const Columns&) = 0;
  // y (N,h,w,C) = x, fp32, bilinear: pixel i of h lies at (i + 1/2) H/h - 1/2 between x's rows, and
  // outside of them on the nearest; columns likewise.
  virtual Call resize(const Shape& x, int h, int w, In, Out y) = 0;
  // y (N, dim) (+)= table[index[n]]; index I32 (N). Backward: dtable (rows, dim), each row the sum
  // over its images in order. An index outside the table, here and in the next two: an error on the
  // CPU; on a device, which cannot throw, the image's y is NaN and no row gets its gradient.
  virtual Call embedding(int n, int rows, int dim, In table, In index, Out y, Write) = 0;
  virtual Call embedding_backward(int n, int rows, int dim, In index, In dy, Out dtable, Write) = 0;
  // y (N, dim) from t I32 (N), 0 <= t < timesteps.
  virtual Call time_embedding(const TimeEmbeddingDesc&, In t, Out y) = 0;
  // y (N, dim) = table[state.step] for all images; table (rows, dim).
  virtual Call step_row(int n, int rows, int dim, In table, In state, Out y) = 0;

  // ---- training ----
  // images U8 (count,H,W,C), labels I32 (count) or absent -> x0 (N,H,W,C), batch_labels I32 (N).
  virtual Call gather_images(const GatherDesc&, In images, In labels, In state, Out x0,
                             Out batch_labels) = 0;
  // t I32 (N), uniform on [0, timesteps).
  virtual Call draw_timesteps(int n, int timesteps, In state, Out t) = 0;
  // noise (N,H,W,C) ~ N(0, I), addressed by the state's first_image + slot.
  virtual Call draw_noise(const Shape&, In state, Out noise) = 0;
  // A t outside the table is an Error on the CPU, and makes a NaN of the image elsewhere.
  virtual Call q_sample(const NoiseDesc&, In x0, In t, In noise, In table, Out x_t) = 0;
  // The four above at once, x0 and the noise written nowhere. nullopt = not fused here.
  virtual std::optional<Call> noisy_batch(const NoisyBatchDesc&, In images, In labels, In state,
                                          In table, Out x_t, Out t, Out batch_labels) = 0;
  // sample_loss (N) = mean over an image of (prediction - target)^2; their sum / step_images goes
  // to state's loss, whose non-finite flag it may set; d_prediction = the gradient of that.
  // step_images is N, or that of the whole step, of which these are a part. Prediction and gradient
  // are A.
  virtual Call mse_loss(const Shape&, int step_images, In prediction, In target, Out sample_loss,
                        Out d_prediction, Out state) = 0;
  // The same with the noise of this step (Purpose::kNoise) as target, drawn again rather than read.
  // nullopt = not fused here.
  virtual std::optional<Call> noise_loss(const Shape&, int step_images, In prediction,
                                         Out sample_loss, Out d_prediction, Out state) = 0;
  // mse_loss for every loss (kernels/diffusion_loss.h), of a prediction that may have a second half
  // of channels, and weighted: the state's loss = sum of weight sample_loss / step_images. x0
  // (N,H,W, C), t I32 (N), factors (timesteps) LossFactors; weight (N) may be absent: 1. x0, t and
  // factors are not read for kSimple. A t outside the table as in q_sample.
  virtual Call diffusion_loss(const DiffusionLossDesc&, In prediction, In target, In x0, In t,
                              In factors, In weight, Out sample_loss, Out d_prediction,
                              Out state) = 0;
  // t I32 (N), drawn with probability p = 0.999 r / sum of r + 0.001 / timesteps, r being the root
  // of a timestep's mean squared loss in `history` (timesteps, kLossHistoryRow); with 1 / timesteps
  // while one has fewer than kLossHistory losses. weight (N) = 1 / (timesteps p). (Nichol &
  // Dhariwal 2021, section 3.3.)
  virtual Call draw_timesteps_by_loss(int n, int timesteps, In history, In state, Out t,
                                      Out weight) = 0;
  // Adds the losses to their timesteps' history, in order. Skipped while a non-finite flag is set.
  virtual Call loss_history(int n, int timesteps, In t, In sample_loss, In state, Out history) = 0;
  // The end of a part of a step's batch: losses[part] = the state's loss, and the state's
  // first_image becomes that of the next part.
  virtual Call end_part(int part, int next_first_image, Out losses, Out state) = 0;
  // The state's loss = the sum of losses (parts), in order; may set the non-finite flag.
  virtual Call sum_losses(int parts, In losses, Out state) = 0;
  // histogram[b] += (sum of losses, number of images) over the images with t buckets / timesteps =
  // b; (buckets, 2). Skipped while a non-finite flag is set. buckets <= 32.
  virtual Call loss_histogram(int n, int timesteps, int buckets, In t, In sample_loss, In state,
                              Out histogram) = 0;
  // Global norm of the gradient into state, whose non-finite flag it may set.
  virtual Call grad_norm(int64_t count, In gradients, Out state) = 0;
  // Skipped while a non-finite flag is set. Reads grad_norm and step from state, writes the rate.
  // shadow: the weights as A, present where that is not fp32.
  virtual Call adam_ema(const AdamDesc&, In gradients, Out weights, Out m, Out v, Out ema,
                        Out shadow, Out state) = 0;
  // The end of a step: step += 1, loss_sum += loss, unless a non-finite flag is set.
  virtual Call advance_state(Out state) = 0;

  // ---- sampling ----
  // slots (N) are ChainSlots, rows an array of SamplerRow. What an idle image has is left as it is.
  // x (N,H,W,C) ~ N(0, I), of the images whose chains begin in this step.
  virtual Call draw_start(const Shape&, In slots, In state, Out x) = 0;
  // t I32 (N), that of each image's row; 0 where it is idle.
  virtual Call sampler_timestep(int n, In rows, In slots, In state, Out t) = 0;
  // Each image's row on the network's output, A (N,H,W,C), or as the desc says, in place on x;
  // previous (N,H,W,C) is read where the row uses it and written with this row's x0.
  virtual Call sampler_update(const SamplerDesc&, In rows, In slots, In out, Out x, Out previous,
                              Out state) = 0;
  // floor(clamp((x + 1) 127.5, 0, 255) + 0.5)
  virtual Call image_to_uint8(int64_t count, In x, Out y) = 0;
};

// Throws Error(kDevice) saying what is missing if this build or machine has no such backend.
std::unique_ptr<Backend> make_cpu_backend(const BackendOptions&);
std::unique_ptr<Backend> make_cuda_backend(const BackendOptions&, int device);

// Devices that make_cuda_backend would find.
int cuda_device_count();

// The libraries behind the backends, with their versions; empty for a backend that is not built.
std::string cpu_libraries();
std::string cuda_libraries();

}  // namespace ddpm
