// Ranks over MPI. One thread makes every call of MPI, so that a sum over ranks goes on while this
// rank computes, and so that nothing waits inside MPI: requests are polled, and between two polls
// the thread says that this rank is alive and looks whether the others are.
//
// Signs of life go between rank 0 and each other rank, once a second or more often. A rank from
// which none has come for the timeout is lost: stopped, killed, or cut off; how long a step or a
// save takes does not matter. Rank 0 tells the others, and all leave.
#include "engine/comm.h"

#include <mpi.h>
#include <sched.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <climits>
#include <condition_variable>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <mutex>
#include <thread>
#include <utility>

#include "engine/comm_lost.h"
#include "kernels/bf16.h"

namespace ddpm {
namespace {

using Clock = std::chrono::steady_clock;
using std::chrono::milliseconds;

constexpr auto kIdle = milliseconds(20);  // between two looks while there is nothing to do
constexpr auto kLook = milliseconds(1);   // between two looks during a sum

double seconds_of(Clock::duration d) { return std::chrono::duration<double>(d).count(); }

enum Kind : int { kAlive, kLost, kFailed };

struct Message {
  int kind = kAlive;
  int about = 0;  // the rank that is lost or failed
  char text[496] = {};
};

// This rank must leave: another one is lost.
struct PeerLost {
  int rank;
  std::string text;
};
// This rank leaves, by an error of its own.
struct OwnFailure {};

// MPI_SUM of bf16.
void add_bf16(void* in, void* sum, int* count, MPI_Datatype*) {
  const auto* x = static_cast<const bf16*>(in);
  auto* y = static_cast<bf16*>(sum);
  for (int i = 0; i < *count; ++i) y[i] = to_bf16(to_float(y[i]) + to_float(x[i]));
}

class MpiCommunicator final : public Communicator {
 public:
  explicit MpiCommunicator(const CommOptions& options)
      : options_(options), thread_([this] { serve(); }) {
    std::unique_lock lock(mutex_);
    if (!done_.wait_for(lock, std::chrono::duration<double>(options_.timeout),
                        [&] { return started_; }))
      lost(not_started_text(options_));
  }
  ~MpiCommunicator() override {
    {
      const std::lock_guard lock(mutex_);
      stop_ = true;
    }
    work_.notify_one();
    thread_.join();
  }
  MpiCommunicator(const MpiCommunicator&) = delete;
  MpiCommunicator& operator=(const MpiCommunicator&) = delete;

  int rank() const override { return rank_; }
  int size() const override { return size_; }
  std::string description() const override { return mpi_library(); }

  void broadcast(void* data, size_t bytes) override {
    constexpr size_t kPart = size_t{1} << 30;
    run([=, this] {
      for (size_t at = 0; at < bytes; at += kPart) {
        requests_.resize(1);
        check(MPI_Ibcast(static_cast<char*>(data) + at,
                         static_cast<int>(std::min(kPart, bytes - at)), MPI_BYTE, 0, world_,
                         requests_.data()));
        wait();
      }
    });
  }
  void share(void* all, size_t bytes_each) override {
    DDPM_CHECK(bytes_each <= INT_MAX, "share: %zu bytes each", bytes_each);
    run([=, this] {
      requests_.resize(1);
      check(MPI_Iallgather(MPI_IN_PLACE, 0, MPI_DATATYPE_NULL, all, static_cast<int>(bytes_each),
                           MPI_BYTE, world_, requests_.data()));
      wait();
    });
  }
  void start_sum(void* data, DType type, int64_t count) override {
    DDPM_CHECK(count <= INT_MAX, "start_sum: %lld values", static_cast<long long>(count));
    submit([=, this] {
      const Clock::time_point start = Clock::now();
      const bool narrow = type == DType::kBF16;
      requests_.resize(1);
      check(MPI_Iallreduce(MPI_IN_PLACE, data, static_cast<int>(count),
                           narrow ? MPI_UINT16_T : MPI_FLOAT, narrow ? add_bf16_ : MPI_SUM, world_,
                           requests_.data()));
      wait();
      add_summing(start);
    });
  }
  void finish_sums() override {
    timed([] {});
  }
  void exchange_slices(const float* data, int64_t count, float* const* parts) override {
    timed([&] { submit([=, this] { send_slices(data, count, parts); }); });
  }
  void gather_slices(const float* slice, float* data, int64_t count) override {
    timed([&] { submit([=, this] { spread_slices(slice, data, count); }); });
  }
  void share_in_step(void* all, size_t bytes_each) override { share(all, bytes_each); }

