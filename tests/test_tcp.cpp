// Ranks over TCP, for real: each case is its own ranks, as processes.
#include <catch2/catch.hpp>

#include <chrono>
#include <csignal>
#include <cstdlib>
#include <filesystem>
#include <functional>
#include <memory>
#include <optional>
#include <thread>

#include "engine/comm.h"
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

// Ranks of a test case, of which some may not come.
class Group {
 public:
  Group(const std::string& test_case, int size, double timeout, int missing = -1)
      : ranks_(static_cast<size_t>(size)) {
    for (int r = 0; r < size; ++r) {
      if (r == missing) continue;
      ::setenv(
          "DDPM_TCP_RANK",
          format("%d %d %g %s %s", r, size, timeout, place.c_str(), tmp.path().c_str()).c_str(), 1);
      ranks_[static_cast<size_t>(r)] =
          std::make_unique<Child>(own_program(), test_case, log_file(r));
    }
    ::unsetenv("DDPM_TCP_RANK");
  }
  Child& operator[](int r) { return *ranks_[static_cast<size_t>(r)]; }
  void wait_for(const std::string& mark) {
    const Clock::time_point start = Clock::now();
    while (!std::filesystem::exists(tmp / mark)) {
      REQUIRE(since(start) < 30);
      std::this_thread::sleep_for(std::chrono::milliseconds(2));
    }
  }
  std::string log(int r) const { return get_bytes(log_file(r)); }
  std::string logs() const {
    std::string all;
    for (size_t r = 0; r < ranks_.size(); ++r)
      if (ranks_[r]) all += log(static_cast<int>(r));
    return all;
  }

  const TempFolder tmp;
  const std::string place = free_place();

 private:
  std::string log_file(int r) const { return tmp / ("log." + std::to_string(r)); }
  std::vector<std::unique_ptr<Child>> ranks_;
};

// Joins, says so, and works without a word to the others until it is ended.
void work(const Rank& own) {
  const auto ranks = own.join();
  any(*ranks, false);
  own.mark("ready");
  std::this_thread::sleep_for(std::chrono::seconds(100));
}

int count_of(const std::string& text, const std::string& part) {
  int n = 0;
  for (size_t at = 0; (at = text.find(part, at)) != std::string::npos; ++at) ++n;
  return n;
}

}  // namespace

TEST_CASE("tcp: messages and agreement, on 1 to 4 ranks", "[tcp_messages]") {
  auto words = told();
  if (!words) {
    for (int size : {1, 2, 4}) {
      Group group("[tcp_messages]", size, 30);
      for (int r = 0; r < size; ++r) {
        const int code = group[r].wait();
        INFO(group.log(r));
        CHECK(code == 0);
      }
    }
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
    group.wait_for("ready");
    std::this_thread::sleep_for(std::chrono::milliseconds(200));  // until all are
    const Clock::time_point start = Clock::now();
    group[victim].send(SIGKILL);
    for (int r = 0; r < 3; ++r) CHECK(group[r].wait() == (r == victim ? 128 + SIGKILL : 8));
    CHECK(since(start) < 5);
    const std::string logs = group.logs();
    INFO(logs);
    CHECK(
        count_of(logs, format("rank %d on %s was killed or cut off: its connection ended; do this",
                              victim, host_name().c_str())) == 1);
    CHECK(count_of(logs, "rank ") == 1);
  }
}

TEST_CASE("tcp: a rank that is stopped is named after the timeout, not one that only works",
          "[tcp_stopped]") {
  auto words = told();
  if (words) return work(Rank(*std::move(words)));
  for (const int victim : {0, 1}) {
    Group group("[tcp_stopped]", 3, 1);
    group.wait_for("ready");
    // Twice the timeout without a message: nobody is missing.
    std::this_thread::sleep_for(std::chrono::seconds(2));
    for (int r = 0; r < 3; ++r) REQUIRE_FALSE(group[r].ended());
    const Clock::time_point start = Clock::now();
    group[victim].send(SIGSTOP);
    for (int r = 0; r < 3; ++r)
      if (r != victim) CHECK(group[r].wait() == 8);
    CHECK(since(start) > 0.5);
    CHECK(since(start) < 6);
    const std::string logs = group.logs();
    INFO(logs);
    CHECK(count_of(logs, format("rank %d on %s has given no sign of life for 1 s", victim,
                                host_name().c_str())) == 1);
    CHECK(count_of(logs, "rank ") == 1);
  }
}

