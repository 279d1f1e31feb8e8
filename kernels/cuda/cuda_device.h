// A GPU: its memory, its stream, its graphs, and the libraries that compute beside our kernels.
#pragma once

#include <memory>
#include <string>

#include "kernels/cuda/conv_choice.h"
#include "kernels/cuda/cublaslt.h"
#include "kernels/cuda/cuda_backend.h"
#include "kernels/cuda/cudnn_conv.h"

namespace ddpm::cuda {

class CudaDevice final : public CudaBackend {
 public:
  CudaDevice(const BackendOptions&, int device);
  ~CudaDevice() override;

  std::string name() const override { return "cuda"; }
  std::string description() const override;
  std::string numerics() const override;
  std::string plans() const override;
  void use_plans(const std::string&) override;
  bool plans_kept() const override;

  std::unique_ptr<Memory> allocate(size_t bytes) override;
  size_t available_bytes() const override;
  std::unique_ptr<Memory> hold(std::vector<uint8_t> bytes, size_t reserve) override;
  void upload(void* device, const void* host, size_t bytes) override;
  void download(void* host, const void* device, size_t bytes) override;
  void fill(void* device, uint8_t byte, size_t bytes) override;
  void discard(void*, size_t) override {}  // device memory stays until it is freed
  void transfer(void* to, const void* from, size_t bytes) override;
  void synchronize() override;
  void* stream() const override { return stream_; }
  void enter(void* callers_stream) override;
  void leave(void* callers_stream) override;
  void begin_range(const char* name) override;
  void end_range() override;
  std::unique_ptr<Recording> record(const std::function<void()>& calls) override;
  std::unique_ptr<Lane> make_lane() override;

  size_t packed_bytes(const ConvDesc&, ConvPass) const override { return 0; }
  Call conv_pack(const ConvDesc&, ConvPass, In filter, Out packed) override;
  std::optional<Call> conv_forward(const ConvDesc&, const ConvSlots&, Out y,
                                   Out statistics) override;
  std::optional<Call> conv_dgrad(const ConvDesc&, const ConvSlots&, In dy, Out dx, Write) override;
  std::optional<Call> conv_dgrad_norm(const ConvDesc&, const ConvSlots&, const GroupNormDesc&,
                                      In mean_rstd, In dy, Out dz, Out sums) override;
  std::optional<Call> conv_wgrad_sums(const ConvDesc&, const ConvSlots&, In dy, Out dfilter, Write,
                                      Out sums, int stride, int offset) override;
  std::optional<Call> conv_wgrad(const ConvDesc&, const ConvSlots&, In dy, Out dfilter,
                                 Write) override;
  Call gemm(const GemmDesc&, In a, In b, In bias, In residual, Out c, Write) override;

 private:
  void use() const;  // the calling thread's device becomes this one

  BackendOptions options_;
  int device_;
  std::string chip_;
  void* stream_ = nullptr;
  void *entered_ = nullptr, *left_ = nullptr;  // events
  int callers_device_ = 0;
  std::shared_ptr<MemoryBudget> budget_;
  std::unique_ptr<CublasLt> cublas_;
  std::unique_ptr<CudnnConvolutions> cudnn_;
  std::unique_ptr<ConvChoice> choice_;  // between cudnn_ and our own
};

}  // namespace ddpm::cuda
