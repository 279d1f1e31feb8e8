// The CPU backend: oneDNN for convolutions and weights' products, Highway loops for the rest, fp32,
// NHWC. Each group of operations is implemented in the file of its name.
#pragma once

#include "kernels/backend.h"

namespace ddpm::cpu {

class OneDnn;

class CpuBackend final : public Backend {
 public:
  explicit CpuBackend(const BackendOptions&);
  ~CpuBackend() override;

  std::string name() const override { return "cpu"; }
  std::string description() const override;
  std::string numerics() const override;
  DType compute_type() const override { return DType::kF32; }

  std::unique_ptr<Memory> allocate(size_t bytes) override;
  size_t available_bytes() const override;
  std::unique_ptr<Memory> hold(std::vector<uint8_t> bytes, size_t reserve) override;
  void upload(void* device, const void* host, size_t bytes) override;
  void download(void* host, const void* device, size_t bytes) override;
  void fill(void* device, uint8_t byte, size_t bytes) override;
  void discard(void* device, size_t bytes) override;
  void transfer(void* to, const void* from, size_t bytes) override;
  void synchronize() override {}
  void* stream() const override { return nullptr; }
  void enter(void*) override {}
  void leave(void*) override {}
  std::unique_ptr<Recording> record(const std::function<void()>&) override { return nullptr; }
  std::unique_ptr<Lane> make_lane() override { return nullptr; }

  size_t packed_bytes(const ConvDesc&, ConvPass) const override;
  Call conv_pack(const ConvDesc&, ConvPass, In filter, Out packed) override;
  std::optional<Call> conv_forward(const ConvDesc&, const ConvSlots&, Out y,
                                   Out statistics) override;
  std::optional<Call> conv_dgrad(const ConvDesc&, const ConvSlots&, In dy, Out dx, Write) override;
  std::optional<Call> conv_dgrad_norm(const ConvDesc&, const ConvSlots&, const GroupNormDesc&, In,
                                      In, Out, Out) override {
    return std::nullopt;
  }
  std::optional<Call> conv_wgrad_sums(const ConvDesc&, const ConvSlots&, In, Out, Write, Out, int,
                                      int) override {
    return std::nullopt;
  }
  std::optional<Call> conv_wgrad(const ConvDesc&, const ConvSlots&, In dy, Out dfilter,
                                 Write) override;
  Call gemm(const GemmDesc&, In a, In b, In bias, In residual, Out c, Write) override;

  Call channel_stats(const StatsDesc&, In x, Out stats) override;
  Call pixel_sum(const Shape& x, In, Out sums, int stride, int offset) override;
  Call row_sum(int rows, int columns, int stride, int offset, DType type, In x, Out sums,
               Write) override;

  Call group_norm_scale_shift(const GroupNormDesc&, In stats, In stats2, In gamma, In beta,
                              Out scale_shift, Out mean_rstd) override;
  Call group_norm_apply(const GroupNormDesc&, In x, In x2, In scale_shift, In state,
                        Out y) override;
  Call group_norm_backward(const GroupNormDesc&, In x, In x2, In scale_shift, In mean_rstd,
                           In gamma, In state, In dy, In sums, Out dx, Write, Out dx2, Write,
                           Out dgamma, Out dbeta, Write) override;

  Call attention_forward(const AttentionDesc&, In qkv, Out o, Out lse) override;
  Call attention_backward(const AttentionDesc&, In qkv, In o, In lse, In d_o, Out dqkv) override;

  Call silu(int64_t count, In x, Out y) override;
  Call silu_backward(int64_t count, In x, In dy, Out dx, Write) override;
  Call cast(int64_t count, DType from, In x, DType to, Out y) override;
  Call copy(int64_t count, DType, In x, Out y, Write) override;
  Call concat(const Shape& x, int c2, In, In x2, Out y) override;
  Call split(const Shape& x, int c2, In dy, Out dx, Write, Out dx2, Write) override;
  Call upsample(const Shape& x, In, Out y) override;
  Call upsample_backward(const Shape& x, In dy, Out dx, Write) override;
  Call relu(const Shape& x, In, Out y, const Columns&) override;
  Call pool(const PoolDesc&, In x, Out y, const Columns&) override;
  Call resize(const Shape& x, int h, int w, In, Out y) override;
  Call embedding(int n, int rows, int dim, In table, In index, Out y, Write) override;
  Call embedding_backward(int n, int rows, int dim, In index, In dy, Out dtable, Write) override;
  Call time_embedding(const TimeEmbeddingDesc&, In t, Out y) override;
  Call step_row(int n, int rows, int dim, In table, In state, Out y) override;

  Call gather_images(const GatherDesc&, In images, In labels, In state, Out x0,
                     Out batch_labels) override;
  Call draw_timesteps(int n, int timesteps, In state, Out t) override;
  Call draw_noise(const Shape&, In state, Out noise) override;
  Call q_sample(const NoiseDesc&, In x0, In t, In noise, In table, Out x_t) override;
  std::optional<Call> noisy_batch(const NoisyBatchDesc&, In, In, In, In, Out, Out, Out) override {
    return std::nullopt;
  }
  Call mse_loss(const Shape&, int step_images, In prediction, In target, Out sample_loss,
                Out d_prediction, Out state) override;
  std::optional<Call> noise_loss(const Shape&, int, In, Out, Out, Out) override {
    return std::nullopt;
  }
  Call diffusion_loss(const DiffusionLossDesc&, In prediction, In target, In x0, In t, In factors,
                      In weight, Out sample_loss, Out d_prediction, Out state) override;
  Call draw_timesteps_by_loss(int n, int timesteps, In history, In state, Out t,
                              Out weight) override;
  Call loss_history(int n, int timesteps, In t, In sample_loss, In state, Out history) override;
  Call end_part(int part, int next_first_image, Out losses, Out state) override;
  Call sum_losses(int parts, In losses, Out state) override;
  Call loss_histogram(int n, int timesteps, int buckets, In t, In sample_loss, In state,
                      Out histogram) override;
  Call grad_norm(int64_t count, In gradients, Out state) override;
  Call adam_ema(const AdamDesc&, In gradients, Out weights, Out m, Out v, Out ema, Out shadow,
                Out state) override;
  Call advance_state(Out state) override;

  Call draw_start(const Shape&, In slots, In state, Out x) override;
  Call sampler_timestep(int n, In rows, In slots, In state, Out t) override;
  Call sampler_update(const SamplerDesc&, In rows, In slots, In out, Out x, Out previous,
                      Out state) override;
  Call image_to_uint8(int64_t count, In x, Out y) override;

 private:
  BackendOptions options_;
  int threads_;
  std::shared_ptr<MemoryBudget> budget_;
  std::unique_ptr<OneDnn> dnn_;
};

}  // namespace ddpm::cpu
