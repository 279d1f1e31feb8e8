// A device's second stream, on the host: what is put on it runs when the backend's stream waits for
// it, so a sum that nobody waits for is never made.
#pragma once

#include <algorithm>
#include <atomic>
#include <functional>
#include <string>
#include <utility>
#include <vector>

#include "kernels/backend.h"

namespace ddpm::test {

class HostLane final : public Lane {
 public:
  // `stuck_after` marks the device passes none; 0 = never stuck.
  explicit HostLane(int64_t stuck_after) : stuck_after_(stuck_after) {}

  void* stream() const override { return const_cast<HostLane*>(this); }
  void fork() override { events_.push_back("fork"); }
  void join() override {
    events_.push_back("join");
    for (const auto& work : std::exchange(queue_, {})) work();
  }
  void mark() override { ++marked_; }
  int64_t passed() override {
    return stuck_after_ > 0 ? std::min(marked_.load(), stuck_after_) : marked_.load();
  }

  void add(std::string what, std::function<void()> work) {
    events_.push_back(std::move(what));
    queue_.push_back(std::move(work));
  }
  // What was asked of the lane since the last call, in order.
  std::vector<std::string> take_events() { return std::exchange(events_, {}); }

 private:
  int64_t stuck_after_;
  std::atomic<int64_t> marked_{0};
  std::vector<std::string> events_;
  std::vector<std::function<void()>> queue_;
};

}  // namespace ddpm::test
