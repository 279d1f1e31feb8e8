// Ranks over TCP, for real: each case is its own ranks, as processes.
#include <catch2/catch.hpp>

#include <chrono>
#include <csignal>
#include <cstdlib>
#include <filesystem>
#include <map>
#include <memory>
#include <optional>
#include <thread>

#include "engine/comm.h"
#include "engine/tcp_meeting.h"
#include "tests/child.h"
#include "tests/rank_support.h"
#include "tests/temp_folder.h"

using namespace ddpm;
using namespace ddpm::test;

namespace {

using Clock = std::chrono::steady_clock;
double since(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

int count_of(const std::string& text, const std::string& part) {
  int n = 0;
  for (size_t at = 0; (at = text.find(part, at)) != std::string::npos; ++at) ++n;
  return n;
}

// What a rank is told: its number, how many there are, seconds of timeout, the place, a folder.
std::optional<std::istringstream> told() {
  const char* text = std::getenv("DDPM_TCP_RANK");
  if (text == nullptr) return std::nullopt;
  return std::istringstream(text);
}

struct Rank {
  int rank = 0, size = 0;
  double timeout = 0;
  std::string place, folder;
  explicit Rank(std::istringstream words) { words >> rank >> size >> timeout >> place >> folder; }
  std::unique_ptr<Communicator> join() const {
    return make_tcp_communicator(place, rank, size, leaving(timeout));
  }
  void mark(const std::string& name) const { put_bytes(folder + "/" + name, ""); }
};

// Ranks of a test case, of which one may not come.
class Group {
 public:
  Group(const std::string& test_case, int size, double timeout, int missing = -1,
        const std::string& host = "127.0.0.1")
      : place(host + ":" + std::to_string(port)), ranks_(static_cast<size_t>(size)) {
    for (int r = 0; r < size; ++r) {
      if (r == missing) continue;
      const std::string words = format("%d %d %g ", r, size, timeout) + place + " " + tmp.path();
      ::setenv("DDPM_TCP_RANK", words.c_str(), 1);
      ranks_[static_cast<size_t>(r)] =
          std::make_unique<Child>(own_program(), test_case, log_file(r));
    }
    ::unsetenv("DDPM_TCP_RANK");
  }
  Child& operator[](int r) { return *ranks_[static_cast<size_t>(r)]; }
  // Until each has joined.
  void wait_for_all() {
    const Clock::time_point start = Clock::now();
    for (size_t r = 0; r < ranks_.size(); ++r)
      while (ranks_[r] && !std::filesystem::exists(tmp / format("ready.%zu", r))) {
        REQUIRE(since(start) < 30);
        std::this_thread::sleep_for(std::chrono::milliseconds(2));
      }
  }
  void send(int signal) {
    for (const auto& rank : ranks_) rank->send(signal);
  }
  bool any_ended() {
    return std::any_of(ranks_.begin(), ranks_.end(), [](const auto& r) { return r->ended(); });
  }
  // How each must end that is not `other`, which ends so.
  void check_codes(int code, int other = -1, int others = 0) {
    for (int r = 0; r < static_cast<int>(ranks_.size()); ++r) {
      if (!ranks_[static_cast<size_t>(r)]) continue;
      INFO("rank " << r << ": " << get_bytes(log_file(r)));
      CHECK((*this)[r].wait() == (r == other ? others : code));
    }
  }
  std::string log(int r) const { return get_bytes(log_file(r)); }
  std::string logs() const {
    std::string all;
    for (size_t r = 0; r < ranks_.size(); ++r) all += log(static_cast<int>(r));
    return all;
  }
  // One rank has said this, and none has said more.
  void check_said(const std::string& text) const {
    INFO(logs());
    CHECK(count_of(logs(), text) == 1);
    CHECK(count_of(logs(), "rank ") == 1);
  }

  const TempFolder tmp;
  const int port = free_port();
  const std::string place;

 private:
  std::string log_file(int r) const { return tmp / ("log." + std::to_string(r)); }
  std::vector<std::unique_ptr<Child>> ranks_;
};

// Joins, says so, and works without a word to the others until it is ended.
void work(const Rank& own) {
  const auto ranks = own.join();
  any(*ranks, false);
  own.mark(format("ready.%d", own.rank));
  std::this_thread::sleep_for(std::chrono::seconds(100));
}

}  // namespace

TEST_CASE("tcp: messages and agreement, on 1 to 4 ranks", "[tcp_messages]") {
  auto words = told();
  if (!words) {
    // On this machine alone, by one family of addresses and by both; and open to others.
    for (const auto& [size, host] : std::map<int, std::string>{
             {1, "127.0.0.1"}, {2, "localhost"}, {3, "0.0.0.0"}, {4, "127.0.0.1"}})
      Group("[tcp_messages]", size, 30, -1, host).check_codes(0);
    return;
  }
  const auto ranks = Rank(*std::move(words)).join();
  CHECK(ranks->description() == "TCP");
  check_messages(*ranks);
  check_agreement(*ranks);
  CHECK_THROWS_WITH(ranks->finish_sums(), Catch::Contains("a sum over ranks by TCP"));
  ranks->broadcast(nullptr, 0);
}

// The timeout is far off: that the connection has ended says it.
TEST_CASE("tcp: a rank that is killed is named at once, by one, and the others leave",
          "[tcp_killed]") {
  auto words = told();
  if (words) return work(Rank(*std::move(words)));
  for (const int victim : {0, 2}) {
    Group group("[tcp_killed]", 3, 60);
    group.wait_for_all();
    const Clock::time_point start = Clock::now();
    group[victim].send(SIGKILL);
    group.check_codes(8, victim, 128 + SIGKILL);
    CHECK(since(start) < 5);
    group.check_said(format("rank %d on %s was killed or cut off: its connection ended; do this",
                            victim, host_name().c_str()));
  }
}

TEST_CASE("tcp: a rank that is stopped is named after the timeout, not one that only works",
          "[tcp_stopped]") {
  auto words = told();
  if (words) return work(Rank(*std::move(words)));
  Group groups[] = {Group("[tcp_stopped]", 3, 1), Group("[tcp_stopped]", 3, 1)};
  Group all_stopped("[tcp_stopped]", 3, 1);  // and not lost when they go on
  for (Group& group : groups) group.wait_for_all();
  all_stopped.wait_for_all();
  all_stopped.send(SIGSTOP);
  // Longer than the timeout without a message: nobody is missing.
  std::this_thread::sleep_for(std::chrono::milliseconds(1500));
  all_stopped.send(SIGCONT);
  for (Group& group : groups) REQUIRE_FALSE(group.any_ended());
  const Clock::time_point start = Clock::now();
  for (const int victim : {0, 1}) groups[victim][victim].send(SIGSTOP);
  for (const int victim : {0, 1}) {
    for (int r = 0; r < 3; ++r)
      if (r != victim) CHECK(groups[victim][r].wait() == 8);
    groups[victim].check_said(format("rank %d on %s has given no sign of life for 1 s: it was",
                                     victim, host_name().c_str()));
  }
  CHECK(since(start) > 0.5);
  CHECK(since(start) < 6);
  CHECK_FALSE(all_stopped.any_ended());
}

TEST_CASE("tcp: a rank that fails says why to the others, which may wait for it", "[tcp_failed]") {
  auto words = told();
  if (!words) {
    for (const int victim : {0, 1}) {
      Group group(format("[tcp_failed] -c %d", victim), 3, 30);
      group.check_codes(8, victim, 4);
      group.check_said(format("rank %d on %s failed: no such file", victim, host_name().c_str()));
    }
    return;
  }
  const Rank own(*std::move(words));
  for (const int victim : {0, 1}) SECTION(std::to_string(victim)) {
      const auto ranks = own.join();
      if (own.rank != victim) any(*ranks, false);
      ranks->announce_failure("no such file");
      ::_exit(4);
    }
}

TEST_CASE("tcp: a rank that never comes is no endless wait", "[tcp_missing]") {
  auto words = told();
  if (words) return work(Rank(*std::move(words)));
  Group groups[] = {Group("[tcp_missing]", 3, 1, 0), Group("[tcp_missing]", 3, 1, 2)};
  for (Group& group : groups) {
    group.check_codes(8);
    CHECK(count_of(group.logs(),
                   "the ranks have not all started within 1 s; see whether each "
                   "machine runs the program") == 2);
  }
}

namespace {

// A connection to `port`, as soon as somebody listens, on which `words` were said.
Socket visit(int port, const std::string& words) {
  const sockaddr_in at = local(port);
  for (;;) {
    Socket s(::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0));
    if (::connect(s.fd(), reinterpret_cast<const sockaddr*>(&at), sizeof at) == 0) {
      ::send(s.fd(), words.data(), words.size(), MSG_NOSIGNAL);
      return s;
    }
    std::this_thread::sleep_for(std::chrono::milliseconds(5));
  }
}

// The greeting of a rank.
std::string greeting(int size, int rank, int channel, int version = 1) {
  std::string text = "ddpmcome";
  for (const int32_t v : {version, size, rank, channel})
    text.append(reinterpret_cast<const char*>(&v), sizeof v);
  return text + "nowhere" + std::string(249, '\0');
}

bool dropped(const Socket& s) {
  const timeval patience{5, 0};
  ::setsockopt(s.fd(), SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof patience);
  char byte = 0;
  const ssize_t n = ::recv(s.fd(), &byte, 1, 0);
  return n == 0 || (n < 0 && errno == ECONNRESET);
}

}  // namespace

