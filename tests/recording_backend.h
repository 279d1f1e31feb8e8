// A backend that computes nothing and writes down everything: what a device with memory of its own,
// and fused convolutions, would be asked. Its memory cannot be read or written by the host.
#pragma once

#include <sys/mman.h>

#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "kernels/backend.h"

namespace ddpm::test {

class RecordingBackend : public Backend {
 public:
  struct Options {
    bool fused_convolution = true;
    bool fused_objective = true;  // noisy_batch and noise_loss
    DType compute_type = DType::kF32;
    size_t available_bytes = size_t{1} << 50;
  };
  struct Event {
    std::string what;                   // an op, or "allocate", "upload", "download", "fill"
    std::vector<const void*> pointers;  // reads, then writes, then the workspace
    friend bool operator==(const Event&, const Event&) = default;
  };

  RecordingBackend() = default;
  explicit RecordingBackend(const Options& o) : options_(o) {}

  std::vector<Event> take_events() { return std::exchange(*events_, {}); }

  std::string name() const override { return "recording"; }
  std::string description() const override { return "recording"; }
  std::string numerics() const override { return "none"; }
  DType compute_type() const override { return options_.compute_type; }

  std::unique_ptr<Memory> allocate(size_t bytes) override {
    note("allocate");
    return std::make_unique<SealedMemory>(bytes);
  }
  size_t available_bytes() const override { return options_.available_bytes; }
  std::unique_ptr<Memory> hold(std::vector<uint8_t> bytes, size_t) override {
    return allocate(bytes.size());
  }
  void upload(void* to, const void*, size_t) override { note("upload", {to}); }
  void download(void*, const void* from, size_t) override { note("download", {from}); }
  void fill(void* to, uint8_t, size_t) override { note("fill", {to}); }
  void discard(void* at, size_t) override { note("discard", {at}); }
  void transfer(void* to, const void* from, size_t) override { note("transfer", {from, to}); }
  void synchronize() override { note("synchronize"); }
  void* stream() const override { return nullptr; }
  void enter(void*) override { note("enter"); }
  void leave(void*) override { note("leave"); }
  std::unique_ptr<Recording> record(const std::function<void()>&) override { return nullptr; }
  std::unique_ptr<Lane> make_lane() override { return nullptr; }

