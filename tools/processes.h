// Ranks on one machine that this program starts by itself: --gpus N.
#pragma once

#include <string>
#include <vector>

#include "kernels/error.h"

namespace ddpm::tools {

// Starts `command` (a path and arguments) `count` times, each told by torchrun's variables which
// rank it is, and waits for them. SIGINT, SIGTERM and SIGUSR1 are handed on. When one has failed,
// the others have `grace` seconds to leave by themselves before they are killed; if this process
// dies, they do too. Returns what the first one that failed returned, or kPeer if it was killed,
// after saying which it was and what to do, `advice`; kStopped if any was stopped by a signal and
// none failed.
Status run_processes(const std::vector<std::string>& command, int count, double grace,
                     const std::string& advice);

// This process's own command, as it was typed.
std::vector<std::string> own_command();

}  // namespace ddpm::tools