TEST_CASE("tcp: strangers are dropped, and the ranks meet", "[tcp_stranger]") {
  auto words = told();
  if (words) {
    const Rank own(*std::move(words));
    while (own.rank == 1 && !std::filesystem::exists(own.folder + "/visited"))
      std::this_thread::sleep_for(std::chrono::milliseconds(5));
    check_agreement(*own.join());
    return;
  }
  Group group("[tcp_stranger]", 3, 20);
  const Socket silent = visit(group.port, ""), slow = visit(group.port, "ddpm");
  for (const std::string& text :
       {std::string(1 << 16, 'x'), greeting(4, 1, 0), greeting(3, 0, 0), greeting(3, 3, 0),
        greeting(3, -1, 1), greeting(3, 1, 2), greeting(3, 1, 0, 2)})
    CHECK(dropped(visit(group.port, text)));
  put_bytes(group.tmp / "visited", "");
  group.check_codes(0);
}

// Rank 2 is played here.
TEST_CASE("tcp: a rank that comes twice, whose messages end, or that talks nonsense",
          "[tcp_played]") {
  auto words = told();
  if (words) return work(Rank(*std::move(words)));
  Group groups[] = {Group("[tcp_played]", 3, 20, 2), Group("[tcp_played]", 3, 20, 2)};
  Socket messages[2], signs[2];
  for (const int i : {0, 1}) {
    messages[i] = visit(groups[i].port, greeting(3, 2, 0));
    CHECK(dropped(visit(groups[i].port, greeting(3, 2, 0))));
    signs[i] = visit(groups[i].port, greeting(3, 2, 1));
  }
  messages[0].close();
  const std::string nonsense(12, '\xff');
  ::send(signs[1].fd(), nonsense.data(), nonsense.size(), MSG_NOSIGNAL);
  for (Group& group : groups) {
    group.check_codes(8);
    group.check_said("rank 2 on nowhere was killed or cut off: its connection ended; do this");
  }
}

// The others wait for the last one, longer than the timeout, and nobody is taken for lost.
TEST_CASE("tcp: ranks end together, whichever is the last", "[tcp_end]") {
  auto words = told();
  if (!words) {
    Group groups[] = {Group("[tcp_end] -c 0", 3, 0.5), Group("[tcp_end] -c 1", 3, 0.5)};
    for (Group& group : groups) {
      group.check_codes(0);
      CHECK(count_of(group.logs(), "rank ") == 0);
    }
    return;
  }
  const Rank own(*std::move(words));
  for (const int last : {0, 1}) SECTION(std::to_string(last)) {
      const auto ranks = own.join();
      any(*ranks, false);
      if (own.rank == last) std::this_thread::sleep_for(std::chrono::milliseconds(1000));
    }
}