  std::optional<CommSeconds> seconds() const override {
    const std::lock_guard lock(mutex_);
    return seconds_;
  }
  void announce_failure(const std::string& what) override {
    std::unique_lock lock(mutex_);
    failure_ = what;
    failing_ = true;
    work_.notify_one();
    done_.wait(lock, [&] { return ended_; });
  }

 private:
  // ---- the caller's side ----
  void submit(std::function<void()> job) {
    {
      const std::lock_guard lock(mutex_);
      jobs_.push_back(std::move(job));
    }
    work_.notify_one();
  }
  void wait_for_jobs() {
    awaited_ = true;
    std::unique_lock lock(mutex_);
    done_.wait(lock, [&] { return (jobs_.empty() && !busy_) || ended_; });
    awaited_ = false;
  }
  void run(std::function<void()> job) {
    submit(std::move(job));
    wait_for_jobs();
  }
  template <typename F>
  void timed(F start) {
    const Clock::time_point begin = Clock::now();
    start();
    wait_for_jobs();
    const std::lock_guard lock(mutex_);
    seconds_.waiting += seconds_of(Clock::now() - begin);
  }

  void lost(const std::string& why) {
    options_.say(why);
    options_.leave();
  }

  // ---- the thread's side ----
  void serve() {
    try {
      init();
      while (std::function<void()> job = next_job()) {
        job();
        {
          const std::lock_guard lock(mutex_);
          busy_ = false;
        }
        done_.notify_one();
      }
      finish();
    } catch (const PeerLost& lost) {
      this->lost(says_it(rank_, lost.rank) ? lost.text : std::string());
    } catch (const OwnFailure&) {
      tell(kFailed, rank_, failure_.c_str());
    } catch (const std::exception& e) {  // no memory
      tell(kFailed, rank_, e.what());
      lost(e.what());
    }
    const std::lock_guard lock(mutex_);
    ended_ = true;
    done_.notify_all();
  }

  void add_summing(Clock::time_point start) {
    const std::lock_guard lock(mutex_);
    seconds_.summing += seconds_of(Clock::now() - start);
  }
  void init();
  void finish();
  std::function<void()> next_job();
  void wait();
  void look();
  void receive();
  void send_sign_of_life(Clock::time_point now);
  void tell(Kind kind, int about, const char* text);
  void send_slices(const float* data, int64_t count, float* const* parts);
  void spread_slices(const float* slice, float* data, int64_t count);
  template <typename F>
  void with_others(F post);

  // An error of MPI is a connection that broke.
  void check(int code) {
    if (code == MPI_SUCCESS) return;
    char text[MPI_MAX_ERROR_STRING];
    int length = 0;
    MPI_Error_string(code, text, &length);
    throw PeerLost{rank_ == 0 ? 1 : 0, format("MPI: %s", text)};
  }
  std::string host_of(int rank) const { return hosts_[static_cast<size_t>(rank)]; }
  // Those this rank exchanges signs of life with.
  bool watched(int rank) const { return rank != rank_ && (rank_ == 0 || rank == 0); }

  CommOptions options_;
  mutable std::mutex mutex_;
  std::condition_variable work_, done_;
  std::deque<std::function<void()>> jobs_;
  bool started_ = false, busy_ = false, stop_ = false, ended_ = false;
  std::atomic<bool> awaited_{false}, failing_{false};
  std::string failure_;
  CommSeconds seconds_;

  // The thread's alone.
  int rank_ = 0, size_ = 1;
  MPI_Comm world_ = MPI_COMM_NULL, control_ = MPI_COMM_NULL;
  MPI_Op add_bf16_ = MPI_OP_NULL;
  std::vector<std::string> hosts_;
  std::vector<MPI_Request> requests_;  // of the job under way
  bool alive_ = true;                  // sends signs of life, and expects them
  Message incoming_;
  MPI_Request incoming_request_ = MPI_REQUEST_NULL;
  std::vector<Message> signs_;
  std::vector<MPI_Request> sign_requests_;
  std::vector<Clock::time_point> heard_;
  Clock::time_point looked_, said_;

