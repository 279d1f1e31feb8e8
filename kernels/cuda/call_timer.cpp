// Only a GPU runs this file; elsewhere it is compiled and no more.
#include "kernels/cuda/call_timer.h"

#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <memory>

#include "kernels/error.h"

namespace ddpm::cuda {
namespace {

void check_cuda(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  fail(status == cudaErrorMemoryAllocation ? Status::kMemory : Status::kDevice,
       "timing of a call: %s: %s", what, cudaGetErrorString(status));
}

struct FreeMemory {
  void operator()(void* p) const { cudaFree(p); }
};
using DeviceMemory = std::unique_ptr<void, FreeMemory>;

DeviceMemory allocate(size_t bytes) {
  void* p = nullptr;
  check_cuda(cudaMalloc(&p, std::max<size_t>(bytes, 1)), "cudaMalloc");
  DeviceMemory memory(p);
  // 0.0115 in bf16 and in fp32: zeros would run faster than data.
  check_cuda(cudaMemset(p, 0x3C, bytes), "cudaMemset");
  return memory;
}

struct Event {
  cudaEvent_t event = nullptr;
  Event() { check_cuda(cudaEventCreate(&event), "cudaEventCreate"); }
  ~Event() { cudaEventDestroy(event); }
  Event(const Event&) = delete;
  Event& operator=(const Event&) = delete;
};

}  // namespace

double time_call(const Call& call, const std::vector<size_t>& bytes) {
  constexpr int kRuns = 5, kRounds = 3;
  std::vector<DeviceMemory> memory;
  std::vector<void*> pointers;
  for (size_t b : bytes) pointers.push_back(memory.emplace_back(allocate(b)).get());
  const DeviceMemory workspace = allocate(call.workspace);
  const Run run{pointers.data(), workspace.get(), nullptr};
  Event before, after;
  call.run(run);  // loads the kernels
  float best = HUGE_VALF;
  for (int round = 0; round < kRounds; ++round) {
    check_cuda(cudaEventRecord(before.event, nullptr), "cudaEventRecord");
    for (int i = 0; i < kRuns; ++i) call.run(run);
    check_cuda(cudaEventRecord(after.event, nullptr), "cudaEventRecord");
    check_cuda(cudaEventSynchronize(after.event), "cudaEventSynchronize");
    float milliseconds = 0;
    check_cuda(cudaEventElapsedTime(&milliseconds, before.event, after.event),
               "cudaEventElapsedTime");
    best = std::min(best, milliseconds);
  }
  return 1e-3 * static_cast<double>(best) / kRuns;
}

}  // namespace ddpm::cuda
