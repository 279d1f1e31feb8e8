#include "kernels/cuda/cuda_device.h"

#include <nvtx3/nvToolsExt.h>

#include <algorithm>
#include <nlohmann/json.hpp>

#include "kernels/cuda/call_timer.h"
#include "kernels/cuda/check.h"
#include "kernels/cuda/conv.h"
#include "kernels/cuda/graph_recording.h"
#include "kernels/cuda/lane.h"

namespace ddpm {
namespace cuda {
namespace {

// Devices that a driver shows; `why` says what is wrong where there is none.
int count_devices(std::string& why) {
  int count = 0;
  const cudaError_t status = cudaGetDeviceCount(&count);
  if (status != cudaSuccess) {
    why = cudaGetErrorString(status);
    return 0;
  }
  if (count == 0) why = "the driver shows none";
  return count;
}

DType type_for(Precision p) {
  return p == Precision::kAuto || p == Precision::kBf16 ? DType::kBF16 : DType::kF32;
}

const char* precision_name(Precision p) {
  switch (p) {
    case Precision::kAuto:
    case Precision::kBf16:
      return "bf16";
    case Precision::kFp32:
      return "fp32";
    case Precision::kTf32:
      return "tf32";
  }
  return "?";
}

cudaStream_t stream_of(void* stream) { return static_cast<cudaStream_t>(stream); }
cudaEvent_t event_of(void* event) { return static_cast<cudaEvent_t>(event); }

void* make_event() {
  cudaEvent_t event = nullptr;
  check(cudaEventCreateWithFlags(&event, cudaEventDisableTiming), "event");
  return event;
}

size_t free_bytes() {
  size_t available = 0, total = 0;
  check(cudaMemGetInfo(&available, &total), "size of the memory");
  return available;
}

// What a block may have; a Hopper's where there is no device to ask, which the constructor reports.
size_t shared_bytes(int device) {
  int bytes = 0;
  const cudaError_t status =
      cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (status == cudaSuccess) return static_cast<size_t>(bytes);
  cudaGetLastError();
  return CudaBackend::kHopperShared;
}

class DeviceMemory final : public Memory {
 public:
  DeviceMemory(int device, size_t bytes, const Allocator& allocator,
               std::shared_ptr<MemoryBudget> budget)
      : device_(device), bytes_(bytes), allocator_(allocator), budget_(std::move(budget)) {
    cudaError_t status = cudaErrorMemoryAllocation;
    if (bytes <= budget_->left(bytes)) status = take();
    if (status == cudaErrorMemoryAllocation) {
      cudaGetLastError();  // it is reported here
      fail(Status::kMemory,
           "out of device memory: %.2f GiB asked for at once, %.2f GiB are free; use a smaller "
           "--batch-size",
           gib(bytes), gib(budget_->left(free_bytes())));
    }
    check(status, "allocation");
    budget_->take(bytes);
  }
  ~DeviceMemory() override {
    budget_->give_back(bytes_);
    cudaSetDevice(device_);
    if (allocator_)
      allocator_.release(data_, asked());
    else
      cudaFree(data_);
  }
  DeviceMemory(const DeviceMemory&) = delete;
  DeviceMemory& operator=(const DeviceMemory&) = delete;
  void* data() const override { return data_; }
  size_t size() const override { return bytes_; }

 private:
  size_t asked() const { return std::max(bytes_, size_t{1}); }  // no address is null
  cudaError_t take() {
    if (!allocator_) return cudaMalloc(&data_, asked());
    data_ = allocator_.allocate(asked());
    return data_ == nullptr ? cudaErrorMemoryAllocation : cudaSuccess;
  }
  static double gib(size_t bytes) { return static_cast<double>(bytes) / (size_t{1} << 30); }

  int device_;
  size_t bytes_;
  Allocator allocator_;
  std::shared_ptr<MemoryBudget> budget_;
  void* data_ = nullptr;
};

// Bytes of the host that kernels read where they are.
class PinnedBytes final : public Memory {
 public:
  explicit PinnedBytes(std::vector<uint8_t> bytes) : bytes_(std::move(bytes)) {
    check(cudaHostRegister(bytes_.data(), bytes_.size(), cudaHostRegisterMapped),
          "pinning of the data set in the host's memory");
    const cudaError_t status = cudaHostGetDevicePointer(&data_, bytes_.data(), 0);
    if (status != cudaSuccess) cudaHostUnregister(bytes_.data());
    check(status, "the device's view of the host's memory");
  }
  ~PinnedBytes() override { cudaHostUnregister(bytes_.data()); }
  PinnedBytes(const PinnedBytes&) = delete;
  PinnedBytes& operator=(const PinnedBytes&) = delete;
  void* data() const override { return data_; }
  size_t size() const override { return bytes_.size(); }
  bool on_host() const override { return true; }

