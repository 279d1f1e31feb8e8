// Errors: what went wrong, where, and what to do. Every failure that a file, a user or a device can
// cause is thrown as Error; its status is the program's exit code.
#pragma once

#include <stdexcept>
#include <string>

namespace ddpm {

enum class Status {
  kOk = 0,
  kUsage = 2,      // what the user typed
  kConfig = 3,     // missing or unusable model, config, preset, data folder; size mismatch
  kFile = 4,       // unreadable, damaged or wrong-length file; unwritable or full output
  kMemory = 5,     // host or device memory
  kDevice = 6,     // no device or driver
  kNonFinite = 7,  // not finite or diverged
  kPeer = 8,       // another rank was lost
  kFull = 9,       // a queue that takes no more now; no exit code of the program
  kTimeout = 10,   // a deadline passed; no exit code of the program
  kBug = 70,       // a broken invariant of this program
  kStopped = 75,   // stopped by a signal, resumable
};

class Error : public std::runtime_error {
 public:
  Error(Status status, const std::string& message) : std::runtime_error(message), status_(status) {}
  Status status() const { return status_; }

 private:
  Status status_;
};

// Throws Error with a printf-formatted message.
[[noreturn]] void fail(Status status, const char* format, ...)
    __attribute__((format(printf, 2, 3)));

// printf into a std::string.
std::string format(const char* format, ...) __attribute__((format(printf, 1, 2)));

[[noreturn]] void fail_check(const char* condition, const char* file, int line,
                             const std::string& detail);

}  // namespace ddpm

// An invariant of this program, not of its input: throws Error(kBug) naming the expression.
// The remaining arguments are a printf format and its values.
#define DDPM_CHECK(condition, ...)                                                     \
  do {                                                                                 \
    if (!(condition))                                                                  \
      ::ddpm::fail_check(#condition, __FILE__, __LINE__, ::ddpm::format(__VA_ARGS__)); \
  } while (false)