  size_t packed_bytes(const ConvDesc&, ConvPass) const override { return 0; }
  Call conv_pack(const ConvDesc&, ConvPass, In, Out) override {
    fail(Status::kBug, "nothing is packed here");
  }
  std::optional<Call> conv_forward(const ConvDesc& d, const ConvSlots& s, Out y,
                                   Out statistics) override {
    if (!options_.fused_convolution && !d.basic()) return std::nullopt;
    return call("conv_forward",
                {s.x, s.x2, s.scale_shift, s.filter, s.bias, s.sample_bias, s.residual, s.shortcut,
                 s.shortcut2, s.shortcut_filter, s.shortcut_bias, s.state},
                {y, d.statistics ? statistics : Out{}}, 4096);
  }
  std::optional<Call> conv_dgrad(const ConvDesc&, const ConvSlots& s, In dy, Out dx,
                                 Write) override {
    return call("conv_dgrad", {s.filter, dy}, {dx}, 4096);
  }
  std::optional<Call> conv_dgrad_norm(const ConvDesc&, const ConvSlots& s, const GroupNormDesc&,
                                      In mean_rstd, In dy, Out dz, Out sums) override {
    if (!options_.fused_convolution) return std::nullopt;
    return call("conv_dgrad_norm", {s.filter, dy, s.x, s.x2, s.scale_shift, s.state, mean_rstd},
                {dz, sums}, 4096);
  }
  std::optional<Call> conv_wgrad(const ConvDesc& d, const ConvSlots& s, In dy, Out dfilter,
                                 Write) override {
    if (!options_.fused_convolution && !d.basic()) return std::nullopt;
    return call("conv_wgrad", {s.x, s.x2, s.scale_shift, s.state, dy}, {dfilter}, 4096);
  }
  std::optional<Call> conv_wgrad_sums(const ConvDesc&, const ConvSlots& s, In dy, Out dfilter,
                                      Write, Out sums, int, int) override {
    if (!options_.fused_convolution) return std::nullopt;
    return call("conv_wgrad_sums", {s.x, s.x2, s.scale_shift, s.state, dy}, {dfilter, sums}, 4096);
  }
  Call gemm(const GemmDesc&, In a, In b, In bias, In residual, Out c, Write) override {
    return call("gemm", {a, b, bias, residual}, {c});
  }
  Call channel_stats(const StatsDesc&, In x, Out stats) override {
    return call("channel_stats", {x}, {stats});
  }
  Call pixel_sum(const Shape&, In x, Out sums, int, int) override {
    return call("pixel_sum", {x}, {sums});
  }
  Call row_sum(int, int, int, int, DType, In x, Out sums, Write) override {
    return call("row_sum", {x}, {sums});
  }
  Call group_norm_scale_shift(const GroupNormDesc&, In stats, In stats2, In gamma, In beta,
                              Out scale_shift, Out mean_rstd) override {
    return call("group_norm_scale_shift", {stats, stats2, gamma, beta}, {scale_shift, mean_rstd});
  }
  Call group_norm_apply(const GroupNormDesc&, In x, In x2, In scale_shift, In state,
                        Out y) override {
    return call("group_norm_apply", {x, x2, scale_shift, state}, {y});
  }
  Call group_norm_backward(const GroupNormDesc&, In x, In x2, In scale_shift, In mean_rstd,
                           In gamma, In state, In dy, In sums, Out dx, Write, Out dx2, Write,
                           Out dgamma, Out dbeta, Write) override {
    return call("group_norm_backward", {x, x2, scale_shift, mean_rstd, gamma, state, dy, sums},
                {dx, dx2, dgamma, dbeta}, 4096);
  }
  Call attention_forward(const AttentionDesc&, In qkv, Out o, Out lse) override {
    return call("attention_forward", {qkv}, {o, lse});
  }
  Call attention_backward(const AttentionDesc&, In qkv, In o, In lse, In d_o, Out dqkv) override {
    return call("attention_backward", {qkv, o, lse, d_o}, {dqkv}, 4096);
  }
  Call silu(int64_t, In x, Out y) override { return call("silu", {x}, {y}); }
  Call silu_backward(int64_t, In x, In dy, Out dx, Write) override {
    return call("silu_backward", {x, dy}, {dx});
  }
  Call cast(int64_t, DType, In x, DType, Out y) override { return call("cast", {x}, {y}); }
  Call copy(int64_t, DType, In x, Out y, Write) override { return call("copy", {x}, {y}); }
  Call concat(const Shape&, int, In x, In x2, Out y) override {
    return call("concat", {x, x2}, {y});
  }
  Call split(const Shape&, int, In dy, Out dx, Write, Out dx2, Write) override {
    return call("split", {dy}, {dx, dx2});
  }
  Call upsample(const Shape&, In x, Out y) override { return call("upsample", {x}, {y}); }
  Call upsample_backward(const Shape&, In dy, Out dx, Write) override {
    return call("upsample_backward", {dy}, {dx});
  }
  Call relu(const Shape&, In x, Out y, const Columns&) override { return call("relu", {x}, {y}); }
  Call pool(const PoolDesc&, In x, Out y, const Columns&) override {
    return call("pool", {x}, {y});
  }
  Call resize(const Shape&, int, int, In x, Out y) override { return call("resize", {x}, {y}); }
  Call embedding(int, int, int, In table, In index, Out y, Write) override {
    return call("embedding", {table, index}, {y});
  }
  Call embedding_backward(int, int, int, In index, In dy, Out dtable, Write) override {
    return call("embedding_backward", {index, dy}, {dtable});
  }
  Call time_embedding(const TimeEmbeddingDesc&, In t, Out y) override {
    return call("time_embedding", {t}, {y});
  }
  Call step_row(int, int, int, In table, In state, Out y) override {
    return call("step_row", {table, state}, {y});
  }
  Call gather_images(const GatherDesc&, In images, In labels, In state, Out x0,
                     Out batch_labels) override {
    return call("gather_images", {images, labels, state}, {x0, batch_labels});
  }
  Call draw_timesteps(int, int, In state, Out t) override {
    return call("draw_timesteps", {state}, {t});
  }
  Call draw_noise(const Shape&, In state, Out noise) override {
    return call("draw_noise", {state}, {noise});
  }
  Call q_sample(const NoiseDesc&, In x0, In t, In noise, In table, Out x_t) override {
    return call("q_sample", {x0, t, noise, table}, {x_t});
  }
  std::optional<Call> noisy_batch(const NoisyBatchDesc&, In images, In labels, In state, In table,
                                  Out x_t, Out t, Out batch_labels) override {
    if (!options_.fused_objective) return std::nullopt;
    return call("noisy_batch", {images, labels, state, table}, {x_t, t, batch_labels});
  }
  Call mse_loss(const Shape&, int, In prediction, In target, Out sample_loss, Out d_prediction,
                Out state) override {
    return call("mse_loss", {prediction, target}, {sample_loss, d_prediction, state});
  }
  std::optional<Call> noise_loss(const Shape&, int, In prediction, Out sample_loss,
                                 Out d_prediction, Out state) override {
    if (!options_.fused_objective) return std::nullopt;
    return call("noise_loss", {prediction}, {sample_loss, d_prediction, state}, 4096);
  }
  Call diffusion_loss(const DiffusionLossDesc&, In prediction, In target, In x0, In t, In factors,
                      In weight, Out sample_loss, Out d_prediction, Out state) override {
    return call("diffusion_loss", {prediction, target, x0, t, factors, weight},
                {sample_loss, d_prediction, state}, 4096);
  }
  Call draw_timesteps_by_loss(int, int, In history, In state, Out t, Out weight) override {
    return call("draw_timesteps_by_loss", {history, state}, {t, weight}, 4096);
  }
  Call loss_history(int, int, In t, In sample_loss, In state, Out history) override {
    return call("loss_history", {t, sample_loss, state}, {history});
  }
  Call end_part(int, int, Out losses, Out state) override {
    return call("end_part", {}, {losses, state});
  }
  Call sum_losses(int, In losses, Out state) override {
    return call("sum_losses", {losses}, {state});
  }
  Call loss_histogram(int, int, int, In t, In sample_loss, In state, Out histogram) override {
    return call("loss_histogram", {t, sample_loss, state}, {histogram});
  }
  Call grad_norm(int64_t, In gradients, Out state) override {
    return call("grad_norm", {gradients}, {state});
  }
  Call adam_ema(const AdamDesc&, In gradients, Out weights, Out m, Out v, Out ema, Out shadow,
                Out state) override {
    return call("adam_ema", {gradients}, {weights, m, v, ema, shadow, state});
  }
  Call advance_state(Out state) override { return call("advance_state", {}, {state}); }
  Call draw_start(const Shape&, In slots, In state, Out x) override {
    return call("draw_start", {slots, state}, {x});
  }
  Call sampler_timestep(int, In rows, In slots, In state, Out t) override {
    return call("sampler_timestep", {rows, slots, state}, {t});
  }
  Call sampler_update(const SamplerDesc&, In rows, In slots, In out, Out x, Out previous,
                      Out state) override {
    return call("sampler_update", {rows, slots, out}, {x, previous, state});
  }
  Call image_to_uint8(int64_t, In x, Out y) override { return call("image_to_uint8", {x}, {y}); }

