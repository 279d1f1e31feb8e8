#include "kernels/cpu/cpu_backend.h"

#include <omp.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <utility>

#include <hwy/highway.h>

#include "kernels/cpu/onednn.h"
#include "kernels/host_memory.h"

namespace ddpm {
namespace cpu {
namespace {

// Zero and aligned; from calloc, so that pages are not there until they are touched, and so that
// AddressSanitizer watches their ends.
class HostMemory final : public Memory {
 public:
  HostMemory(size_t bytes, std::shared_ptr<MemoryBudget> budget)
      : size_(bytes), budget_(std::move(budget)) {
    if (bytes <= budget_->left(bytes)) block_ = std::calloc(bytes + kAlignment, 1);
    if (block_ == nullptr)
      fail(Status::kMemory, "out of memory: %zu bytes asked for; use a smaller --batch-size",
           bytes);
    budget_->take(bytes);
    size_t space = bytes + kAlignment;
    data_ = block_;
    std::align(kAlignment, bytes, data_, space);
  }
  ~HostMemory() override {
    budget_->give_back(size_);
    std::free(block_);
  }
  HostMemory(const HostMemory&) = delete;
  HostMemory& operator=(const HostMemory&) = delete;
  void* data() const override { return data_; }
  size_t size() const override { return size_; }

 private:
  static constexpr size_t kAlignment = 64;
  size_t size_;
  std::shared_ptr<MemoryBudget> budget_;
  void* block_ = nullptr;
  void* data_;
};

// A program's own, zeroed.
class ForeignMemory final : public Memory {
 public:
  ForeignMemory(size_t bytes, const Allocator& allocator, std::shared_ptr<MemoryBudget> budget)
      : size_(bytes), allocator_(allocator), budget_(std::move(budget)) {
    if (bytes <= budget_->left(bytes)) data_ = allocator_.allocate(std::max(bytes, size_t{1}));
    if (data_ == nullptr)
      fail(Status::kMemory, "out of memory: %zu bytes asked of the program's allocator", bytes);
    budget_->take(bytes);
    std::memset(data_, 0, bytes);
  }
  ~ForeignMemory() override {
    budget_->give_back(size_);
    allocator_.release(data_, std::max(size_, size_t{1}));
  }
  ForeignMemory(const ForeignMemory&) = delete;
  ForeignMemory& operator=(const ForeignMemory&) = delete;
  void* data() const override { return data_; }
  size_t size() const override { return size_; }

 private:
  size_t size_;
  Allocator allocator_;
  std::shared_ptr<MemoryBudget> budget_;
  void* data_ = nullptr;
};

class HeldBytes final : public Memory {
 public:
  explicit HeldBytes(std::vector<uint8_t> bytes) : bytes_(std::move(bytes)) {}
  void* data() const override { return const_cast<uint8_t*>(bytes_.data()); }
  size_t size() const override { return bytes_.size(); }

 private:
  std::vector<uint8_t> bytes_;
};

const char* instruction_set() {
  const int64_t targets = hwy::SupportedTargets();
  if (targets & HWY_AVX3) return "AVX-512";
  if (targets & HWY_AVX2) return "AVX2";
  return "no vectors";
}

const char* precision_name(Precision p) { return p == Precision::kFp32 ? "fp32" : "auto"; }

}  // namespace

CpuBackend::CpuBackend(const BackendOptions& options)
    : options_(options),
      threads_(options.threads > 0 ? options.threads : omp_get_num_procs()),
      budget_(std::make_shared<MemoryBudget>(options.memory_budget)) {
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
  if (options_.allocator)
    return std::make_unique<ForeignMemory>(bytes, options_.allocator, budget_);
  return std::make_unique<HostMemory>(bytes, budget_);
}
std::unique_ptr<Memory> CpuBackend::hold(std::vector<uint8_t> bytes, size_t) {
  return std::make_unique<HeldBytes>(std::move(bytes));
}
size_t CpuBackend::available_bytes() const { return budget_->left(available_host_memory()); }
void CpuBackend::upload(void* device, const void* host, size_t bytes) {
  std::memcpy(device, host, bytes);
}
void CpuBackend::download(void* host, const void* device, size_t bytes) {
  std::memcpy(host, device, bytes);
}
void CpuBackend::fill(void* device, uint8_t byte, size_t bytes) {
  std::memset(device, byte, bytes);
}
void CpuBackend::transfer(void* to, const void* from, size_t bytes) {
  std::memcpy(to, from, bytes);
}
void CpuBackend::discard(void* device, size_t bytes) {
  if (options_.allocator) return;  // its pages are not ours to give back
  constexpr uintptr_t kPage = 4096;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(device) + kPage - 1) / kPage * kPage;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(device) + bytes) / kPage * kPage;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_DONTNEED);
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
