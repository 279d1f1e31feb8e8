#include "tools/progress.h"

#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "kernels/error.h"

namespace ddpm::tools {
namespace {

constexpr double kTerminalSeconds = 0.2, kPlainSeconds = 10;

bool rewritable_terminal() {
  const char* term = std::getenv("TERM");
  return isatty(STDERR_FILENO) != 0 && term != nullptr && std::strcmp(term, "dumb") != 0;
}

}  // namespace

std::string duration_text(double seconds) {
  const int64_t s = static_cast<int64_t>(seconds + 0.5);
  if (s >= 3600)
    return format("%lld h %02lld min", static_cast<long long>(s / 3600),
                  static_cast<long long>(s / 60 % 60));
  if (s >= 60)
    return format("%lld min %02lld s", static_cast<long long>(s / 60),
                  static_cast<long long>(s % 60));
  return format("%lld s", static_cast<long long>(s));
}

Progress::Progress(std::string unit, int64_t first, int64_t total, bool quiet)
    : unit_(std::move(unit)),
      first_(first),
      total_(total),
      quiet_(quiet),
      terminal_(rewritable_terminal()),
      start_(Clock::now()),
      shown_(start_) {}

Progress::~Progress() {
  if (width_ > 0) std::fputc('\n', stderr);
}

double Progress::seconds() const {
  return std::chrono::duration<double>(Clock::now() - start_).count();
}

void Progress::update(int64_t done, const std::string& detail) {
  const double since = std::chrono::duration<double>(Clock::now() - shown_).count();
  if (since >= (terminal_ ? kTerminalSeconds : kPlainSeconds)) show(done, detail);
}

void Progress::show(int64_t done, const std::string& detail) {
  shown_ = Clock::now();
  if (quiet_) return;
  const double elapsed = std::max(seconds(), 1e-9);
  const double rate = static_cast<double>(done - first_) / elapsed;
  std::string text = format("%s %lld/%lld", unit_.c_str(), static_cast<long long>(done),
                            static_cast<long long>(total_));
  if (!detail.empty()) text += "  " + detail;
  if (done > first_) {
    text += format("  %.*f %ss/s", rate < 10 ? 2 : 0, rate, unit_.c_str());
    if (done < total_)
      text += "  " + duration_text(static_cast<double>(total_ - done) / rate) + " left";
  }
  if (!terminal_) {
    std::fprintf(stderr, "%s\n", text.c_str());
    return;
  }
  const size_t width = text.size();
  if (width < width_) text.append(width_ - width, ' ');
  width_ = width;
  std::fprintf(stderr, "\r%s", text.c_str());
  std::fflush(stderr);
}

void Progress::line(const std::string& text) {
  if (quiet_) return;
  if (width_ > 0) std::fprintf(stderr, "\r%*s\r", static_cast<int>(width_), "");
  width_ = 0;
  std::fprintf(stderr, "%s\n", text.c_str());
}

}  // namespace ddpm::tools