TEST_CASE("tcp: a rank that fails says why to the others, which may wait for it", "[tcp_failed]") {
  auto words = told();
  if (!words) {
    for (const int victim : {0, 1}) {
      Group group(format("[tcp_failed] -c %d", victim), 3, 30);
      for (int r = 0; r < 3; ++r) CHECK(group[r].wait() == (r == victim ? 4 : 8));
      const std::string logs = group.logs();
      INFO(logs);
      CHECK(count_of(logs, format("rank %d on %s failed: no such file", victim,
                                  host_name().c_str())) == 1);
      CHECK(count_of(logs, "rank ") == 1);
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
  for (const int missing : {0, 2}) {
    Group group("[tcp_missing]", 3, 1, missing);
    for (int r = 0; r < 3; ++r) {
      if (r == missing) continue;
      CHECK(group[r].wait() == 8);
      INFO(group.log(r));
      CHECK(count_of(group.log(r),
                     "the ranks have not all started within 1 s; see whether each "
                     "machine runs the program") == 1);
    }
  }
}

namespace {

// Connects to `place` as soon as somebody listens, and says `words`.
int visit(const std::string& place, const std::string& words) {
  sockaddr_in at{.sin_family = AF_INET,
                 .sin_port = htons(static_cast<uint16_t>(std::stoi(place.substr(10)))),
                 .sin_addr = {htonl(INADDR_LOOPBACK)},
                 .sin_zero = {}};
  for (;;) {
    const int fd = ::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (::connect(fd, reinterpret_cast<sockaddr*>(&at), sizeof at) == 0) {
      ::send(fd, words.data(), words.size(), MSG_NOSIGNAL);
      return fd;
    }
    ::close(fd);
    std::this_thread::sleep_for(std::chrono::milliseconds(5));
  }
}

// The greeting of a rank.
std::string greeting(int32_t size, int32_t rank, int32_t channel, uint32_t version = 1) {
  std::string text = "ddpmcome";
  for (const uint32_t v : {version, static_cast<uint32_t>(size), static_cast<uint32_t>(rank),
                           static_cast<uint32_t>(channel)})
    text.append(reinterpret_cast<const char*>(&v), sizeof v);
  return text + "nowhere" + std::string(249, '\0');
}

// Whether the other side has hung up.
bool dropped(int fd) {
  const timeval patience{5, 0};
  ::setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof patience);
  char byte = 0;
  return ::recv(fd, &byte, 1, 0) <= 0 && errno != EAGAIN;
}

}  // namespace

TEST_CASE("tcp: strangers are dropped, and the ranks meet", "[tcp_stranger]") {
  auto words = told();
  if (words) {
    const Rank own(*std::move(words));
    if (own.rank == 1)  // when the strangers have been
      while (!std::filesystem::exists(own.folder + "/visited"))
        std::this_thread::sleep_for(std::chrono::milliseconds(5));
    const auto ranks = own.join();
    check_agreement(*ranks);
    return;
  }
  Group group("[tcp_stranger]", 3, 20);
  std::vector<int> open{visit(group.place, ""), visit(group.place, "ddpm")};
  std::vector<std::string> refused{std::string(1 << 16, 'x'), greeting(4, 1, 0),  greeting(3, 0, 0),
                                   greeting(3, 3, 0),         greeting(3, -1, 1), greeting(3, 1, 2),
                                   greeting(3, 1, 0, 2)};
  for (const std::string& text : refused) {
    errno = 0;
    const int fd = visit(group.place, text);
    CHECK(dropped(fd));
    ::close(fd);
  }
  // Rank 2 has come by now, or this is rank 2 and it has not: one of the two is dropped, and the
  // rank that is in earnest would not meet. So it is waited for.
  std::this_thread::sleep_for(std::chrono::milliseconds(500));
  errno = 0;
  const int twice = visit(group.place, greeting(3, 2, 1));
  CHECK(dropped(twice));
  put_bytes(group.tmp / "visited", "");
  for (int r = 0; r < 3; ++r) {
    const int code = group[r].wait();
    INFO(group.log(r));
    CHECK(code == 0);
  }
  for (int fd : open) ::close(fd);
  ::close(twice);
}

// The others wait for the last one, longer than the timeout, and nobody is taken for lost.
TEST_CASE("tcp: ranks end together, whichever is the last", "[tcp_end]") {
  auto words = told();
  if (!words) {
    for (const int last : {0, 1}) {
      Group group(format("[tcp_end] -c %d", last), 3, 0.5);
      for (int r = 0; r < 3; ++r) {
        const int code = group[r].wait();
        INFO(group.log(r));
        CHECK(code == 0);
        CHECK(group.log(r).find("rank ") == std::string::npos);
      }
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
