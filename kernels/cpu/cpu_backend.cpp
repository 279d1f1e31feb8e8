#include "kernels/cpu/cpu_backend.h"

#include <sched.h>

#include <cstdlib>
#include <cstring>

#include <hwy/highway.h>

#include "kernels/cpu/onednn.h"

namespace ddpm {
namespace cpu {
namespace {

class HostMemory final : public Memory {
 public:
  explicit HostMemory(size_t bytes) : size_(bytes) {
    const size_t rounded = (bytes + 63) / 64 * 64;
    data_ = std::aligned_alloc(64, rounded > 0 ? rounded : 64);
    if (data_ == nullptr)
      fail(Status::kMemory, "out of memory: %zu bytes asked for; use a smaller --batch-size",
           bytes);
    std::memset(data_, 0, rounded);
  }
  ~HostMemory() override { std::free(data_); }
  HostMemory(const HostMemory&) = delete;
  HostMemory& operator=(const HostMemory&) = delete;
  void* data() const override { return data_; }
  size_t size() const override { return size_; }

 private:
  void* data_;
  size_t size_;
};

// The processors this process may run on, which in a container are fewer than the machine's.
int usable_processors() {
  cpu_set_t set;
  CPU_ZERO(&set);
  if (sched_getaffinity(0, sizeof(set), &set) != 0) return 1;
  return CPU_COUNT(&set) > 0 ? CPU_COUNT(&set) : 1;
}

const char* instruction_set() {
  const int64_t targets = hwy::SupportedTargets();
  if (targets & HWY_AVX3) return "AVX-512";
  if (targets & HWY_AVX2) return "AVX2";
  return "no vectors";
}

const char* precision_name(Precision p) { return p == Precision::kFp32 ? "fp32" : "auto"; }

}  // namespace

CpuBackend::CpuBackend(const BackendOptions& options)
    : options_(options), threads_(options.threads > 0 ? options.threads : usable_processors()) {
  if (options.precision == Precision::kTf32 || options.precision == Precision::kBf16)
    fail(Status::kUsage, "--precision %s is for CUDA; the CPU computes in fp32: use auto or fp32",
         options.precision == Precision::kTf32 ? "tf32" : "bf16");
  dnn_ = std::make_unique<OneDnn>(threads_);
}

CpuBackend::~CpuBackend() = default;

std::string CpuBackend::description() const {
  return format("CPU, %d thread%s, %s", threads_, threads_ == 1 ? "" : "s", instruction_set());
}

std::string CpuBackend::numerics() const {
  return format("cpu %s precision=%s threads=%d batch_invariant=%d", instruction_set(),
                precision_name(options_.precision), threads_, options_.batch_invariant ? 1 : 0);
}

std::unique_ptr<Memory> CpuBackend::allocate(size_t bytes) {
  return std::make_unique<HostMemory>(bytes);
}
void CpuBackend::upload(void* device, const void* host, size_t bytes) {
  std::memcpy(device, host, bytes);
}
void CpuBackend::download(void* host, const void* device, size_t bytes) {
  std::memcpy(host, device, bytes);
}
void CpuBackend::fill(void* device, uint8_t byte, size_t bytes) {
  std::memset(device, byte, bytes);
}

}  // namespace cpu

std::unique_ptr<Backend> make_cpu_backend(const BackendOptions& options) {
  return std::make_unique<cpu::CpuBackend>(options);
}

std::string cpu_libraries() {
  return format("%s, Highway %d.%d.%d", cpu::onednn_version().c_str(), HWY_MAJOR, HWY_MINOR,
                HWY_PATCH);
}

}  // namespace ddpm
