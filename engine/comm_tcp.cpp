// Ranks over TCP, for what the host says where there is no MPI: a star, with rank 0 in its middle.
// The caller sends and receives messages itself. A thread watches: between rank 0 and each other
// rank signs of life go once a second, on connections of their own; a rank from which nothing has
// come for the timeout is lost, and so is one whose connection ends without a farewell. Rank 0
// tells the others, and all leave.
#include <poll.h>
#include <sys/socket.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <condition_variable>
#include <cstring>
#include <mutex>
#include <thread>
#include <utility>

#include "engine/comm.h"
#include "engine/comm_lost.h"
#include "engine/tcp_meeting.h"

namespace ddpm {
namespace {

using Clock = std::chrono::steady_clock;

constexpr int kIdle = 20;           // milliseconds between two looks while nothing comes
constexpr size_t kMostText = 4096;  // bytes of what is said of a rank

enum Kind : uint32_t { kAlive, kLost, kFailed, kFarewell };

// Before the text of a sign.
struct Head {
  uint32_t kind = kAlive;
  int32_t about = 0;  // the rank that is lost or failed
  uint32_t length = 0;
};

// This rank must leave: another one is lost or failed.
struct PeerLost {
  Kind kind;
  int rank;
  std::string text;
};
// This rank leaves, by an error of its own.
struct OwnFailure {};

struct Link {
  Peer peer;
  Clock::time_point heard;
  std::string in, out;  // signs that are not whole yet, and not sent yet
  bool parted = false;  // has said farewell
};

// Whether all of it went through.
template <typename F>
bool all_of(size_t bytes, F call) {
  for (size_t done = 0; done < bytes;) {
    const ssize_t n = call(done, bytes - done);
    if (n < 0 && errno == EINTR) continue;
    if (n <= 0) return false;
    done += static_cast<size_t>(n);
  }
  return true;
}

class TcpCommunicator final : public Communicator {
 public:
  TcpCommunicator(const std::string& place, int rank, int size, const CommOptions& options)
      : options_(options), rank_(rank), size_(size) {
    std::optional<std::vector<Peer>> peers = meet(place, rank, size, options.timeout);
    if (!peers) {
      const std::string why = not_started_text(options) + "; they meet at " + place;
      lost(why);
      throw Error(Status::kPeer, why);
    }
    looked_ = said_ = intact_ = Clock::now();
    for (Peer& p : *peers) links_.push_back({.peer = std::move(p), .heard = looked_});
    thread_ = std::thread([this] { watch(); });
  }
  ~TcpCommunicator() override {
    stop_ = true;
    thread_.join();
  }
  TcpCommunicator(const TcpCommunicator&) = delete;
  TcpCommunicator& operator=(const TcpCommunicator&) = delete;

  int rank() const override { return rank_; }
  int size() const override { return size_; }
  std::string description() const override { return "TCP"; }

  void broadcast(void* data, size_t bytes) override {
    for (const Link& link : links_)
      rank_ == 0 ? send(link.peer, data, bytes) : receive(link.peer, data, bytes);
  }
  void share(void* all, size_t bytes_each) override {
    char* const parts = static_cast<char*>(all);
    for (const Link& link : links_) {
      const int of = rank_ == 0 ? link.peer.rank : rank_;
      char* const part = parts + static_cast<size_t>(of) * bytes_each;
      rank_ == 0 ? receive(link.peer, part, bytes_each) : send(link.peer, part, bytes_each);
    }
    broadcast(all, bytes_each * static_cast<size_t>(size_));
  }

  void start_sum(void*, DType, int64_t) override { no_sums(); }
  void finish_sums() override { no_sums(); }
  void exchange_slices(const float*, int64_t, float* const*) override { no_sums(); }
  void gather_slices(const float*, float*, int64_t) override { no_sums(); }
  void share_in_step(void*, size_t) override { no_sums(); }
  std::optional<CommSeconds> seconds() const override { return std::nullopt; }

  void announce_failure(const std::string& what) override {
    std::unique_lock lock(mutex_);
    failure_ = what;
    failing_ = true;
    done_.wait(lock, [&] { return ended_; });
  }