 private:
  std::vector<uint8_t> bytes_;
  void* data_ = nullptr;
};

}  // namespace

CudaDevice::CudaDevice(const BackendOptions& options, int device)
    : CudaBackend(type_for(options.precision), shared_bytes(device)),
      options_(options),
      device_(device),
      budget_(std::make_shared<MemoryBudget>(options.memory_budget)) {
  std::string why;
  const int count = count_devices(why);
  if (count == 0)
    fail(Status::kDevice,
         "no CUDA device: %s; install an NVIDIA driver for CUDA 13 (580 or later) or use --device "
         "cpu",
         why.c_str());
  if (device < 0 || device >= count)
    fail(Status::kDevice, "no CUDA device %d: there %s %d, from 0", device,
         count == 1 ? "is" : "are", count);
  cudaDeviceProp properties{};
  check(cudaGetDeviceProperties(&properties, device), "properties of the device");
  chip_ = format("%s (sm_%d%d)", properties.name, properties.major, properties.minor);
  if (properties.major < 8)
    fail(Status::kDevice,
         "%s: this program needs compute capability 8.0 or later; use --device cpu", chip_.c_str());
  if (options.wgmma && (properties.major != 9 || properties.minor != 0))
    fail(Status::kDevice, "%s: convolutions by wgmma need compute capability 9.0", chip_.c_str());
  use();
  cudaStream_t stream = nullptr;
  check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "stream");
  stream_ = stream;
  entered_ = make_event();
  left_ = make_event();
  cublas_ = std::make_unique<CublasLt>(
      CublasLtOptions{options.precision == Precision::kTf32, options.batch_invariant});
  CudnnConvOptions conv;
  conv.compute_type = compute_type();
  conv.exact_fp32 = options.precision == Precision::kFp32;
  conv.budget = std::make_shared<TuningBudget>(60);
  conv.device = chip_;
  cudnn_ = std::make_unique<CudnnConvolutions>(CudnnTarget::current_device(), conv);
  ConvChoiceOptions choice;
  choice.precision = precision_name(options.precision);
  choice.library = cudnn_->table().library;
  choice.shared_bytes = block_shared_bytes();
  if (options.wgmma) {
    choice.precision += " wgmma";  // other times, so other choices
    choice.wgmma_blocks = properties.multiProcessorCount;
  }
  choice.batch_invariant = options.batch_invariant;
  choice.timer = time_call;
  choice.budget = conv.budget;
  choice_ = std::make_unique<ConvChoice>(*this, *cudnn_, choice);
}

CudaDevice::~CudaDevice() {
  for (void* event : {entered_, left_})
    if (event != nullptr) cudaEventDestroy(event_of(event));
  if (stream_ != nullptr) cudaStreamDestroy(stream_of(stream_));
}

void CudaDevice::use() const { check(cudaSetDevice(device_), "choice of the device"); }

std::string CudaDevice::description() const {
  int driver = 0;
  cudaDriverGetVersion(&driver);
  return format("%s, driver for CUDA %d.%d, %s", chip_.c_str(), driver / 1000, driver % 1000 / 10,
                precision_name(options_.precision));
}

std::string CudaDevice::numerics() const {
  return format("cuda %s precision=%s batch_invariant=%d%s %s", chip_.c_str(),
                precision_name(options_.precision), options_.batch_invariant ? 1 : 0,
                options_.wgmma ? " wgmma" : "", cuda_libraries().c_str());
}

std::string CudaDevice::plans() const {
  PlanTable all = cudnn_->table();
  all.choices.insert(choice_->table().choices.begin(), choice_->table().choices.end());
  return to_json(all).dump();
}

void CudaDevice::use_plans(const std::string& text) {
  const PlanTable given =
      plan_table_from_json(nlohmann::json::parse(text, nullptr, false), "plans");
  cudnn_->use(given);
  choice_->use(given);
}

bool CudaDevice::plans_kept() const { return cudnn_->replaced() + choice_->replaced() == 0; }

std::unique_ptr<Memory> CudaDevice::allocate(size_t bytes) {
  use();
  auto memory = std::make_unique<DeviceMemory>(device_, bytes, options_.allocator, budget_);
  fill(memory->data(), 0, bytes);
  return memory;
}

std::unique_ptr<Memory> CudaDevice::hold(std::vector<uint8_t> bytes, size_t reserve) {
  const size_t available = available_bytes();
  if (available < reserve || available - reserve < bytes.size())
    return std::make_unique<PinnedBytes>(std::move(bytes));
  auto memory = allocate(bytes.size());
  upload(memory->data(), bytes.data(), bytes.size());
  return memory;
}

size_t CudaDevice::available_bytes() const {
  use();
  return budget_->left(free_bytes());
}

void CudaDevice::upload(void* device, const void* host, size_t bytes) {
  use();
  check(cudaMemcpyAsync(device, host, bytes, cudaMemcpyHostToDevice, stream_of(stream_)), "upload");
  synchronize();  // the host's memory is the caller's again
}

void CudaDevice::download(void* host, const void* device, size_t bytes) {
  use();
  check(cudaMemcpyAsync(host, device, bytes, cudaMemcpyDeviceToHost, stream_of(stream_)),
        "download");
  synchronize();
}

void CudaDevice::fill(void* device, uint8_t byte, size_t bytes) {
  use();
  check(cudaMemsetAsync(device, byte, bytes, stream_of(stream_)), "fill");
}

void CudaDevice::transfer(void* to, const void* from, size_t bytes) {
  use();
  check(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToDevice, stream_of(stream_)), "transfer");
}

