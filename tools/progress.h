// Progress on stderr: one line that is rewritten on a terminal, a plain line now and then
// elsewhere.
#pragma once

#include <chrono>
#include <cstdint>
#include <string>

namespace ddpm::tools {

class Progress {
 public:
  // Counts `unit`s ("step", "image") from `first` to `total`. A quiet one, of a rank that is not
  // the first, shows nothing.
  Progress(std::string unit, int64_t first, int64_t total, bool quiet = false);
  ~Progress();

  // Shows done/total, `detail`, the rate and the time left; not more often than is useful.
  void update(int64_t done, const std::string& detail = "");
  // Shows regardless of time.
  void show(int64_t done, const std::string& detail);
  // A line of its own, above the progress line.
  void line(const std::string& text);
  double seconds() const;

 private:
  using Clock = std::chrono::steady_clock;
  std::string unit_;
  int64_t first_, total_;
  bool quiet_, terminal_;
  Clock::time_point start_, shown_;
  size_t width_ = 0;  // of the line on the terminal
};

// "1 h 02 min", "3 min 05 s", "12 s"
std::string duration_text(double seconds);

}  // namespace ddpm::tools