 private:
  [[noreturn]] static void no_sums() { fail(Status::kBug, "a sum over ranks by TCP"); }

  // ---- the caller's side: each message is its length and its bytes ----
  void send(const Peer& to, const void* data, size_t bytes) {
    const uint64_t length = bytes;
    const auto put = [&](const void* from, size_t size, int more) {
      return all_of(size, [&](size_t at, size_t left) {
        return ::send(to.messages.fd(), static_cast<const char*>(from) + at, left,
                      MSG_NOSIGNAL | more);
      });
    };
    if (!put(&length, sizeof length, bytes > 0 ? MSG_MORE : 0) || !put(data, bytes, 0)) broken(to);
  }
  void receive(const Peer& from, void* data, size_t bytes) {
    uint64_t length = 0;
    const auto get = [&](void* to, size_t size) {
      return all_of(size, [&](size_t at, size_t left) {
        return ::recv(from.messages.fd(), static_cast<char*>(to) + at, left, 0);
      });
    };
    if (!get(&length, sizeof length)) broken(from);
    DDPM_CHECK(length == bytes, "%llu bytes of rank %d where %zu were expected",
               static_cast<unsigned long long>(length), from.rank, bytes);
    if (!get(data, bytes)) broken(from);
  }
  // The thread finds out why, and leaves.
  [[noreturn]] void broken(const Peer& peer) {
    broken_ = peer.rank;
    std::unique_lock lock(mutex_);
    done_.wait(lock, [&] { return ended_; });
    throw Error(Status::kPeer, ended_text(peer.rank, peer.host, options_));
  }

  void lost(const std::string& why) {
    options_.say(why);
    options_.leave();
  }

  // ---- the thread's side ----
  void watch() {
    try {
      while (!look()) wait();
    } catch (const PeerLost& lost) {
      if (rank_ == 0) tell(lost.kind, lost.rank, lost.text);
      if (lost.kind == kFailed) std::this_thread::sleep_for(kAfterFailure);
      this->lost(says_it(rank_, lost.rank) ? lost.text : std::string());
    } catch (const OwnFailure&) {
      tell(kFailed, rank_, failed_text(rank_, host_name(), failure_));
    } catch (const std::exception& e) {  // no memory
      tell(kFailed, rank_, failed_text(rank_, host_name(), e.what()));
      lost(e.what());
    }
    const std::lock_guard lock(mutex_);
    ended_ = true;
    done_.notify_all();
  }

  bool look();
  void wait();
  void take(Link& link);
  void take_signs(Link& link);
  void check_heard(Clock::time_point now);
  bool part();
  void tell(Kind kind, int about, const std::string& text);
  static void add(Link& link, Kind kind, int about = 0, const std::string& text = {});
  static void flush(Link& link);

  CommOptions options_;
  const int rank_, size_;
  std::mutex mutex_;
  std::condition_variable done_;
  bool ended_ = false;
  std::string failure_;
  std::atomic<bool> stop_{false}, failing_{false};
  std::atomic<int> broken_{-1};  // the rank whose messages ended

  // The thread's alone, but for the peers' messages.
  std::vector<Link> links_;
  Clock::time_point looked_, said_;
  Clock::time_point intact_;  // when no messages had ended yet
  bool parting_ = false;

