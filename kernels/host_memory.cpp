#include "kernels/host_memory.h"

#include <algorithm>
#include <cstdint>
#include <fstream>
#include <limits>
#include <string>

namespace ddpm {
namespace {

constexpr size_t kUnknown = std::numeric_limits<size_t>::max();

size_t system_available() {
  std::ifstream file("/proc/meminfo");
  std::string key;
  size_t kib = 0;
  while (file >> key >> kib) {
    if (key == "MemAvailable:") return kib * 1024;
    file.ignore(std::numeric_limits<std::streamsize>::max(), '\n');
  }
  return kUnknown;
}

// A number in a file; unknown where there is none ("max").
size_t number_in(const char* path) {
  std::ifstream file(path);
  size_t value = 0;
  return file >> value ? value : kUnknown;
}

size_t group_available() {
  const size_t limit = number_in("/sys/fs/cgroup/memory.max");
  const size_t used = number_in("/sys/fs/cgroup/memory.current");
  if (limit == kUnknown || used == kUnknown) return kUnknown;
  return limit > used ? limit - used : 0;
}

}  // namespace

size_t available_host_memory() { return std::min(system_available(), group_available()); }

}  // namespace ddpm
