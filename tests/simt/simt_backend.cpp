#include "tests/simt/simt_backend.h"

#include <cstring>
#include <vector>

#include "kernels/cuda/conv.h"
#include "kernels/cuda/cuda_backend.h"
#include "tests/reference/gemm.h"
#include "tests/simt/machine.h"

namespace ddpm::test {
namespace {

class SimtMemory final : public Memory {
 public:
  explicit SimtMemory(size_t bytes)
      : bytes_(bytes),
        data_(
            static_cast<char*>(::operator new (bytes + kAlignment, std::align_val_t{kAlignment}))) {
    std::memset(data_, 0, bytes + kAlignment);
    simt::add_extent(data_, bytes);
  }
  ~SimtMemory() override {
    simt::remove_extent(data_);
    ::operator delete (data_, std::align_val_t{kAlignment});
  }
  SimtMemory(const SimtMemory&) = delete;
  SimtMemory& operator=(const SimtMemory&) = delete;
  void* data() const override { return data_; }
  size_t size() const override { return bytes_; }

 private:
  static constexpr size_t kAlignment = 256;  // as cudaMalloc's
  size_t bytes_;
  char* data_;
};

ref::Vector load(const void* data, int64_t count, DType type) {
  ref::Vector v(static_cast<size_t>(count));
  for (size_t i = 0; i < v.size(); ++i)
    v[i] = type == DType::kBF16 ? static_cast<double>(to_float(static_cast<const bf16*>(data)[i]))
                                : static_cast<double>(static_cast<const float*>(data)[i]);
  return v;
}

void store(const ref::Vector& v, void* data, DType type, Write write) {
  for (size_t i = 0; i < v.size(); ++i) {
    if (type == DType::kBF16) {
      bf16& to = static_cast<bf16*>(data)[i];
      const float old = write == Write::kAccumulate ? to_float(to) : 0.0f;
      to = to_bf16(old + static_cast<float>(v[i]));
    } else {
      float& to = static_cast<float*>(data)[i];
      to = (write == Write::kAccumulate ? to : 0.0f) + static_cast<float>(v[i]);
    }
  }
}

// A recording as the engine sees one: the calls, made again.
class Replay final : public Recording {
 public:
  explicit Replay(std::function<void()> calls) : calls_(std::move(calls)) {}
  void launch() override { calls_(); }
  void launch_loop(int times) override {
    for (int i = 0; i < times; ++i, ++runs_) calls_();
  }
  int64_t loop_runs() const override { return runs_; }
  void stop_loops() override {}

 private:
  std::function<void()> calls_;
  int64_t runs_ = 0;
};

std::vector<In> present(std::initializer_list<In> slots) {
  std::vector<In> v(slots);
  std::erase_if(v, [](In s) { return !s; });
  return v;
}

class SimtBackend final : public cuda::CudaBackend {
 public:
  SimtBackend(DType compute_type, SimtOptions options)
      : CudaBackend(compute_type, options.shared_bytes > 0 ? options.shared_bytes : kHopperShared),
        options_(options) {}

  cuda::ConvChip chip() const { return {block_shared_bytes(), options_.wgmma_blocks}; }

  std::string name() const override { return "simt"; }
  std::string description() const override { return "CUDA kernels on the host"; }
  std::string numerics() const override { return std::string("simt ") + name_of(compute_type()); }

  std::unique_ptr<Memory> allocate(size_t bytes) override {
    return std::make_unique<SimtMemory>(bytes);
  }
  size_t available_bytes() const override { return size_t{1} << 40; }
  std::unique_ptr<Memory> hold(std::vector<uint8_t> bytes, size_t) override {
    auto memory = allocate(bytes.size());
    upload(memory->data(), bytes.data(), bytes.size());
    return memory;
  }
  void upload(void* device, const void* host, size_t bytes) override {
    std::memcpy(device, host, bytes);
  }
  void download(void* host, const void* device, size_t bytes) override {
    std::memcpy(host, device, bytes);
  }
  void fill(void* device, uint8_t byte, size_t bytes) override { std::memset(device, byte, bytes); }
  void discard(void*, size_t) override {}
  void transfer(void* to, const void* from, size_t bytes) override { std::memcpy(to, from, bytes); }
  void synchronize() override {}
  void* stream() const override { return nullptr; }
  void enter(void*) override {}
  void leave(void*) override {}
  std::unique_ptr<Recording> record(const std::function<void()>& calls) override {
    return std::make_unique<Replay>(calls);
  }
  std::unique_ptr<Lane> make_lane() override {
    auto lane = std::make_unique<HostLane>(options_.stuck_after);
    if (options_.lane != nullptr) *options_.lane = lane.get();
    return lane;
  }

  size_t packed_bytes(const ConvDesc&, ConvPass) const override { return 0; }
  Call conv_pack(const ConvDesc&, ConvPass, In, Out) override {
    fail(Status::kBug, "simt packs no filters");
  }
  std::optional<Call> conv_forward(const ConvDesc& d, const ConvSlots& s, Out y,
                                   Out statistics) override {
    if (options_.composed && !d.basic()) return std::nullopt;
    return cuda::conv_forward(compute_type(), chip(), d, s, y, statistics,
                              options_.batch_invariant);
  }
  std::optional<Call> conv_dgrad(const ConvDesc& d, const ConvSlots& s, In dy, Out dx,
                                 Write write) override {
    return cuda::conv_dgrad(compute_type(), chip(), d, s, dy, dx, write);
  }
  std::optional<Call> conv_dgrad_norm(const ConvDesc& d, const ConvSlots& s,
                                      const GroupNormDesc& norm, In mean_rstd, In dy, Out dz,
                                      Out sums) override {
    if (options_.composed) return std::nullopt;
    return cuda::conv_dgrad_norm(compute_type(), chip(), d, s, norm, mean_rstd, dy, dz, sums);
  }
  std::optional<Call> conv_wgrad(const ConvDesc& d, const ConvSlots& s, In dy, Out dfilter,
                                 Write write) override {
    if (options_.composed && !d.basic()) return std::nullopt;
    return cuda::conv_wgrad(compute_type(), chip(), d, s, dy, dfilter, write);
  }
  std::optional<Call> conv_wgrad_sums(const ConvDesc& d, const ConvSlots& s, In dy, Out dfilter,
                                      Write write, Out sums, int stride, int offset) override {
    if (options_.composed) return std::nullopt;
    return cuda::conv_wgrad_sums(compute_type(), chip(), d, s, dy, dfilter, write, sums, stride,
                                 offset);
  }
  Call gemm(const GemmDesc& g, In a, In b, In bias, In residual, Out c, Write write) override {
    return {"gemm", present({a, b, bias, residual}), {c}, 0, [=](const Run& r) {
              const int64_t n = g.batch;
              const auto x = load(r.in<void>(a), n * g.m * g.k, g.in);
              const auto w = load(r.in<void>(b), n * g.k * g.n, g.in);
              ref::Vector add, more;
              if (g.bias) add = load(r.in<void>(bias), g.n, g.out);
              if (g.residual) more = load(r.in<void>(residual), n * g.m * g.n, g.out);
              store(ref::gemm(g, x, w, add, more), r.out<void>(c), g.out, write);
            }};
  }

 private:
  SimtOptions options_;
};

}  // namespace

std::unique_ptr<Backend> make_simt_backend(DType compute_type, SimtOptions options) {
  return std::make_unique<SimtBackend>(compute_type, options);
}

}  // namespace ddpm::test