  std::thread thread_;  // last: it uses the others
};

void TcpCommunicator::wait() {
  std::vector<pollfd> polled;
  for (const Link& link : links_) polled.push_back({link.peer.signs.fd(), POLLIN, 0});
  ::poll(polled.data(), polled.size(), kIdle);
}

// Takes what has come, says that this rank is alive, and looks whether the others are. True when
// all have said farewell.
bool TcpCommunicator::look() {
  const Clock::time_point now = Clock::now();
  // Stopped itself, with what was sent to it unread: the others may be as well as ever.
  if (now - looked_ > std::chrono::duration<double>(options_.timeout / 2))
    for (Link& link : links_) link.heard = now;
  looked_ = now;
  for (Link& link : links_) take(link);
  if (failing_) throw OwnFailure{};
  if (stop_ && part()) return true;
  if (now - said_ > sign_interval(options_)) {
    said_ = now;
    for (Link& link : links_)
      if (link.out.empty()) add(link, kAlive);
  }
  for (Link& link : links_) flush(link);
  check_heard(now);
  return false;
}

void TcpCommunicator::check_heard(Clock::time_point now) {
  const auto timeout = std::chrono::duration<double>(options_.timeout);
  // Why messages ended may be on its way among the signs.
  if (broken_ < 0) intact_ = now;
  for (const Link& link : links_) {
    const Peer& p = link.peer;
    if (p.rank == broken_ && now - intact_ > kTelling)
      throw PeerLost{kLost, p.rank, ended_text(p.rank, p.host, options_)};
    if (!link.parted && now - link.heard > timeout)
      throw PeerLost{kLost, p.rank, silent_text(p.rank, p.host, options_)};
  }
}

void TcpCommunicator::take(Link& link) {
  Peer& p = link.peer;
  char buffer[4096];
  while (p.signs.open()) {
    const ssize_t n = ::recv(p.signs.fd(), buffer, sizeof buffer, MSG_DONTWAIT);
    if (n < 0 && errno == EINTR) continue;
    if (n < 0 && (errno == EAGAIN || errno == EWOULDBLOCK)) return;
    if (n <= 0) {
      if (!link.parted) throw PeerLost{kLost, p.rank, ended_text(p.rank, p.host, options_)};
      p.signs.close();
      return;
    }
    link.heard = looked_;
    link.in.append(buffer, static_cast<size_t>(n));
    take_signs(link);
  }
}

void TcpCommunicator::take_signs(Link& link) {
  Head head;
  while (link.in.size() >= sizeof head) {
    std::memcpy(&head, link.in.data(), sizeof head);
    if (head.length > kMostText)
      throw PeerLost{kLost, link.peer.rank, ended_text(link.peer.rank, link.peer.host, options_)};
    if (link.in.size() < sizeof head + head.length) return;
    if (head.kind == kFarewell) link.parted = true;
    if (head.kind == kLost || head.kind == kFailed)
      throw PeerLost{static_cast<Kind>(head.kind), head.about,
                     link.in.substr(sizeof head, head.length)};
    link.in.erase(0, sizeof head + head.length);
  }
}

// All ranks come here. The others say farewell first; when all have, rank 0 answers.
bool TcpCommunicator::part() {
  const bool all_parted =
      std::all_of(links_.begin(), links_.end(), [](const Link& link) { return link.parted; });
  if (rank_ == 0 && !all_parted) return false;
  if (!std::exchange(parting_, true))
    for (Link& link : links_) add(link, kFarewell);
  for (Link& link : links_) flush(link);
  return all_parted && std::all_of(links_.begin(), links_.end(),
                                   [](const Link& link) { return link.out.empty(); });
}

// As long as kTelling, since some may not listen any more.
void TcpCommunicator::tell(Kind kind, int about, const std::string& text) {
  for (Link& link : links_)
    if (link.peer.rank != about) add(link, kind, about, text.substr(0, kMostText));
  const Clock::time_point end = Clock::now() + kTelling;
  for (bool sent = false; !sent && Clock::now() < end;) {
    sent = true;
    for (Link& link : links_) {
      flush(link);
      sent = sent && (link.out.empty() || link.peer.rank == about);
    }
    if (!sent) std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
}

void TcpCommunicator::add(Link& link, Kind kind, int about, const std::string& text) {
  const Head head{kind, about, static_cast<uint32_t>(text.size())};
  link.out.append(reinterpret_cast<const char*>(&head), sizeof head);
  link.out += text;
}

// What there is room for. That a connection has ended is seen where it is read.
void TcpCommunicator::flush(Link& link) {
  while (!link.out.empty()) {
    const ssize_t n =
        ::send(link.peer.signs.fd(), link.out.data(), link.out.size(), MSG_NOSIGNAL | MSG_DONTWAIT);
    if (n < 0 && errno == EINTR) continue;
    if (n <= 0) return;
    link.out.erase(0, static_cast<size_t>(n));
  }
}

}  // namespace

std::unique_ptr<Communicator> make_tcp_communicator(const std::string& place, int rank, int size,
                                                    const CommOptions& options) {
  return std::make_unique<TcpCommunicator>(place, rank, size, options);
}

}  // namespace ddpm
