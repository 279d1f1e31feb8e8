// Files: bounded reads, and writes that are complete or absent. A file or folder is written under a
// temporary name, made durable, and renamed into place; at every instant the old content or the new
// one stands under the final name. Failures throw Error(kFile) naming path, reason and remedy.
#pragma once

#include <sys/types.h>

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "kernels/error.h"

namespace ddpm {

// The system calls that change the disk, each returning as the call does (-1 and errno). Every
// write of the engine goes through here, so that a test can make any one of them fail.
class FileSystem {
 public:
  virtual ~FileSystem() = default;
  virtual int open(const char* path, int flags, mode_t mode);
  virtual ssize_t write(int fd, const void* data, size_t bytes);
  virtual int truncate(int fd, off_t bytes);
  virtual int sync(int fd);
  virtual int close(int fd);
  virtual int rename(const char* from, const char* to);
  virtual int exchange(const char* a, const char* b);  // two names swap what they stand for
  virtual int make_folder(const char* path);
  virtual int remove_file(const char* path);
  virtual int remove_folder(const char* path);

  static FileSystem& real();
};

bool file_exists(const std::string& path);    // a regular file, or a link to one
bool folder_exists(const std::string& path);  // a folder, or a link to one

// A regular file open for reading. It is opened once; its size is what it was then.
class InputFile {
 public:
  // `missing` is the status of the error when there is no such file.
  explicit InputFile(std::string path, Status missing = Status::kFile);
  // Bytes that are here already, and what messages call them.
  InputFile(std::string name, std::vector<uint8_t> bytes);
  ~InputFile();
  InputFile(const InputFile&) = delete;
  InputFile& operator=(const InputFile&) = delete;

  const std::string& path() const { return path_; }
  uint64_t size() const { return size_; }
  // All of [offset, offset + bytes), or an error.
  void read(uint64_t offset, void* to, size_t bytes) const;

 private:
  std::string path_;
  int fd_ = -1;
  std::vector<uint8_t> bytes_;  // instead of the file
  uint64_t size_ = 0;
};

// The whole file; an error if it is longer than `max_bytes`.
std::string read_small_file(const std::string& path, size_t max_bytes,
                            Status missing = Status::kFile);

class OutputFolder;

// A file being written; commit() puts it in place, the destructor without commit() removes it.
// After an error only destruction is left.
class OutputFile {
 public:
  explicit OutputFile(const std::string& path, FileSystem& fs = FileSystem::real());
  ~OutputFile();
  OutputFile(const OutputFile&) = delete;
  OutputFile& operator=(const OutputFile&) = delete;

  const std::string& path() const { return path_; }
  void write(const void* data, size_t bytes);
  void write(std::string_view bytes) { write(bytes.data(), bytes.size()); }
  void commit();

 private:
  friend class OutputFolder;
  OutputFile(std::string path, std::string written_path, OutputFolder& folder);
  void create(int extra_flags);

  FileSystem& fs_;
  OutputFolder* folder_ = nullptr;  // renames for all its files; null: this file renames itself
  std::string path_;                // the final name, which messages use
  std::string written_path_;        // the name until commit()
  int fd_ = -1;
  bool failed_ = false;
  bool committed_ = false;
};

// A folder being written as one unit, replacing an older one of the same name. Files are made with
// file() and committed one by one, then the folder is. Creation removes what crashed saves of the
// same name left behind. One writer per name at a time.
class OutputFolder {
 public:
  explicit OutputFolder(const std::string& path, FileSystem& fs = FileSystem::real());
  ~OutputFolder();
  OutputFolder(const OutputFolder&) = delete;
  OutputFolder& operator=(const OutputFolder&) = delete;

  const std::string& path() const { return path_; }
  // `name` is relative, e.g. "unet/config.json"; missing subfolders are made.
  OutputFile file(const std::string& name);
  void commit();

 private:
  friend class OutputFile;

  FileSystem& fs_;
  std::string path_;
  std::string written_path_;
  std::vector<std::string> subfolders_;  // relative to written_path_
  int uncommitted_files_ = 0;
  bool committed_ = false;
};

// Removes the temporaries that crashed saves of `path` (file or folder) left beside it. An older
// folder that was moved aside and not yet replaced gets its name back. Call before reading `path`
// where a crash may have happened, and while nobody writes it.
void recover(const std::string& path, FileSystem& fs = FileSystem::real());

// recover() for every name in a folder that a crashed save has left something of.
void recover_all(const std::string& folder, FileSystem& fs = FileSystem::real());

// Removes a folder and what it holds; a crash leaves all of it, or what recover_all() removes.
void remove_whole_folder(const std::string& path, FileSystem& fs = FileSystem::real());

// Makes `path` and its missing parents.
void make_folders(const std::string& path, FileSystem& fs = FileSystem::real());

// Writes a whole file as OutputFile does.
void write_file(const std::string& path, std::string_view bytes,
                FileSystem& fs = FileSystem::real());

// A file of lines that only grows. A last line without its newline (a crash in mid-write) is
// dropped on opening; a line that fails to be written whole is taken back.
class AppendFile {
 public:
  explicit AppendFile(std::string path, FileSystem& fs = FileSystem::real());
  ~AppendFile();
  AppendFile(const AppendFile&) = delete;
  AppendFile& operator=(const AppendFile&) = delete;

  void append_line(std::string_view line);  // without the newline
  void append(std::string_view bytes);      // of a file of something else than lines, made anew

 private:
  FileSystem& fs_;
  std::string path_;
  int fd_ = -1;
};

}  // namespace ddpm
