// Ranks over NCCL: one GPU each.
//
// Sums go onto a lane of their own, forked from the computing stream where a bucket is complete and
// joined where the sum is wanted, so that a captured step holds them. Whatever NCCL has not ended
// at once is polled, because the communicator does not block: so nothing waits where a rank is
// lost. A thread watches: errors that NCCL finds by itself, and steps that do not end.
#include <nccl.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <thread>
#include <utility>
#include <vector>

#include "engine/comm.h"

namespace ddpm {
namespace {

using Clock = std::chrono::steady_clock;
using std::chrono::milliseconds;

constexpr auto kPoll = milliseconds(1);
constexpr auto kWatch = milliseconds(100);
constexpr auto kWord = milliseconds(300);         // for `control` to say which rank was lost
constexpr auto kAbort = std::chrono::seconds(5);  // for NCCL to give up

class NcclCommunicator final : public Communicator {
 public:
  NcclCommunicator(Backend& backend, Communicator& control, const CommOptions& options)
      : control_(control),
        rank_(control.rank()),
        size_(control.size()),
        options_(options),
        lane_(backend.make_lane()) {
    ncclUniqueId id{};
    if (rank_ == 0) check(ncclGetUniqueId(&id), "an address to meet at");
    control.broadcast(&id, sizeof id);
    ncclConfig_t config = NCCL_CONFIG_INITIALIZER;
    config.blocking = 0;
    check(ncclCommInitRankConfig(&comm_, size_, id, rank_, &config), "the start of the ranks");
    watch_ = std::thread([this] { watch(); });
  }
  ~NcclCommunicator() override {
    {
      const std::lock_guard lock(mutex_);
      stop_ = true;
    }
    wake_.notify_one();
    watch_.join();
    if (aborted_) return;
    if (ncclResult_t r = ncclCommFinalize(comm_); r == ncclInProgress) settle(r);
    ncclCommDestroy(comm_);
  }
  NcclCommunicator(const NcclCommunicator&) = delete;
  NcclCommunicator& operator=(const NcclCommunicator&) = delete;

  int rank() const override { return rank_; }
  int size() const override { return size_; }
  std::string description() const override {
    return nccl_library() + " and " + control_.description();
  }

  void broadcast(void* data, size_t bytes) override { control_.broadcast(data, bytes); }
  void share(void* all, size_t bytes_each) override { control_.share(all, bytes_each); }

  void start_sum(void* data, DType type, int64_t count) override {
    lane_->fork();
    check(
        ncclAllReduce(data, data, static_cast<size_t>(count),
                      type == DType::kBF16 ? ncclBfloat16 : ncclFloat32, ncclSum, comm_, stream()),
        "a sum");
  }
  void finish_sums() override { lane_->join(); }
  void exchange_slices(const float* data, int64_t count, float* const* parts) override {
    on_lane("an exchange of slices", [&](cudaStream_t lane) {
      return grouped([&](int r) {
        const Slice theirs = slice(count, r), own = slice(count, rank_);
        const ncclResult_t sent =
            ncclSend(data + theirs.begin, theirs.length, ncclFloat32, r, comm_, lane);
        return failed(sent) ? sent : ncclRecv(parts[r], own.length, ncclFloat32, r, comm_, lane);
      });
    });
  }
  void gather_slices(const float* from, float* data, int64_t count) override {
    on_lane("a gathering of slices", [&](cudaStream_t lane) {
      return grouped([&](int r) {
        const Slice theirs = slice(count, r), own = slice(count, rank_);
        const ncclResult_t sent = ncclSend(from, own.length, ncclFloat32, r, comm_, lane);
        return failed(sent)
                   ? sent
                   : ncclRecv(data + theirs.begin, theirs.length, ncclFloat32, r, comm_, lane);
      });
    });
  }
  void share_in_step(void* all, size_t bytes_each) override {
    char* const data = static_cast<char*>(all);
    on_lane("a gathering", [&](cudaStream_t lane) {
      return ncclAllGather(data + static_cast<size_t>(rank_) * bytes_each, data, bytes_each,
                           ncclUint8, comm_, lane);
    });
  }
  void step_asked() override {
    lane_->mark();
    ++marked_;
  }

  std::optional<CommSeconds> seconds() const override { return std::nullopt; }
  void announce_failure(const std::string& what) override { control_.announce_failure(what); }

