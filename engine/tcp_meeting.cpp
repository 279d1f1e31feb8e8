#include "engine/tcp_meeting.h"

#include <fcntl.h>
#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cstdint>
#include <cstring>
#include <iterator>
#include <memory>
#include <thread>

#include "engine/comm.h"

namespace ddpm {
namespace {

using Clock = std::chrono::steady_clock;
using std::chrono::milliseconds;

constexpr auto kRetry = milliseconds(50);
constexpr auto kListen = milliseconds(2000);  // for a run that has just left the port
constexpr size_t kStrangers = 64;             // connections that have said nothing yet

// The first bytes of a connection, each way. Of one size, so that nobody chooses how much is read.
struct Greeting {
  char magic[8] = {};
  uint32_t version = 1;
  int32_t size = 0, rank = 0;
  int32_t channel = 0;  // kMessages or kSigns
  char host[256] = {};
};
enum Channel : int32_t { kMessages, kSigns };
constexpr char kComes[9] = "ddpmcome", kTaken[9] = "ddpmtake";

Greeting greeting(const char* magic, int size, int rank, Channel channel) {
  Greeting g;
  std::memcpy(g.magic, magic, sizeof g.magic);
  g.size = size;
  g.rank = rank;
  g.channel = channel;
  std::strncpy(g.host, host_name().c_str(), sizeof g.host - 1);
  return g;
}
bool fits(const Greeting& g, const char* magic, int size) {
  return std::memcmp(g.magic, magic, sizeof g.magic) == 0 && g.version == Greeting{}.version &&
         g.size == size && (g.channel == kMessages || g.channel == kSigns) &&
         g.host[sizeof g.host - 1] == '\0';
}

struct Place {
  std::string host, port;
};
Place parse(const std::string& text) {
  const size_t colon = text.rfind(':');
  if (colon == std::string::npos || colon == 0 || colon + 1 == text.size())
    fail(Status::kUsage, "the ranks' meeting place '%s' is not host:port; NCCL_COMM_ID says it",
         text.c_str());
  Place p{text.substr(0, colon), text.substr(colon + 1)};
  if (p.host.size() > 2 && p.host.front() == '[' && p.host.back() == ']')
    p.host = p.host.substr(1, p.host.size() - 2);
  return p;
}

using Addresses = std::unique_ptr<addrinfo, decltype(&::freeaddrinfo)>;

// Null where the name is unknown, which it may be until all machines are up.
Addresses addresses(const char* host, const std::string& port) {
  addrinfo asked{}, *found = nullptr;
  asked.ai_flags = host == nullptr ? AI_PASSIVE : 0;
  asked.ai_socktype = SOCK_STREAM;
  if (::getaddrinfo(host, port.c_str(), &asked, &found) != 0) found = nullptr;
  return {found, &::freeaddrinfo};
}

Socket new_socket(const addrinfo& a) {
  return Socket(::socket(a.ai_family, a.ai_socktype | SOCK_NONBLOCK | SOCK_CLOEXEC, a.ai_protocol));
}
void set(const Socket& s, int level, int option) {
  const int on = 1;
  ::setsockopt(s.fd(), level, option, &on, sizeof on);
}
void make_waiting(const Socket& s) {
  ::fcntl(s.fd(), F_SETFL, ::fcntl(s.fd(), F_GETFL) & ~O_NONBLOCK);
}

// Sends as one; a new connection has room for it.
bool greet(const Socket& s, const Greeting& g) {
  return ::send(s.fd(), &g, sizeof g, MSG_NOSIGNAL) == static_cast<ssize_t>(sizeof g);
}

// A connection whose greeting is awaited.
struct Comer {
  Socket socket;
  Greeting greeting;
  size_t got = 0;

