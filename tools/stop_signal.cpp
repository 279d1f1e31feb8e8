#include "tools/stop_signal.h"

#include <ctime>

namespace ddpm::tools {

StopSignal::StopSignal() {
  sigemptyset(&set_);
  sigaddset(&set_, SIGINT);
  sigaddset(&set_, SIGTERM);
  pthread_sigmask(SIG_BLOCK, &set_, &before_);
}

StopSignal::~StopSignal() { pthread_sigmask(SIG_SETMASK, &before_, nullptr); }

bool StopSignal::raised() {
  if (raised_) return true;
  const timespec now{};
  if (sigtimedwait(&set_, nullptr, &now) < 0) return false;
  raised_ = true;
  pthread_sigmask(SIG_SETMASK, &before_, nullptr);
  return true;
}

}  // namespace ddpm::tools
