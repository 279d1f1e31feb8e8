#include "kernels/error.h"

#include <cstdarg>
#include <cstdio>

namespace ddpm {
namespace {

std::string vformat(const char* format, va_list args) {
  va_list copy;
  va_copy(copy, args);
  const int length = std::vsnprintf(nullptr, 0, format, copy);
  va_end(copy);
  if (length <= 0) return {};
  std::string text(static_cast<size_t>(length), '\0');
  std::vsnprintf(text.data(), text.size() + 1, format, args);
  return text;
}

}  // namespace

std::string format(const char* format, ...) {
  va_list args;
  va_start(args, format);
  std::string text = vformat(format, args);
  va_end(args);
  return text;
}

void fail(Status status, const char* format, ...) {
  va_list args;
  va_start(args, format);
  std::string text = vformat(format, args);
  va_end(args);
  throw Error(status, text);
}

void fail_check(const char* condition, const char* file, int line, const std::string& detail) {
  throw Error(Status::kBug, format("internal error: %s (%s, %s:%d); please report it",
                                   detail.c_str(), condition, file, line));
}

}  // namespace ddpm
