// What ranks say of one that is lost, whatever carries their messages.
#pragma once

#include <algorithm>
#include <chrono>
#include <string>

#include "engine/comm.h"

namespace ddpm {

// Lets the rank that failed end before those that it told.
constexpr auto kAfterFailure = std::chrono::milliseconds(500);
// For telling others before this rank leaves.
constexpr auto kTelling = std::chrono::milliseconds(1000);

// One rank says it: rank 0, or 1 when 0 is lost.
inline bool says_it(int rank, int lost) { return rank == (lost == 0 ? 1 : 0); }
// Between two signs of life.
inline std::chrono::duration<double> sign_interval(const CommOptions& o) {
  return std::chrono::duration<double>(std::min(o.timeout / 4, 1.0));
}

inline std::string not_started_text(const CommOptions& o) {
  return format(
      "the ranks have not all started within %.0f s; see whether each machine runs the program, or "
      "give more time by --comm-timeout",
      o.timeout);
}
inline std::string silent_text(int rank, const std::string& host, const CommOptions& o) {
  return format(
      "rank %d on %s has given no sign of life for %.0f s: it was killed, stopped or cut off; %s",
      rank, host.c_str(), o.timeout, o.advice.c_str());
}
inline std::string ended_text(int rank, const std::string& host, const CommOptions& o) {
  return format("rank %d on %s was killed or cut off: its connection ended; %s", rank, host.c_str(),
                o.advice.c_str());
}
inline std::string failed_text(int rank, const std::string& host, const std::string& why) {
  return format("rank %d on %s failed: %s", rank, host.c_str(), why.c_str());
}

}  // namespace ddpm
