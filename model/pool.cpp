#include "model/pool.h"

#include <pthread.h>
#include <signal.h>

#include <algorithm>
#include <system_error>
#include <utility>

namespace ddpm::c {
namespace {

// Signals are for the threads of the program, which may have handlers; a new thread inherits what
// is blocked.
class WithoutSignals {
 public:
  WithoutSignals() {
    sigset_t all;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before_);
  }
  ~WithoutSignals() { pthread_sigmask(SIG_SETMASK, &before_, nullptr); }
  WithoutSignals(const WithoutSignals&) = delete;
  WithoutSignals& operator=(const WithoutSignals&) = delete;

 private:
  sigset_t before_;
};

}  // namespace

Pool::Pool(std::shared_ptr<const Core> core, int batch_size, size_t queue_size,
           std::optional<float> guidance)
    : core_(std::move(core)),
      schedule_(core_->pipeline.scheduler),
      guidance_(guidance),
      queue_size_(queue_size) {
  device_.backend = open_backend(core_->options);
  places_.resize(static_cast<size_t>(batch_size));
  in_turn(device_, nullptr, [&] {
    try {
      build(batch_size);
    } catch (...) {
      batch_.reset();
      store_.reset();
      throw;
    }
  });
  try {
    const WithoutSignals mask;
    worker_ = std::thread([this] { work(); });
  } catch (const std::system_error& e) {
    stop();
    fail(Status::kMemory, "the pool's thread does not start: error %d", e.code().value());
  } catch (...) {
    stop();
    throw;
  }
}

void Pool::build(int batch_size) {
  Backend& backend = *device_.backend;
  const auto load = [&](const Params& params) {
    store_ = load_store(backend, core_->weights, params);
    return store_->arenas();
  };
  batch_ = std::make_unique<MixedBatch>(backend, core_->unet(), core_->pipeline.scheduler,
                                        batch_size, load, guidance_.has_value());
  image_size_ = batch_->image_size();
  device_bytes_ = batch_->bytes() + store_->bytes();
  core_->say(format("pool of %d images%s, %.1f MB", batch_size, guidance_ ? ", guided" : "",
                    static_cast<double>(device_bytes_) / 1e6));
}

void Pool::stop() {
  {
    const Lock lock(mutex_);
    draining_ = stopping_ = true;
    work_.notify_one();
  }
  if (worker_.joinable()) worker_.join();
  (void)guarded(nullptr, [&] {
    in_turn(device_, nullptr, [&] {
      device_.backend->synchronize();
      batch_.reset();
      store_.reset();
    });
  });
}

ddpm_pool_info Pool::info() {
  const Lock lock(mutex_);
  return {.struct_size = sizeof(ddpm_pool_info),
          .batch_size = static_cast<int32_t>(places_.size()),
          .queue_size = queue_size_,
          .running = running_,
          .waiting = waiting_,
          .images = images_,
          .steps = steps_,
          .image_size = image_size_,
          .device_bytes = device_bytes_};
}

void Pool::check_room(const Request& request) const {
  if (draining_) fail(Status::kStopped, "the pool takes no more requests");
  if (request.n > queue_size_ - waiting_)
    fail(Status::kFull, "%zu of %zu images wait already, %zu more have no room now", waiting_,
         queue_size_, request.n);
}

void Pool::wait(Request& request) {
  require(!in_callback(), "a callback must not wait for requests");
  Lock lock(mutex_);
  request.has_ended.wait(lock, [&] { return request.ended; });
}

bool Pool::ended(const Request& request) {
  const Lock lock(mutex_);
  return request.ended;
}

void Pool::drain() {
  require(!in_callback(), "a callback must not drain its pool");
  Lock lock(mutex_);
  draining_ = true;
  work_.notify_one();
  idle_.wait(lock, [&] { return open_ == 0; });
}

void Pool::work() {
  while (prepare()) step();
}

// Ends requests and gives places to images, until there is something to step; false: no more.
bool Pool::prepare() {
  Lock lock(mutex_);
  for (;;) {
    while (end_one(lock)) {
    }
    fill_places();
    if (running_ > 0) return true;
    if (stopping_) return false;
    work_.wait(lock);
  }
}

