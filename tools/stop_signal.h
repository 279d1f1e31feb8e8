// SIGINT, SIGTERM and SIGUSR1 (which Slurm sends before it takes a node back) as a question instead
// of an interruption: a run stops at its next step. A second signal ends the process at once, also
// in the middle of a step or a save.
#pragma once

#include <atomic>
#include <csignal>
#include <thread>

namespace ddpm::tools {

class StopSignal {
 public:
  // Blocks the signals in this thread and in those that it starts later. Make it before any other
  // thread of the process: a signal ends the process where one thread does not block it.
  StopSignal();
  ~StopSignal();
  StopSignal(const StopSignal&) = delete;
  StopSignal& operator=(const StopSignal&) = delete;

  // Whether one has come.
  bool raised() const { return raised_.load(); }

 private:
  void wait();

  sigset_t set_, before_;
  std::atomic<bool> raised_{false}, done_{false};
  std::thread waiting_;
};

}  // namespace ddpm::tools
