// SIGINT and SIGTERM as a question instead of an interruption: a run stops at its next step. A
// second signal ends the process at once.
#pragma once

#include <csignal>

namespace ddpm::tools {

class StopSignal {
 public:
  // Blocks the signals in this thread and those it starts later.
  StopSignal();
  ~StopSignal();
  StopSignal(const StopSignal&) = delete;
  StopSignal& operator=(const StopSignal&) = delete;

  // Whether one has come. The first time it has, the signals get their usual effect back.
  bool raised();

 private:
  sigset_t set_, before_;
  bool raised_ = false;
};

}  // namespace ddpm::tools
