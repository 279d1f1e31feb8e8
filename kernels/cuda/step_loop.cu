#include "kernels/cuda/step_loop.h"

namespace ddpm::cuda {
namespace {

__device__ bool goes_on(const Global<int64_t>& counter, const Global<int64_t>& control) {
  return counter[kCounterLeft] > 0 && control[kControlStop] == 0;
}

__device__ void count_round(const Global<int64_t>& counter, const Global<int64_t>& control) {
  const int64_t runs = counter[kCounterRuns] + 1;
  counter[kCounterRuns] = runs;
  counter[kCounterLeft] = counter[kCounterLeft] - 1;
  control[kControlRuns] = runs;
  system_fence();
}

}  // namespace

__global__ void begin_loop_kernel(Global<int64_t> counter, int64_t times) {
  if (threadIdx.x == 0) counter[kCounterLeft] = times;
}

__global__ void enter_loop_kernel(GraphCondition again, Global<int64_t> counter,
                                  Global<int64_t> control) {
  if (threadIdx.x == 0) set_condition(again, goes_on(counter, control));
}

__global__ void end_round_kernel(GraphCondition again, Global<int64_t> counter,
                                 Global<int64_t> control) {
  if (threadIdx.x > 0) return;
  count_round(counter, control);
  set_condition(again, goes_on(counter, control));
}

__global__ void count_round_kernel(Global<int64_t> counter, Global<int64_t> control) {
  if (threadIdx.x == 0) count_round(counter, control);
}

}  // namespace ddpm::cuda
