// What the targets have in common. A parser may refuse a file by Error, in one line and with the
// status of a file; whatever else leaves it ends the process, which libFuzzer reports.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <string_view>

#include "kernels/error.h"

extern "C" size_t LLVMFuzzerMutate(uint8_t* data, size_t size, size_t max_size);

namespace ddpm::fuzz {

inline std::string_view text_of(const uint8_t* data, size_t size) {
  return {reinterpret_cast<const char*>(data), size};
}

template <typename F>
int parse(F f) {
  try {
    f();
  } catch (const Error& e) {
    const std::string_view what = e.what();
    const bool of_file = e.status() == Status::kFile || e.status() == Status::kConfig;
    if (!of_file || what.empty() || what.find('\n') != what.npos) std::abort();
  }
  return 0;
}

// A file in memory that has a path.
class MemoryFile {
 public:
  MemoryFile(const uint8_t* data, size_t size) : fd_(memfd_create("fuzz", MFD_CLOEXEC)) {
    if (fd_ < 0 || write(fd_, data, size) != static_cast<ssize_t>(size)) std::abort();
  }
  ~MemoryFile() { close(fd_); }
  MemoryFile(const MemoryFile&) = delete;
  MemoryFile& operator=(const MemoryFile&) = delete;
  std::string path() const { return "/proc/self/fd/" + std::to_string(fd_); }

 private:
  int fd_;
};

// A folder with one file, whose content changes. Lies in memory, if the machine has such a place.
class OneFileFolder {
 public:
  explicit OneFileFolder(const char* name) {
    char path[] = "/dev/shm/ddpm-fuzz-XXXXXX", elsewhere[] = "/tmp/ddpm-fuzz-XXXXXX";
    const char* made = mkdtemp(path);
    if (made == nullptr) made = mkdtemp(elsewhere);
    if (made == nullptr) std::abort();
    folder_ = made;
    file_ = folder_ + "/" + name;
  }
  ~OneFileFolder() {
    unlink(file_.c_str());
    rmdir(folder_.c_str());
  }
  OneFileFolder(const OneFileFolder&) = delete;
  OneFileFolder& operator=(const OneFileFolder&) = delete;

  const std::string& path() const { return folder_; }
  void put(const uint8_t* data, size_t size) {
    FILE* file = std::fopen(file_.c_str(), "wb");
    if (file == nullptr || std::fwrite(data, 1, size, file) != size || std::fclose(file) != 0)
      std::abort();
  }

 private:
  std::string folder_, file_;
};

}  // namespace ddpm::fuzz