  std::thread thread_;  // last: it uses the others
};

void MpiCommunicator::init() {
  int provided = 0;
  MPI_Init_thread(nullptr, nullptr, MPI_THREAD_FUNNELED, &provided);
  MPI_Comm_dup(MPI_COMM_WORLD, &world_);
  MPI_Comm_dup(MPI_COMM_WORLD, &control_);
  for (MPI_Comm comm : {MPI_COMM_WORLD, world_, control_})
    MPI_Comm_set_errhandler(comm, MPI_ERRORS_RETURN);
  MPI_Op_create(add_bf16, 1, &add_bf16_);
  MPI_Comm_rank(world_, &rank_);
  MPI_Comm_size(world_, &size_);
  const auto size = static_cast<size_t>(size_);
  std::vector<char> names(size * MPI_MAX_PROCESSOR_NAME);
  int length = 0;
  MPI_Get_processor_name(names.data() + static_cast<size_t>(rank_) * MPI_MAX_PROCESSOR_NAME,
                         &length);
  check(MPI_Allgather(MPI_IN_PLACE, 0, MPI_DATATYPE_NULL, names.data(), MPI_MAX_PROCESSOR_NAME,
                      MPI_BYTE, world_));
  for (size_t r = 0; r < size; ++r) hosts_.emplace_back(names.data() + r * MPI_MAX_PROCESSOR_NAME);
  signs_.resize(size);
  sign_requests_.assign(size, MPI_REQUEST_NULL);
  looked_ = said_ = Clock::now();
  heard_.assign(size, looked_);
  receive();
  const std::lock_guard lock(mutex_);
  started_ = true;
  done_.notify_one();
}

// Empty where there is none to come.
std::function<void()> MpiCommunicator::next_job() {
  for (;;) {
    {
      std::unique_lock lock(mutex_);
      work_.wait_for(lock, kIdle, [&] { return !jobs_.empty() || stop_ || failing_; });
      if (!jobs_.empty()) {
        std::function<void()> job = std::move(jobs_.front());
        jobs_.pop_front();
        busy_ = true;
        return job;
      }
      if (stop_ && !failing_) return {};
    }
    look();
  }
}

// For requests_. While the caller waits, too, polling may take its processor.
void MpiCommunicator::wait() {
  constexpr int kSpins = 2000;
  for (int polls = 0;; ++polls) {
    int done = 0;
    check(MPI_Testall(static_cast<int>(requests_.size()), requests_.data(), &done,
                      MPI_STATUSES_IGNORE));
    if (done != 0) return;
    if (Clock::now() - looked_ > kLook) look();
    if (awaited_ && polls < kSpins)
      sched_yield();
    else
      std::this_thread::sleep_for(std::chrono::microseconds(50));
  }
}

// Takes what has come, says that this rank is alive, and looks whether the others are.
void MpiCommunicator::look() {
  const Clock::time_point now = Clock::now();
  const auto timeout = std::chrono::duration<double>(options_.timeout);
  // Stopped itself, with what was sent to it unread: the others may be as well as ever.
  if (now - looked_ > timeout / 2) heard_.assign(heard_.size(), now);
  looked_ = now;
  int come = 0;
  MPI_Status status;
  while (check(MPI_Test(&incoming_request_, &come, &status)), come != 0) {
    const Message m = incoming_;
    receive();
    if (m.kind == kAlive) {
      heard_[static_cast<size_t>(status.MPI_SOURCE)] = now;
      continue;
    }
    if (m.kind == kFailed) std::this_thread::sleep_for(kAfterFailure);
    throw PeerLost{m.about, m.text};
  }
  if (failing_) throw OwnFailure{};
  if (!alive_) return;
  if (now - said_ > sign_interval(options_)) send_sign_of_life(now);
  for (int r = 0; r < size_; ++r) {
    if (!watched(r) || now - heard_[static_cast<size_t>(r)] <= timeout) continue;
    const std::string text = silent_text(r, host_of(r), options_);
    if (rank_ == 0) tell(kLost, r, text.c_str());
    throw PeerLost{r, text};
  }
}

void MpiCommunicator::receive() {
  check(MPI_Irecv(&incoming_, sizeof incoming_, MPI_BYTE, MPI_ANY_SOURCE, 0, control_,
                  &incoming_request_));
}

void MpiCommunicator::send_sign_of_life(Clock::time_point now) {
  said_ = now;
  for (int r = 0; r < size_; ++r) {
    if (!watched(r)) continue;
    const auto i = static_cast<size_t>(r);
    int sent = 1;
    if (sign_requests_[i] != MPI_REQUEST_NULL)
      check(MPI_Test(&sign_requests_[i], &sent, MPI_STATUS_IGNORE));
    if (sent == 0) continue;
    check(MPI_Isend(&signs_[i], sizeof(Message), MPI_BYTE, r, 0, control_, &sign_requests_[i]));
  }
}

// As long as kTelling, since some may not listen any more.
void MpiCommunicator::tell(Kind kind, int about, const char* text) {
  Message m;
  m.kind = kind;
  m.about = about;
  const std::string whole = kind == kFailed ? failed_text(about, host_of(about), text) : text;
  std::strncpy(m.text, whole.c_str(), sizeof m.text - 1);
  std::vector<MPI_Request> sends;
  for (int r = 0; r < size_; ++r)
    if (r != rank_ && r != about) {
      sends.push_back(MPI_REQUEST_NULL);
      MPI_Isend(&m, sizeof m, MPI_BYTE, r, 0, control_, &sends.back());
    }
  const Clock::time_point end = Clock::now() + kTelling;
  for (int done = 0; done == 0 && Clock::now() < end;) {
    MPI_Testall(static_cast<int>(sends.size()), sends.data(), &done, MPI_STATUSES_IGNORE);
    std::this_thread::sleep_for(kLook);
  }
}

// Two requests with each other rank, which `post` makes.
template <typename F>
void MpiCommunicator::with_others(F post) {
  const Clock::time_point start = Clock::now();
  requests_.clear();
  for (int r = 0; r < size_; ++r) {
    if (r == rank_) continue;
    requests_.resize(requests_.size() + 2);
    post(r, &requests_[requests_.size() - 2]);
  }
  wait();
  add_summing(start);
}

namespace {

struct Slice {
  int64_t begin = 0;
  int length = 0;
};

Slice slice(const Communicator& ranks, int64_t count, int rank) {
  const int64_t each = ranks.slice_of(count);
  DDPM_CHECK(each <= INT_MAX, "slices of %lld values", static_cast<long long>(each));
  const int64_t begin = std::min(count, rank * each);
  return {begin, static_cast<int>(std::min(count, begin + each) - begin)};
}

}  // namespace

void MpiCommunicator::send_slices(const float* data, int64_t count, float* const* parts) {
  const Slice own = slice(*this, count, rank_);
  std::copy_n(data + own.begin, own.length, parts[rank_]);
  with_others([&](int r, MPI_Request* requests) {
    const Slice theirs = slice(*this, count, r);
    check(MPI_Irecv(parts[r], own.length, MPI_FLOAT, r, 1, world_, &requests[0]));
    check(MPI_Isend(data + theirs.begin, theirs.length, MPI_FLOAT, r, 1, world_, &requests[1]));
  });
}

void MpiCommunicator::spread_slices(const float* from, float* data, int64_t count) {
  const Slice own = slice(*this, count, rank_);
  std::copy_n(from, own.length, data + own.begin);
  with_others([&](int r, MPI_Request* requests) {
    const Slice theirs = slice(*this, count, r);
    check(MPI_Irecv(data + theirs.begin, theirs.length, MPI_FLOAT, r, 2, world_, &requests[0]));
    check(MPI_Isend(from, own.length, MPI_FLOAT, r, 2, world_, &requests[1]));
  });
}

// All ranks come here. Nothing may be under way when MPI ends, so signs of life stop before.
void MpiCommunicator::finish() {
  for (int barrier = 0; barrier < 2; ++barrier) {
    requests_.resize(1);
    check(MPI_Ibarrier(world_, requests_.data()));
    wait();
    alive_ = false;
  }
  requests_.swap(sign_requests_);
  wait();
  MPI_Cancel(&incoming_request_);
  MPI_Wait(&incoming_request_, MPI_STATUS_IGNORE);
  MPI_Op_free(&add_bf16_);
  MPI_Comm_free(&world_);
  MPI_Comm_free(&control_);
  MPI_Finalize();
}

}  // namespace

bool started_by_mpi() {
  return std::getenv("OMPI_COMM_WORLD_SIZE") != nullptr || std::getenv("PMIX_RANK") != nullptr;
}

std::unique_ptr<Communicator> make_mpi_communicator(const CommOptions& options) {
  return std::make_unique<MpiCommunicator>(options);
}

std::string mpi_library() {
  return format("Open MPI %d.%d.%d", OMPI_MAJOR_VERSION, OMPI_MINOR_VERSION, OMPI_RELEASE_VERSION);
}

}  // namespace ddpm