 private:
  // Address space without access: a host read or write of it ends the test.
  class SealedMemory final : public Memory {
   public:
    explicit SealedMemory(size_t bytes) : size_(bytes) {
      data_ =
          mmap(nullptr, bytes + 1, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
      if (data_ == MAP_FAILED) fail(Status::kMemory, "mmap of %zu bytes", bytes);
    }
    ~SealedMemory() override { munmap(data_, size_ + 1); }
    void* data() const override { return data_; }
    size_t size() const override { return size_; }

   private:
    void* data_;
    size_t size_;
  };

  void note(const char* what, std::vector<const void*> pointers = {}) {
    events_->push_back({what, std::move(pointers)});
  }

  Call call(const char* op, std::vector<In> reads, std::vector<Out> writes, size_t workspace = 0) {
    Call c{op, std::move(reads), std::move(writes), workspace, {}};
    c.run = [events = events_, op, reads = c.reads, writes = c.writes, workspace](const Run& r) {
      Event e{op, {}};
      for (In in : reads) e.pointers.push_back(r.in<void>(in));
      for (Out out : writes) e.pointers.push_back(r.out<void>(out));
      if (workspace > 0) e.pointers.push_back(r.workspace);
      events->push_back(std::move(e));
    };
    return c;
  }

  Options options_;
  std::shared_ptr<std::vector<Event>> events_ = std::make_shared<std::vector<Event>>();
};

}  // namespace ddpm::test
