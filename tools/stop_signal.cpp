#include "tools/stop_signal.h"

#include <ctime>

namespace ddpm::tools {

StopSignal::StopSignal() {
  sigemptyset(&set_);
  for (int signal : {SIGINT, SIGTERM, SIGUSR1}) sigaddset(&set_, signal);
  pthread_sigmask(SIG_BLOCK, &set_, &before_);
  waiting_ = std::thread([this] { wait(); });
}

StopSignal::~StopSignal() {
  done_ = true;
  pthread_kill(waiting_.native_handle(), SIGUSR1);
  waiting_.join();
  const timespec now{};
  while (sigtimedwait(&set_, nullptr, &now) > 0) {  // one that came too late must not end us now
  }
  pthread_sigmask(SIG_SETMASK, &before_, nullptr);
}

void StopSignal::wait() {
  for (int signal = 0;;) {
    if (sigwait(&set_, &signal) != 0) continue;
    if (done_) return;
    if (!raised_.exchange(true)) continue;
    std::signal(signal, SIG_DFL);
    pthread_sigmask(SIG_UNBLOCK, &set_, nullptr);
    raise(signal);
  }
}

}  // namespace ddpm::tools
