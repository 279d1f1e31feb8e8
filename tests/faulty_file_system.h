// A file system of which one operation fails, or which stops there as a killed process does.
#pragma once

#include <algorithm>
#include <cerrno>

#include "engine/file_io.h"

namespace ddpm::test {

enum class Fault {
  kNone,
  kOnce,   // one operation fails
  kShort,  // a write takes half, the next operation fails
  kDead,   // this operation and all later ones fail, as if the process were killed there
};

// Counts operations and lets the chosen one fail.
class FaultyFileSystem : public FileSystem {
 public:
  FaultyFileSystem(Fault fault, int at, int error) : fault_(fault), at_(at), error_(error) {}

  bool can_exchange = true;
  size_t longest_write = SIZE_MAX;
  bool was_reached() const { return count_ > at_; }

  int open(const char* path, int flags, mode_t mode) override {
    return fails() ? -1 : FileSystem::open(path, flags, mode);
  }
  ssize_t write(int fd, const void* data, size_t bytes) override {
    if (fault_ == Fault::kShort && count_ == at_ && bytes > 1) {
      fault_ = Fault::kOnce;
      at_ = ++count_;
      return FileSystem::write(fd, data, bytes / 2);
    }
    return fails() ? -1 : FileSystem::write(fd, data, std::min(bytes, longest_write));
  }
  int truncate(int fd, off_t bytes) override {
    return fails() ? -1 : FileSystem::truncate(fd, bytes);
  }
  int sync(int) override { return fails() ? -1 : 0; }  // a real one would take milliseconds
  int close(int fd) override {  // as the kernel, which closes even where it reports an error
    const int result = FileSystem::close(fd);
    return fails() ? -1 : result;
  }
  int rename(const char* from, const char* to) override {
    return fails() ? -1 : FileSystem::rename(from, to);
  }
  int exchange(const char* a, const char* b) override {
    if (can_exchange) return fails() ? -1 : FileSystem::exchange(a, b);
    errno = EINVAL;
    return -1;
  }
  int make_folder(const char* path) override {
    return fails() ? -1 : FileSystem::make_folder(path);
  }
  int remove_file(const char* path) override {
    return fails() ? -1 : FileSystem::remove_file(path);
  }
  int remove_folder(const char* path) override {
    return fails() ? -1 : FileSystem::remove_folder(path);
  }

 private:
  bool fails() {
    const int k = count_++;
    if (fault_ == Fault::kNone || k < at_ || (k > at_ && fault_ != Fault::kDead)) return false;
    errno = error_;
    return true;
  }

  Fault fault_;
  int at_;
  int error_;
  int count_ = 0;
};

}  // namespace ddpm::test
