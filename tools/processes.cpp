#include "tools/processes.h"

#include <signal.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <fstream>
#include <iterator>
#include <utility>

namespace ddpm::tools {
namespace {

using Clock = std::chrono::steady_clock;

constexpr int kFirstPort = 20000, kPorts = 20000;
constexpr int kHandedOn[] = {SIGINT, SIGTERM, SIGUSR1};

// Blocks what the parent waits for, and gives back the mask that a child starts with.
class Signals {
 public:
  Signals() {
    sigemptyset(&set_);
    for (int signal : kHandedOn) sigaddset(&set_, signal);
    sigaddset(&set_, SIGCHLD);
    pthread_sigmask(SIG_BLOCK, &set_, &before_);
  }
  ~Signals() { pthread_sigmask(SIG_SETMASK, &before_, nullptr); }
  Signals(const Signals&) = delete;
  Signals& operator=(const Signals&) = delete;

  const sigset_t& before() const { return before_; }
  // The next one, or 0 after a while.
  int next() const {
    const timespec while_{0, 200'000'000};
    return std::max(0, sigtimedwait(&set_, nullptr, &while_));
  }

 private:
  sigset_t set_, before_;
};

[[noreturn]] void become(std::vector<std::string> command, int rank, int count, pid_t parent,
                         const sigset_t& mask) {
  prctl(PR_SET_PDEATHSIG, SIGKILL);
  if (getppid() != parent) _exit(static_cast<int>(Status::kPeer));
  setpgid(0, 0);  // a terminal's Ctrl-C goes to the parent, which hands it on: once
  pthread_sigmask(SIG_SETMASK, &mask, nullptr);
  const std::string port = std::to_string(kFirstPort + parent % kPorts);
  for (const auto& [name, value] :
       {std::pair<const char*, std::string>{"WORLD_SIZE", std::to_string(count)},
        {"RANK", std::to_string(rank)},
        {"LOCAL_RANK", std::to_string(rank)},
        {"MASTER_ADDR", "127.0.0.1"},
        {"MASTER_PORT", port}})
    setenv(name, value.c_str(), 1);
  std::vector<char*> argv;
  for (std::string& word : command) argv.push_back(word.data());
  argv.push_back(nullptr);
  execv(argv[0], argv.data());
  std::fprintf(stderr, "ddpm: cannot start %s: %s\n", argv[0], std::strerror(errno));
  _exit(static_cast<int>(Status::kFile));
}

class Processes {
 public:
  Processes(const std::vector<std::string>& command, int count, const Signals& signals) {
    const pid_t parent = getpid();
    for (int rank = 0; rank < count; ++rank) {
      const pid_t child = fork();
      if (child == 0) become(command, rank, count, parent, signals.before());
      if (child < 0) {
        send(SIGKILL);
        fail(Status::kMemory, "cannot start rank %d: %s", rank, std::strerror(errno));
      }
      running_.push_back(child);
    }
    left_ = count;
  }

  bool any_left() const { return left_ > 0; }
  bool failed() const { return first_ != Status::kOk; }
  Status status() const { return failed() ? first_ : stopped_ ? Status::kStopped : Status::kOk; }
  void send(int signal) const {
    for (pid_t p : running_)
      if (p > 0) kill(p, signal);
  }
  // Notes those that have ended.
  void reap(const std::string& advice) {
    for (size_t rank = 0; rank < running_.size(); ++rank) {
      int how = 0;
      if (running_[rank] == 0 || waitpid(running_[rank], &how, WNOHANG) != running_[rank]) continue;
      const pid_t process = std::exchange(running_[rank], 0);
      --left_;
      const Status ended = WIFEXITED(how) ? static_cast<Status>(WEXITSTATUS(how)) : Status::kPeer;
      stopped_ = stopped_ || ended == Status::kStopped;
      if (failed() || ended == Status::kOk || ended == Status::kStopped) continue;
      first_ = ended;
      if (WIFSIGNALED(how))
        std::fprintf(stderr, "\nddpm: rank %zu (process %d) was killed by signal %d (%s); %s\n",
                     rank, static_cast<int>(process), WTERMSIG(how), strsignal(WTERMSIG(how)),
                     advice.c_str());
    }
  }

 private:
  std::vector<pid_t> running_;  // by rank; 0: ended
  int left_ = 0;
  bool stopped_ = false;
  Status first_ = Status::kOk;
};

}  // namespace

Status run_processes(const std::vector<std::string>& command, int count, double grace,
                     const std::string& advice) {
  const Signals signals;
  Processes ranks(command, count, signals);
  Clock::time_point end = Clock::time_point::max();
  while (ranks.any_left()) {
    const int signal = signals.next();
    if (signal != 0 && signal != SIGCHLD) ranks.send(signal);
    ranks.reap(advice);
    if (ranks.failed() && end == Clock::time_point::max())
      end = Clock::now() +
            std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(grace));
    if (Clock::now() > end) ranks.send(SIGKILL);
  }
  return ranks.status();
}

std::vector<std::string> own_command() {
  std::ifstream file("/proc/self/cmdline");
  const std::string line{std::istreambuf_iterator<char>(file), {}};
  std::vector<std::string> words;
  for (size_t at = 0; at < line.size();) {
    words.emplace_back(line.c_str() + at);
    at += words.back().size() + 1;
  }
  if (!words.empty()) words[0] = "/proc/self/exe";
  return words;
}

}  // namespace ddpm::tools