  bool whole() const { return got == sizeof greeting; }
  // Takes what is there, no more than the greeting. False where nothing will come any more.
  bool read() {
    while (!whole()) {
      const ssize_t n = ::recv(socket.fd(), reinterpret_cast<char*>(&greeting) + got,
                               sizeof greeting - got, MSG_DONTWAIT);
      if (n < 0 && errno == EINTR) continue;
      if (n < 0 && (errno == EAGAIN || errno == EWOULDBLOCK)) return true;
      if (n <= 0) return false;
      got += static_cast<size_t>(n);
    }
    return true;
  }
};

// ---- rank 0 ----

// One for each family of addresses. A run on one machine is not open to others.
std::vector<Socket> try_to_listen(const Place& at, int& error) {
  const bool here = at.host.starts_with("127.") || at.host == "localhost" || at.host == "::1";
  const Addresses list = addresses(here ? at.host.c_str() : nullptr, at.port);
  std::vector<Socket> listeners;
  for (const addrinfo* a = list.get(); a != nullptr; a = a->ai_next) {
    Socket s = new_socket(*a);
    if (!s.open()) continue;  // a family that this machine does not have
    set(s, SOL_SOCKET, SO_REUSEADDR);
    if (a->ai_family == AF_INET6) set(s, IPPROTO_IPV6, IPV6_V6ONLY);
    if (::bind(s.fd(), a->ai_addr, a->ai_addrlen) == 0 && ::listen(s.fd(), SOMAXCONN) == 0)
      listeners.push_back(std::move(s));
    else
      error = errno;
  }
  return listeners;
}

std::vector<Socket> listen_at(const Place& at) {
  const Clock::time_point end = Clock::now() + kListen;
  for (;;) {
    int error = EINVAL;
    std::vector<Socket> listeners = try_to_listen(at, error);
    if (!listeners.empty()) return listeners;
    if (Clock::now() > end)
      fail(Status::kUsage,
           "rank 0 cannot listen at port %s: %s; NCCL_COMM_ID=host:port says another place",
           at.port.c_str(), std::strerror(error));
    std::this_thread::sleep_for(kRetry);
  }
}

// Those that wait at `listener`.
void accept_all(const Socket& listener, int size, std::vector<Comer>& comers) {
  for (;;) {
    Socket s(::accept4(listener.fd(), nullptr, nullptr, SOCK_NONBLOCK | SOCK_CLOEXEC));
    if (!s.open() && (errno == EMFILE || errno == ENFILE))
      fail(Status::kUsage,
           "rank 0 cannot take two connections from each of %d ranks: %s; raise ulimit -n", size,
           std::strerror(errno));
    if (!s.open()) return;
    if (comers.size() >= kStrangers + 2 * static_cast<size_t>(size)) comers.erase(comers.begin());
    comers.emplace_back().socket = std::move(s);
  }
}

// Whether it is one of the run, at a place that was free.
bool take(Comer& comer, int size, std::vector<Peer>& peers) {
  const Greeting& g = comer.greeting;
  if (!fits(g, kComes, size) || g.rank < 1 || g.rank >= size) return false;
  Peer& peer = peers[static_cast<size_t>(g.rank) - 1];
  Socket& place = g.channel == kMessages ? peer.messages : peer.signs;
  if (place.open()) return false;
  peer.rank = g.rank;
  peer.host = g.host;
  place = std::move(comer.socket);
  return true;
}

std::optional<std::vector<Peer>> receive_ranks(const Place& at, int size, Clock::time_point end) {
  std::vector<Peer> peers(static_cast<size_t>(size) - 1);
  std::vector<Comer> comers;
  const std::vector<Socket> listeners = size > 1 ? listen_at(at) : std::vector<Socket>();
  for (size_t taken = 0; taken < 2 * peers.size();) {
    if (Clock::now() > end) return std::nullopt;
    std::vector<pollfd> polled;
    for (const Socket& s : listeners) polled.push_back({s.fd(), POLLIN, 0});
    for (const Comer& c : comers) polled.push_back({c.socket.fd(), POLLIN, 0});
    ::poll(polled.data(), polled.size(), static_cast<int>(kRetry.count()));
    for (const Socket& s : listeners) accept_all(s, size, comers);
    std::vector<Comer> left;
    for (Comer& c : comers) {
      if (!c.read()) continue;
      if (!c.whole())
        left.push_back(std::move(c));
      else if (take(c, size, peers))
        ++taken;
    }
    comers = std::move(left);
  }
  // One that has gone again is noticed by what comes next.
  for (const Peer& p : peers) {
    greet(p.messages, greeting(kTaken, size, 0, kMessages));
    greet(p.signs, greeting(kTaken, size, 0, kSigns));
  }
  return peers;
}

// ---- the others ----

int wait_for(const Socket& s, short events, Clock::time_point end) {
  pollfd p{s.fd(), events, 0};
  const auto left = std::chrono::ceil<milliseconds>(end - Clock::now()).count();
  return ::poll(&p, 1, static_cast<int>(std::clamp<int64_t>(left, 0, 1 << 30)));
}

Socket connect_to(const addrinfo* list, Clock::time_point end) {
  for (const addrinfo* a = list; a != nullptr; a = a->ai_next) {
    Socket s = new_socket(*a);
    if (!s.open()) continue;
    set(s, IPPROTO_TCP, TCP_NODELAY);
    if (::connect(s.fd(), a->ai_addr, a->ai_addrlen) != 0) {
      if (errno != EINPROGRESS) continue;
      // An address that does not answer must not take the time of the next one.
      wait_for(s, POLLOUT, std::min(end, Clock::now() + milliseconds(3000)));
      int error = 0;
      socklen_t length = sizeof error;
      if (::getsockopt(s.fd(), SOL_SOCKET, SO_ERROR, &error, &length) != 0 || error != 0) continue;
    }
    return s;
  }
  return {};
}

// Rank 0's, which comes when all are there.
std::optional<Greeting> answer(Socket& socket, int size, Clock::time_point end) {
  Comer c;
  c.socket = std::move(socket);
  while (!c.whole() && Clock::now() < end) {
    wait_for(c.socket, POLLIN, end);
    if (!c.read()) return std::nullopt;
  }
  socket = std::move(c.socket);
  if (!c.whole() || !fits(c.greeting, kTaken, size)) return std::nullopt;
  return c.greeting;
}

std::optional<Peer> come(const Place& at, int rank, int size, Clock::time_point end) {
  const Addresses list = addresses(at.host.c_str(), at.port);
  Peer p;
  for (const Channel channel : {kMessages, kSigns}) {
    Socket& s = channel == kMessages ? p.messages : p.signs;
    s = connect_to(list.get(), end);
    if (!s.open() || !greet(s, greeting(kComes, size, rank, channel))) return std::nullopt;
  }
  const auto first = answer(p.messages, size, end), second = answer(p.signs, size, end);
  if (!first || !second) return std::nullopt;
  p.host = first->host;
  return p;
}

std::optional<std::vector<Peer>> reach_rank_0(const Place& at, int rank, int size,
                                              Clock::time_point end) {
  for (; Clock::now() < end; std::this_thread::sleep_for(kRetry))
    if (std::optional<Peer> p = come(at, rank, size, end)) {
      std::vector<Peer> one;
      one.push_back(std::move(*p));
      return one;
    }
  return std::nullopt;
}

}  // namespace

void Socket::close() {
  if (open()) ::close(std::exchange(fd_, -1));
}

std::string host_name() {
  char name[256] = {};
  ::gethostname(name, sizeof name - 1);
  return name;
}

std::optional<std::vector<Peer>> meet(const std::string& place, int rank, int size,
                                      double timeout) {
  const Place at = parse(place);
  const Clock::time_point end = Clock::now() + std::chrono::duration_cast<Clock::duration>(
                                                   std::chrono::duration<double>(timeout));
  std::optional<std::vector<Peer>> peers =
      rank == 0 ? receive_ranks(at, size, end) : reach_rank_0(at, rank, size, end);
  if (!peers) return std::nullopt;
  for (const Peer& p : *peers) {
    make_waiting(p.messages);
    for (const Socket* s : {&p.messages, &p.signs}) set(*s, IPPROTO_TCP, TCP_NODELAY);
  }
  return peers;
}

}  // namespace ddpm
