#include "kernels/cuda/lane.h"

#include <array>
#include <mutex>

#include "kernels/cuda/check.h"

namespace ddpm::cuda {
namespace {

constexpr size_t kMarks = 64;  // of the steps that the host may be ahead

class Event {
 public:
  Event() { check(cudaEventCreateWithFlags(&event_, cudaEventDisableTiming), "event"); }
  ~Event() { cudaEventDestroy(event_); }
  Event(const Event&) = delete;
  Event& operator=(const Event&) = delete;
  operator cudaEvent_t() const { return event_; }

 private:
  cudaEvent_t event_ = nullptr;
};

class CudaLane final : public Lane {
 public:
  explicit CudaLane(cudaStream_t main) : main_(main) {
    int least = 0, greatest = 0;
    check(cudaDeviceGetStreamPriorityRange(&least, &greatest), "priorities of streams");
    // Ahead of what is computed: the sooner a message is under way, the more of it is hidden.
    check(cudaStreamCreateWithPriority(&lane_, cudaStreamNonBlocking, greatest), "stream");
  }
  ~CudaLane() override { cudaStreamDestroy(lane_); }
  CudaLane(const CudaLane&) = delete;
  CudaLane& operator=(const CudaLane&) = delete;

  void* stream() const override { return lane_; }
  void fork() override { order(forked_, main_, lane_); }
  void join() override { order(joined_, lane_, main_); }

  void mark() override {
    const std::lock_guard lock(mutex_);
    const Event& event = marks_[static_cast<size_t>(marked_) % kMarks];
    if (marked_ - passed_ == static_cast<int64_t>(kMarks)) {
      check(cudaEventSynchronize(event), "a step");
      ++passed_;
    }
    check(cudaEventRecord(event, main_), "event");
    ++marked_;
  }
  int64_t passed() override {
    const std::unique_lock lock(mutex_, std::try_to_lock);
    if (!lock.owns_lock()) return known_;  // mark() waits: for the mark after this one
    while (passed_ < marked_ &&
           cudaEventQuery(marks_[static_cast<size_t>(passed_) % kMarks]) == cudaSuccess)
      ++passed_;
    cudaGetLastError();  // "not ready" is none
    return known_ = passed_;
  }

 private:
  static void order(const Event& event, cudaStream_t first, cudaStream_t then) {
    check(cudaEventRecord(event, first), "event");
    check(cudaStreamWaitEvent(then, event, 0), "wait for an event");
  }

  cudaStream_t main_, lane_ = nullptr;
  Event forked_, joined_;
  std::array<Event, kMarks> marks_;
  std::mutex mutex_;
  int64_t marked_ = 0, passed_ = 0;
  int64_t known_ = 0;  // to the one thread that asks
};

}  // namespace

std::unique_ptr<Lane> make_cuda_lane(void* stream) {
  return std::make_unique<CudaLane>(static_cast<cudaStream_t>(stream));
}

}  // namespace ddpm::cuda