 private:
  struct Slice {
    int64_t begin;
    size_t length;
  };
  Slice slice(int64_t count, int r) const {
    const int64_t begin = std::min(count, r * slice_of(count));
    return {begin, static_cast<size_t>(std::min(count, begin + slice_of(count)) - begin)};
  }
  cudaStream_t stream() const { return static_cast<cudaStream_t>(lane_->stream()); }
  static bool failed(ncclResult_t r) { return r != ncclSuccess && r != ncclInProgress; }

  template <typename F>
  void on_lane(const char* what, F call) {
    lane_->fork();
    check(call(stream()), what);
    lane_->join();
  }
  // `call` with each rank, as one operation.
  template <typename F>
  ncclResult_t grouped(F call) {
    ncclResult_t first = ncclGroupStart();
    for (int r = 0; r < size_ && !failed(first); ++r) first = call(r);
    const ncclResult_t ended = ncclGroupEnd();
    return failed(first) ? first : ended;
  }
  // NCCL's answer to the operation under way, however long it takes.
  ncclResult_t settle(ncclResult_t r) {
    const Clock::time_point end =
        Clock::now() + std::chrono::duration_cast<Clock::duration>(
                           std::chrono::duration<double>(options_.timeout));
    while (r == ncclInProgress) {
      if (Clock::now() > end)
        lost(
            format("NCCL has not ended what it was asked for within %.0f s; see whether every rank "
                   "has started and can be reached, or give more time by --comm-timeout",
                   options_.timeout));
      std::this_thread::sleep_for(kPoll);
      if (const ncclResult_t asked = ncclCommGetAsyncError(comm_, &r); failed(asked)) return asked;
    }
    return r;
  }
  void check(ncclResult_t r, const char* what) {
    if (r == ncclInProgress) r = settle(r);
    if (r != ncclSuccess) lost(error_text(r, what));
  }
  std::string error_text(ncclResult_t r, const char* what) const {
    const char* last = comm_ == nullptr ? nullptr : ncclGetLastError(comm_);
    return format("NCCL: %s: %s%s%s; %s", what, ncclGetErrorString(r),
                  last != nullptr && *last != '\0' ? ": " : "", last != nullptr ? last : "",
                  options_.advice.c_str());
  }

  void watch() {
    Clock::time_point moved = Clock::now();
    int64_t seen = 0;
    std::unique_lock lock(mutex_);
    while (!wake_.wait_for(lock, kWatch, [&] { return stop_; })) {
      ncclResult_t state = ncclSuccess;
      if (const ncclResult_t asked = ncclCommGetAsyncError(comm_, &state); failed(asked))
        state = asked;
      if (failed(state)) lost(error_text(state, "another rank"));
      const int64_t passed = lane_->passed();
      if (passed != seen || passed == marked_) moved = Clock::now();
      seen = passed;
      if (Clock::now() - moved > std::chrono::duration<double>(options_.timeout))
        lost(
            format("no step has ended for %.0f s, though all ranks are alive: a GPU or the network "
                   "between GPUs is stuck; %s",
                   options_.timeout, options_.advice.c_str()));
    }
  }

  // Said first: NCCL may never give up. Does not come back in a program, whose `leave` ends it.
  [[noreturn]] void lost(const std::string& why) {
    std::this_thread::sleep_for(kWord);
    if (!said_.exchange(true)) options_.say(why);
    abort();
    options_.leave();
    throw Error(Status::kPeer, why);
  }
  void abort() {
    if (aborted_.exchange(true) || comm_ == nullptr) return;
    auto ended = std::make_shared<std::atomic<bool>>(false);
    std::thread([comm = comm_, ended] {
      ncclCommAbort(comm);
      *ended = true;
    }).detach();
    const Clock::time_point end = Clock::now() + kAbort;
    while (!*ended && Clock::now() < end) std::this_thread::sleep_for(kPoll);
  }

  Communicator& control_;
  int rank_, size_;
  CommOptions options_;
  std::unique_ptr<Lane> lane_;
  ncclComm_t comm_ = nullptr;
  std::atomic<int64_t> marked_{0};
  std::atomic<bool> said_{false}, aborted_{false};
  std::mutex mutex_;
  std::condition_variable wake_;
  bool stop_ = false;
  std::thread watch_;  // last: it uses the others
};

}  // namespace

std::unique_ptr<Communicator> make_nccl_communicator(Backend& backend, Communicator& control,
                                                     const CommOptions& options) {
  return std::make_unique<NcclCommunicator>(backend, control, options);
}

std::string nccl_library() {
  int version = 0;
  if (ncclGetVersion(&version) != ncclSuccess) return "NCCL";
  return format("NCCL %d.%d.%d", version / 10000, version / 100 % 100, version % 100);
}

}  // namespace ddpm
