// The hand-written kernels behind the backend's page. Where memory comes from, and what libraries
// compute, is for the class that derives from this one: a GPU's, or in the tests the host's.
// Each group of operations is implemented in the file of its name.
#pragma once

#include "kernels/backend.h"
#include "kernels/bf16.h"

namespace ddpm::cuda {

class CudaBackend : public Backend {
 public:
  // shared_bytes: what a block may have of shared memory; a Hopper's unless the device has less.
  explicit CudaBackend(DType compute_type, size_t shared_bytes = kHopperShared)
      : type_(compute_type), shared_bytes_(shared_bytes) {}

  static constexpr size_t kHopperShared = 227 * 1024;

  DType compute_type() const override { return type_; }
  size_t block_shared_bytes() const { return shared_bytes_; }

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
  std::optional<Call> noisy_batch(const NoisyBatchDesc&, In images, In labels, In state, In table,
                                  Out x_t, Out t, Out batch_labels) override;
  Call mse_loss(const Shape&, int step_images, In prediction, In target, Out sample_loss,
                Out d_prediction, Out state) override;
  std::optional<Call> noise_loss(const Shape&, int step_images, In prediction, Out sample_loss,
                                 Out d_prediction, Out state) override;
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
  DType type_;
  size_t shared_bytes_;
};

// f(float{}) or f(bf16{}): picks an instantiation when a call is prepared.
template <typename F>
auto dispatch(DType type, F f) {
  return type == DType::kBF16 ? f(bf16{}) : f(0.0f);
}

}  // namespace ddpm::cuda