// Ends a request of no images, or one that is cancelled or late, if there is one.
bool Pool::end_one(Lock& lock) {
  const Request::Clock::time_point now = Request::Clock::now();
  const auto look = [&](std::shared_ptr<Request> r) {  // a copy: it leaves where it was found
    if (r->n == 0)
      end(lock, r, Status::kOk, "");
    else if (stopping_)
      end(lock, r, Status::kStopped, "stopped by ddpm_pool_destroy");
    else if (r->cancelled)
      end(lock, r, Status::kStopped, "stopped by ddpm_ticket_cancel");
    else if (r->deadline && now >= *r->deadline)
      end(lock, r, Status::kTimeout, "the request's timeout has passed");
    else
      return false;
    return true;
  };
  for (const Place& p : places_)
    if (p.request && look(p.request)) return true;
  for (const std::shared_ptr<Request>& r : queue_)
    if (look(r)) return true;
  return false;
}

// Takes it out of queue and places, and tells who wants to know.
void Pool::end(Lock& lock, const std::shared_ptr<Request>& request, Status status,
               const char* error) {
  const auto queued = std::find(queue_.begin(), queue_.end(), request);
  if (queued != queue_.end()) queue_.erase(queued);
  waiting_ -= request->n - request->started;
  request->started = request->n;
  for (size_t i = 0; i < places_.size(); ++i) {
    if (places_[i].request != request) continue;
    places_[i].request.reset();
    --running_;
    batch_->leave(static_cast<int>(i));
  }
  request->status = static_cast<ddpm_status>(status);
  std::snprintf(request->error.text, sizeof request->error.text, "%s", error);
  if (request->done != nullptr) {
    lock.unlock();
    request->done(request->user, request->status, request->error.text);
    lock.lock();
  }
  request->ended = true;
  request->has_ended.notify_all();
  if (--open_ == 0) idle_.notify_all();
}

// One image of each request in turn.
void Pool::fill_places() {
  for (Place& place : places_) {
    if (queue_.empty()) return;
    if (place.request) continue;
    place = {.request = queue_.front(), .image = queue_.front()->started++, .fresh = true};
    --waiting_;
    ++running_;
    if (place.request->started < place.request->n)
      queue_.splice(queue_.end(), queue_, queue_.begin());
    else
      queue_.pop_front();
  }
}

void Pool::step() {
  ErrorText error;
  const ddpm_status status = guarded(&error, [&] {
    in_turn(device_, nullptr, [&] {
      join_batch();
      batch_->step();
      deliver();
    });
  });
  count_step(status, error.text);
}

void Pool::join_batch() {
  const auto classes = static_cast<uint64_t>(std::max(core_->unet().classes(), 1));
  for (size_t i = 0; i < places_.size(); ++i) {
    Place& place = places_[i];
    if (!place.fresh) continue;
    const Request& r = *place.request;
    const size_t k = place.image;
    const uint64_t image = r.seeds.empty() ? r.first + k : r.first;
    batch_->join(static_cast<int>(i),
                 {.rows = &r.rows,
                  .seed = r.seeds.empty() ? r.seed : r.seeds[k],
                  .image = image,
                  .label = r.labels.empty() ? static_cast<int32_t>(image % classes) : r.labels[k],
                  .guidance = r.guidance,
                  .x_T = r.x_T.empty() ? nullptr : &r.x_T[k * image_size_]});
    place.fresh = false;
  }
}

// Images that are whole, to where they were asked for.
void Pool::deliver() {
  for (size_t i = 0; i < places_.size(); ++i) {
    const int slot = static_cast<int>(i);
    if (!batch_->finished(slot)) continue;
    Place& place = places_[i];
    Request& r = *place.request;
    const size_t at = place.image * image_size_;
    place.bad = !batch_->read(slot, r.bytes == nullptr ? nullptr : r.bytes + at,
                              r.floats == nullptr ? nullptr : r.floats + at, r.on_device);
  }
}

// What a step has changed: images that are whole give their places up. If it failed, so have the
// requests in it.
void Pool::count_step(ddpm_status status, const char* error) {
  Lock lock(mutex_);
  ++steps_;
  for (size_t i = 0; i < places_.size(); ++i) {
    Place& place = places_[i];
    if (!place.request) continue;
    if (status != DDPM_OK) {
      end(lock, std::shared_ptr<Request>(place.request), static_cast<Status>(status), error);
    } else if (place.bad) {
      place.bad = false;
      end(lock, std::shared_ptr<Request>(place.request), Status::kNonFinite,
          "sampling produced values that are not finite: the weights are damaged or the training "
          "diverged");
    } else if (batch_->finished(static_cast<int>(i))) {
      const std::shared_ptr<Request> request = std::move(place.request);
      batch_->leave(static_cast<int>(i));
      --running_;
      ++images_;
      if (++request->finished == request->n) end(lock, request, Status::kOk, "");
    }
  }
}

}  // namespace ddpm::c
