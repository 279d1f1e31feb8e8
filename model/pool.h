// Continuous batching for ddpm_pool: a queue of requests and the thread that steps their images.
#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <list>
#include <optional>
#include <thread>

#include "model/c_api.h"
#include "model/mixed_batch.h"

namespace ddpm::c {

// What a ticket stands for.
struct Request {
  using Clock = std::chrono::steady_clock;

  // What was asked for.
  std::vector<SamplerRow> rows;
  float guidance = 1;
  uint64_t seed = 0, first = 0;
  size_t n = 0;
  std::vector<uint64_t> seeds;
  std::vector<int32_t> labels;
  std::vector<float> x_T;
  uint8_t* bytes = nullptr;
  float* floats = nullptr;
  bool on_device = false;
  std::optional<Clock::time_point> deadline;
  ddpm_done_callback done = nullptr;
  void* user = nullptr;
  std::atomic<bool> cancelled{false};

  // The worker's: images that have got a place, and that are whole.
  size_t started = 0, finished = 0;

  // How it ended; read under the pool's lock once `ended` is set.
  ddpm_status status = DDPM_OK;
  ErrorText error;
  bool ended = false;
  std::condition_variable has_ended;
};

class Pool {
 public:
  // guidance: of requests that give none; absent: not guided.
  Pool(std::shared_ptr<const Core> core, int batch_size, size_t queue_size,
       std::optional<float> guidance);
  ~Pool() { stop(); }
  Pool(const Pool&) = delete;
  Pool& operator=(const Pool&) = delete;

  const Core& core() const { return *core_; }
  const Schedule& schedule() const { return schedule_; }
  std::optional<float> guidance() const { return guidance_; }
  ddpm_pool_info info();
  // Before the request can end, taken() is called.
  template <typename Taken>
  void submit(const std::shared_ptr<Request>& request, const Taken& taken) {
    std::list<std::shared_ptr<Request>> one{request};
    const std::lock_guard<std::mutex> lock(mutex_);
    check_room(*request);
    taken();
    ++open_;
    waiting_ += request->n;
    queue_.splice(queue_.end(), one);
    work_.notify_one();
  }
  void wait(Request& request);
  bool ended(const Request& request);
  // Whether this is a callback: what waits there would wait for itself.
  bool in_callback() const { return std::this_thread::get_id() == worker_.get_id(); }
  void drain();
  // Ends all requests and the thread, and gives memory back; calls after it find a drained pool.
  void stop();

 private:
  using Lock = std::unique_lock<std::mutex>;

  void build(int batch_size);
  void check_room(const Request& request) const;
  void work();
  bool prepare();
  bool end_one(Lock& lock);
  void end(Lock& lock, const std::shared_ptr<Request>& request, Status status, const char* error);
  void fill_places();
  void step();
  void join_batch();
  void deliver();
  void count_step(ddpm_status status, const char* error);

  std::shared_ptr<const Core> core_;
  Schedule schedule_;
  std::optional<float> guidance_;
  size_t queue_size_, image_size_ = 0, device_bytes_ = 0;
  Device device_;
  std::unique_ptr<ParamStore> store_;
  std::unique_ptr<MixedBatch> batch_;

  std::mutex mutex_;  // of what follows; the worker gives it up while it steps and calls back
  std::condition_variable work_, idle_;
  std::list<std::shared_ptr<Request>> queue_;  // those with images that wait, next one first
  size_t waiting_ = 0;                         // images in queue_
  size_t running_ = 0;                         // places that are taken
  size_t open_ = 0;                            // requests that have not ended
  uint64_t images_ = 0, steps_ = 0;
  bool draining_ = false, stopping_ = false;

  // The worker's: who has a place, and with which of its images.
  struct Place {
    std::shared_ptr<Request> request;
    size_t image = 0;
    bool fresh = false;  // it has not had a step
    bool bad = false;    // it has ended, and is not finite
  };
  std::vector<Place> places_;
  std::thread worker_;
};

}  // namespace ddpm::c