void CudaDevice::enter(void* callers_stream) {
  check(cudaGetDevice(&callers_device_), "the current device");
  use();
  if (callers_stream == nullptr) return;
  cudaStreamCaptureStatus capture = cudaStreamCaptureStatusNone;
  check(cudaStreamIsCapturing(stream_of(callers_stream), &capture), "look at the stream");
  if (capture != cudaStreamCaptureStatusNone) {
    cudaSetDevice(callers_device_);
    fail(Status::kUsage, "stream: it is being captured; end the capture first");
  }
  check(cudaEventRecord(event_of(entered_), stream_of(callers_stream)), "event");
  check(cudaStreamWaitEvent(stream_of(stream_), event_of(entered_), 0), "wait for an event");
}

void CudaDevice::leave(void* callers_stream) {
  if (callers_stream == nullptr) {
    synchronize();
  } else {
    check(cudaEventRecord(event_of(left_), stream_of(stream_)), "event");
    check(cudaStreamWaitEvent(stream_of(callers_stream), event_of(left_), 0), "wait for an event");
  }
  check(cudaSetDevice(callers_device_), "choice of the device");
}

void CudaDevice::synchronize() { check(cudaStreamSynchronize(stream_of(stream_)), "a kernel"); }

void CudaDevice::begin_range(const char* name) { nvtxRangePushA(name); }
void CudaDevice::end_range() { nvtxRangePop(); }

std::unique_ptr<Recording> CudaDevice::record(const std::function<void()>& calls) {
  use();
  return record_graph(stream_, calls);
}

std::unique_ptr<Lane> CudaDevice::make_lane() {
  use();
  return make_cuda_lane(stream_);
}

Call CudaDevice::conv_pack(const ConvDesc&, ConvPass, In, Out) {
  fail(Status::kBug, "CUDA packs no filters");
}

std::optional<Call> CudaDevice::conv_forward(const ConvDesc& d, const ConvSlots& s, Out y,
                                             Out statistics) {
  return choice_->forward(d, s, y, statistics);
}

std::optional<Call> CudaDevice::conv_dgrad(const ConvDesc& d, const ConvSlots& s, In dy, Out dx,
                                           Write write) {
  return choice_->dgrad(d, s, dy, dx, write);
}

std::optional<Call> CudaDevice::conv_dgrad_norm(const ConvDesc& d, const ConvSlots& s,
                                                const GroupNormDesc& norm, In mean_rstd, In dy,
                                                Out dz, Out sums) {
  return choice_->dgrad_norm(d, s, norm, mean_rstd, dy, dz, sums);
}

std::optional<Call> CudaDevice::conv_wgrad(const ConvDesc& d, const ConvSlots& s, In dy,
                                           Out dfilter, Write write) {
  return choice_->wgrad(d, s, dy, dfilter, write);
}

std::optional<Call> CudaDevice::conv_wgrad_sums(const ConvDesc& d, const ConvSlots& s, In dy,
                                                Out dfilter, Write write, Out sums, int stride,
                                                int offset) {
  return choice_->wgrad_sums(d, s, dy, dfilter, write, sums, stride, offset);
}

Call CudaDevice::gemm(const GemmDesc& g, In a, In b, In bias, In residual, Out c, Write write) {
  return cublas_->gemm(g, a, b, bias, residual, c, write);
}

}  // namespace cuda

std::unique_ptr<Backend> make_cuda_backend(const BackendOptions& options, int device) {
  int callers = 0;
  const bool known = cudaGetDevice(&callers) == cudaSuccess;
  auto backend = std::make_unique<cuda::CudaDevice>(options, device);
  if (known) cudaSetDevice(callers);
  return backend;
}

int cuda_device_count() {
  std::string why;
  return cuda::count_devices(why);
}

std::string cuda_libraries() {
  int runtime = 0;
  cudaRuntimeGetVersion(&runtime);
  const size_t cublas = cublasLtGetVersion();
  return format("CUDA %d.%d, cuBLASLt %zu.%zu.%zu, cuDNN %s", runtime / 1000, runtime % 1000 / 10,
                cublas / 10000, cublas / 100 % 100, cublas % 100, cuda::cudnn_version().c_str());
}

}  // namespace ddpm
