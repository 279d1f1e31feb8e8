// Only a GPU runs this file; elsewhere it is compiled and no more.
#include "kernels/cuda/graph_recording.h"

#include <cuda_runtime.h>

#include <type_traits>

#include "kernels/cuda/check.h"
#include "kernels/cuda/step_loop.h"

namespace ddpm::cuda {
namespace {

struct Destroy {
  void operator()(cudaGraph_t graph) const { cudaGraphDestroy(graph); }
  void operator()(cudaGraphExec_t graph) const { cudaGraphExecDestroy(graph); }
};
struct Free {
  void operator()(int64_t* p) const { cudaFree(p); }
};
struct FreeHost {
  void operator()(int64_t* p) const { cudaFreeHost(p); }
};
template <typename T>
using Owned = std::unique_ptr<std::remove_pointer_t<T>, Destroy>;

Owned<cudaGraph_t> capture(cudaStream_t stream, const std::function<void()>& calls) {
  check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal), "begin of a capture");
  cudaGraph_t graph = nullptr;
  try {
    calls();
  } catch (...) {
    cudaStreamEndCapture(stream, &graph);
    Owned<cudaGraph_t>{graph};
    throw;
  }
  check(cudaStreamEndCapture(stream, &graph), "end of a capture");
  return Owned<cudaGraph_t>(graph);
}

Owned<cudaGraphExec_t> instantiate(cudaGraph_t graph) {
  cudaGraphExec_t exec = nullptr;
  check(cudaGraphInstantiate(&exec, graph, 0), "instantiation of a graph");
  return Owned<cudaGraphExec_t>(exec);
}

// A node that runs a kernel of one warp behind `after`, if that is given.
template <typename... Parameters>
cudaGraphNode_t add_kernel(cudaGraph_t graph, cudaGraphNode_t after, void (*kernel)(Parameters...),
                           Parameters... values) {
  void* arguments[] = {&values...};
  cudaKernelNodeParams p{};
  p.func = reinterpret_cast<void*>(kernel);
  p.gridDim = dim3(1);
  p.blockDim = dim3(32);
  p.kernelParams = arguments;
  cudaGraphNode_t node = nullptr;
  check(cudaGraphAddKernelNode(&node, graph, &after, after != nullptr ? 1 : 0, &p),
        "a graph's kernel");
  return node;
}

class GraphRecording final : public Recording {
 public:
  GraphRecording(cudaStream_t stream, const std::function<void()>& calls)
      : stream_(stream), step_(capture(stream, calls)) {}

  void launch() override {
    if (!once_) once_ = instantiate(step_.get());
    check(cudaGraphLaunch(once_.get(), stream_), "launch of a graph");
  }

  void launch_loop(int times) override {
    if (!control_) make_loop();
    cuda::launch<begin_loop_kernel>({.block = 32}, stream_, counter_.get(), times);
    if (loop_) {
      check(cudaGraphLaunch(loop_.get(), stream_), "launch of a loop");
      return;
    }
    for (int i = 0; i < times; ++i) {
      launch();
      cuda::launch<count_round_kernel>({.block = 32}, stream_, counter_.get(), control_on_device_);
    }
  }

  int64_t loop_runs() const override {
    const cudaError_t status = cudaStreamQuery(stream_);
    if (status != cudaErrorNotReady) check(status, "a loop of steps");
    return control_ ? at(kControlRuns) : 0;
  }

  void stop_loops() override {
    if (!control_) return;
    at(kControlStop) = 1;
    check(cudaStreamSynchronize(stream_), "the end of a loop");
    at(kControlStop) = 0;
  }

 private:
  void make_loop();
  // The device reads and writes it meanwhile.
  volatile int64_t& at(int word) const { return control_.get()[word]; }

  cudaStream_t stream_;
  Owned<cudaGraph_t> step_;
  Owned<cudaGraphExec_t> once_, loop_;  // loop_ is absent where the driver cannot have it
  std::unique_ptr<int64_t, FreeHost> control_;
  int64_t* control_on_device_ = nullptr;
  std::unique_ptr<int64_t, Free> counter_;
};

void GraphRecording::make_loop() {
  constexpr size_t kBytes = 2 * sizeof(int64_t);
  int64_t* counter = nullptr;
  check(cudaMalloc(&counter, kBytes), "counter of a loop");
  counter_.reset(counter);
  check(cudaMemsetAsync(counter, 0, kBytes, stream_), "counter of a loop");
  void* control = nullptr;
  check(cudaHostAlloc(&control, kBytes, cudaHostAllocMapped), "control of a loop");
  control_.reset(new (control) int64_t[2]{0, 0});
  void* on_device = nullptr;
  check(cudaHostGetDevicePointer(&on_device, control, 0), "control of a loop");
  control_on_device_ = static_cast<int64_t*>(on_device);

  cudaGraph_t graph = nullptr;
  check(cudaGraphCreate(&graph, 0), "graph of a loop");
  const Owned<cudaGraph_t> owner(graph);
  cudaGraphConditionalHandle again{};
  check(cudaGraphConditionalHandleCreate(&again, graph, 0, 0), "condition of a loop");
  cudaGraphNode_t enter =
      add_kernel(graph, nullptr, enter_loop_kernel, again, counter, control_on_device_);
  cudaGraphNodeParams loop{};
  loop.type = cudaGraphNodeTypeConditional;
  loop.conditional.handle = again;
  loop.conditional.type = cudaGraphCondTypeWhile;
  loop.conditional.size = 1;
  cudaGraphNode_t node = nullptr, round = nullptr;
  check(cudaGraphAddNode(&node, graph, &enter, nullptr, 1, &loop), "WHILE node");
  const cudaGraph_t body = loop.conditional.phGraph_out[0];
  check(cudaGraphAddChildGraphNode(&round, body, nullptr, 0, step_.get()), "body of a loop");
  add_kernel(body, round, end_round_kernel, again, counter, control_on_device_);

  cudaGraphExec_t exec = nullptr;
  if (cudaGraphInstantiate(&exec, graph, 0) == cudaSuccess)
    loop_.reset(exec);
  else
    cudaGetLastError();  // then every step is a launch of its own
}

}  // namespace

std::unique_ptr<Recording> record_graph(void* stream, const std::function<void()>& calls) {
  return std::make_unique<GraphRecording>(static_cast<cudaStream_t>(stream), calls);
}

}  // namespace ddpm::cuda
