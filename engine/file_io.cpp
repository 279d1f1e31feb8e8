#include "engine/file_io.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <filesystem>
#include <limits>
#include <system_error>
#include <utility>

namespace ddpm {
namespace {

// What to do about an errno value, where that is known.
const char* remedy(int error) {
  switch (error) {
    case ENOENT:
    case ENOTDIR:
      return "; check the path";
    case EACCES:
    case EPERM:
    case EROFS:
      return "; check the permissions, or choose another place";
    case ENOSPC:
    case EDQUOT:
    case EFBIG:
      return "; free some space, or choose another place";
    case EIO:
      return "; check the disk";
    case EMFILE:
    case ENFILE:
      return "; raise the limit of open files (ulimit -n)";
    case ENAMETOOLONG:
      return "; choose a shorter name";
    default:
      return "";
  }
}

[[noreturn]] void fail_io(const char* doing, const std::string& path, int error,
                          Status status = Status::kFile) {
  fail(status, "cannot %s '%s': %s%s", doing, path.c_str(),
       std::generic_category().message(error).c_str(), remedy(error));
}

// Repeats a call that a signal interrupted.
template <typename F>
auto uninterrupted(F call) {
  auto result = call();
  while (result < 0 && errno == EINTR) result = call();
  return result;
}

mode_t mode_of(const std::string& path) {  // 0 where there is nothing
  struct stat info;
  return ::stat(path.c_str(), &info) == 0 ? info.st_mode : 0;
}

struct PathParts {
  std::string folder;  // "." where the path has none
  std::string name;
};

PathParts split(const std::string& path) {
  const size_t slash = path.rfind('/');
  if (slash == std::string::npos) return {".", path};
  return {slash == 0 ? "/" : path.substr(0, slash), path.substr(slash + 1)};
}

// `path` without trailing slashes, and with a link at its end followed: a rename would replace it.
std::string target_of(std::string path) {
  while (path.size() > 1 && path.back() == '/') path.pop_back();
  const std::string name = split(path).name;
  if (name.empty() || name == "." || name == "..")
    fail(Status::kFile, "cannot write '%s': it names no file or folder; add a name", path.c_str());
  struct stat info;
  if (::lstat(path.c_str(), &info) != 0 || !S_ISLNK(info.st_mode)) return path;
  std::error_code error;
  const std::string target = std::filesystem::canonical(path, error).string();
  if (error) fail_io("follow the link", path, error.value());
  return target;
}

std::string sibling(const std::string& path, const char* kind) {
  const PathParts parts = split(path);
  return parts.folder + "/." + parts.name + kind + std::to_string(::getpid());
}

// Whether sibling() of some process made `name` for `base`.
bool is_sibling(const std::string& name, const std::string& base, const char* kind) {
  const std::string start = "." + base + kind;
  return name.size() > start.size() && name.starts_with(start) &&
         name.find_first_not_of("0123456789", start.size()) == std::string::npos;
}

constexpr const char* kTemporary = ".tmp-";  // new content, not yet complete
constexpr const char* kAside = ".old-";      // old content, while the new one takes its name

void sync_folder(const std::string& path, const std::string& shown, FileSystem& fs) {
  const int fd =
      uninterrupted([&] { return fs.open(path.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC, 0); });
  if (fd < 0) fail_io("open the folder of", shown, errno);
  const int error = uninterrupted([&] { return fs.sync(fd); }) < 0 ? errno : 0;
  fs.close(fd);
  if (error != 0 && error != EINVAL)  // EINVAL: a file system whose folders cannot be synced
    fail_io("make durable the folder of", shown, error);
}

std::vector<std::string> names_in(const std::string& folder) {
  std::error_code error;
  std::vector<std::string> names;
  std::filesystem::directory_iterator it(folder, error);
  for (; !error && it != std::filesystem::directory_iterator(); it.increment(error))
    names.push_back(it->path().filename().string());
  if (error) fail_io("list", folder, error.value());
  std::sort(names.begin(), names.end());
  return names;
}

// Removes a file, a link (not what it points to), or a folder with its content.
void remove_tree(const std::string& path, FileSystem& fs) {
  struct stat info;
  if (::lstat(path.c_str(), &info) != 0) return;
  const bool is_folder = S_ISDIR(info.st_mode);
  if (is_folder)
    for (const std::string& name : names_in(path)) remove_tree(path + "/" + name, fs);
  if ((is_folder ? fs.remove_folder(path.c_str()) : fs.remove_file(path.c_str())) < 0)
    fail_io("remove the temporary", path, errno);
}

// Swaps two names that both exist; returns an errno value. File systems that cannot swap get three
// renames, between which `b` is missing for an instant. recover() puts right what an error leaves,
// and if only the last rename fails, `b` already is.
int swap_names(const std::string& a, const std::string& b, const std::string& aside,
               FileSystem& fs) {
  if (fs.exchange(a.c_str(), b.c_str()) == 0) return 0;
  if (errno != EINVAL && errno != ENOSYS && errno != ENOTSUP) return errno;
  if (fs.rename(b.c_str(), aside.c_str()) < 0) return errno;
  if (fs.rename(a.c_str(), b.c_str()) < 0) return errno;
  fs.rename(aside.c_str(), a.c_str());
  return 0;
}

}  // namespace

int FileSystem::open(const char* path, int flags, mode_t mode) { return ::open(path, flags, mode); }
ssize_t FileSystem::write(int fd, const void* data, size_t bytes) {
  return ::write(fd, data, bytes);
}
int FileSystem::truncate(int fd, off_t bytes) { return ::ftruncate(fd, bytes); }
int FileSystem::sync(int fd) { return ::fsync(fd); }
int FileSystem::close(int fd) { return ::close(fd); }
int FileSystem::rename(const char* from, const char* to) { return ::rename(from, to); }
int FileSystem::exchange(const char* a, const char* b) {
  return ::renameat2(AT_FDCWD, a, AT_FDCWD, b, RENAME_EXCHANGE);
}
int FileSystem::make_folder(const char* path) { return ::mkdir(path, 0777); }
int FileSystem::remove_file(const char* path) { return ::unlink(path); }
int FileSystem::remove_folder(const char* path) { return ::rmdir(path); }

FileSystem& FileSystem::real() {
  static FileSystem system;  // holds no state
  return system;
}

bool file_exists(const std::string& path) { return S_ISREG(mode_of(path)); }
bool folder_exists(const std::string& path) { return S_ISDIR(mode_of(path)); }

InputFile::InputFile(std::string path, Status missing) : path_(std::move(path)) {
  // O_NONBLOCK: opening a named pipe must not wait for its writer.
  fd_ = uninterrupted([&] { return ::open(path_.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK); });
  if (fd_ < 0) {
    const int error = errno;
    fail_io("open", path_, error, error == ENOENT || error == ENOTDIR ? missing : Status::kFile);
  }
  struct stat info;
  const int error = ::fstat(fd_, &info) < 0 ? errno : 0;
  if (error == 0 && S_ISREG(info.st_mode)) {
    size_ = static_cast<uint64_t>(info.st_size);
    return;
  }
  ::close(fd_);
  if (error != 0) fail_io("read", path_, error);
  fail(Status::kFile, "cannot read '%s': it is %s, not a regular file; name the file itself",
       path_.c_str(), S_ISDIR(info.st_mode) ? "a folder" : "a device or pipe");
}

InputFile::InputFile(std::string name, std::vector<uint8_t> bytes)
    : path_(std::move(name)), bytes_(std::move(bytes)), size_(bytes_.size()) {}

InputFile::~InputFile() {
  if (fd_ >= 0) ::close(fd_);
}

void InputFile::read(uint64_t offset, void* to, size_t bytes) const {
  if (offset > size_ || bytes > size_ - offset)
    fail(Status::kFile,
         "'%s' is too short: %llu bytes, but bytes %llu to %llu are needed; "
         "copy or download it again",
         path_.c_str(), static_cast<unsigned long long>(size_),
         static_cast<unsigned long long>(offset), static_cast<unsigned long long>(offset + bytes));
  if (fd_ < 0) {
    std::copy_n(bytes_.begin() + static_cast<std::ptrdiff_t>(offset), bytes,
                static_cast<uint8_t*>(to));
    return;
  }
  auto* out = static_cast<char*>(to);
  while (bytes > 0) {
    const ssize_t n =
        uninterrupted([&] { return ::pread(fd_, out, bytes, static_cast<off_t>(offset)); });
    if (n < 0) fail_io("read", path_, errno);
    if (n == 0)
      fail(Status::kFile, "'%s' became shorter while it was read; let its writer finish first",
           path_.c_str());
    out += n;
    offset += static_cast<uint64_t>(n);
    bytes -= static_cast<size_t>(n);
  }
}

std::string read_small_file(const std::string& path, size_t max_bytes, Status missing) {
  const InputFile file(path, missing);
  if (file.size() > max_bytes)
    fail(Status::kFile,
         "'%s' has %llu bytes, but at most %zu are allowed here; is it the right file?",
         path.c_str(), static_cast<unsigned long long>(file.size()), max_bytes);
  std::string bytes(static_cast<size_t>(file.size()), '\0');
  file.read(0, bytes.data(), bytes.size());
  return bytes;
}

OutputFile::OutputFile(const std::string& path, FileSystem& fs)
    : fs_(fs), path_(target_of(path)), written_path_(sibling(path_, kTemporary)) {
  const mode_t mode = mode_of(path_);
  if (mode != 0 && !S_ISREG(mode))
    fail(Status::kFile, "cannot write '%s': it is %s; choose another name", path_.c_str(),
         S_ISDIR(mode) ? "a folder" : "a device or pipe");
  create(0);
}

OutputFile::OutputFile(std::string path, std::string written_path, OutputFolder& folder)
    : fs_(folder.fs_),
      folder_(&folder),
      path_(std::move(path)),
      written_path_(std::move(written_path)) {
  create(O_EXCL);  // a folder's file is written once
  ++folder.uncommitted_files_;
}

void OutputFile::create(int extra_flags) {
  const int flags = O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC | O_NOFOLLOW | extra_flags;
  fd_ = uninterrupted([&] { return fs_.open(written_path_.c_str(), flags, 0666); });
  if (fd_ < 0) fail_io("create", path_, errno);
}

OutputFile::~OutputFile() {
  if (fd_ >= 0) fs_.close(fd_);
  if (!committed_) fs_.remove_file(written_path_.c_str());
}

void OutputFile::write(const void* data, size_t bytes) {
  DDPM_CHECK(fd_ >= 0 && !failed_, "write to %s after its end or an error", path_.c_str());
  const char* from = static_cast<const char*>(data);
  while (bytes > 0) {
    const ssize_t n = uninterrupted([&] { return fs_.write(fd_, from, bytes); });
    if (n <= 0) {
      failed_ = true;
      fail_io("write", path_, n < 0 ? errno : EIO);
    }
    from += n;
    bytes -= static_cast<size_t>(n);
  }
}

void OutputFile::commit() {
  DDPM_CHECK(fd_ >= 0 && !failed_, "commit of %s after its end or an error", path_.c_str());
  failed_ = true;  // a sync that failed may have dropped the data: it is never tried again
  if (uninterrupted([&] { return fs_.sync(fd_); }) < 0) fail_io("make durable", path_, errno);
  if (fs_.close(std::exchange(fd_, -1)) < 0) fail_io("close", path_, errno);
  if (folder_ == nullptr) {
    if (fs_.rename(written_path_.c_str(), path_.c_str()) < 0) fail_io("rename into", path_, errno);
    committed_ = true;
    sync_folder(split(path_).folder, path_, fs_);
  } else {
    committed_ = true;
    --folder_->uncommitted_files_;
  }
}

OutputFolder::OutputFolder(const std::string& path, FileSystem& fs)
    : fs_(fs), path_(target_of(path)), written_path_(sibling(path_, kTemporary)) {
  const mode_t mode = mode_of(path_);
  if (mode != 0 && !S_ISDIR(mode))
    fail(Status::kFile, "cannot write the folder '%s': it is a file; choose another name",
         path_.c_str());
  recover(path_, fs_);
  if (fs_.make_folder(written_path_.c_str()) < 0) fail_io("make the folder", path_, errno);
}

OutputFolder::~OutputFolder() {
  if (committed_) return;
  try {
    recover(path_, fs_);
  } catch (const std::exception&) {  // what is left is removed when this name is next written
  }
}

OutputFile OutputFolder::file(const std::string& name) {
  for (size_t slash = name.find('/'); slash != std::string::npos;
       slash = name.find('/', slash + 1)) {
    const std::string subfolder = name.substr(0, slash);
    if (std::find(subfolders_.begin(), subfolders_.end(), subfolder) != subfolders_.end()) continue;
    if (fs_.make_folder((written_path_ + "/" + subfolder).c_str()) < 0)
      fail_io("make the folder", path_ + "/" + subfolder, errno);
    subfolders_.push_back(subfolder);
  }
  return OutputFile(path_ + "/" + name, written_path_ + "/" + name, *this);
}

void OutputFolder::commit() {
  DDPM_CHECK(!committed_ && uncommitted_files_ == 0, "%s: commit with %d unfinished files",
             path_.c_str(), uncommitted_files_);
  for (const std::string& subfolder : subfolders_)
    sync_folder(written_path_ + "/" + subfolder, path_ + "/" + subfolder, fs_);
  sync_folder(written_path_, path_, fs_);

  const std::string parent = split(path_).folder;
  const std::string aside = sibling(path_, kAside);
  const bool replaces = folder_exists(path_);
  const int error = replaces ? swap_names(written_path_, path_, aside, fs_)
                    : fs_.rename(written_path_.c_str(), path_.c_str()) < 0 ? errno
                                                                           : 0;
  if (error != 0) fail_io("rename into", path_, error);
  try {
    sync_folder(parent, path_, fs_);
  } catch (const Error&) {
    // The old folder must not be removed before the new name is durable: swap back.
    if (replaces) committed_ = swap_names(written_path_, path_, aside, fs_) != 0;
    throw;
  }
  recover(path_, fs_);  // the old folder now has the temporary name
  committed_ = true;
}

void recover(const std::string& path, FileSystem& fs) {
  const std::string target = target_of(path);
  const PathParts parts = split(target);
  if (!folder_exists(parts.folder)) return;
  for (const std::string& name : names_in(parts.folder)) {
    const std::string full = parts.folder + "/" + name;
    const bool aside = is_sibling(name, parts.name, kAside);
    if (aside && mode_of(target) == 0) {
      if (fs.rename(full.c_str(), target.c_str()) < 0) fail_io("restore", target, errno);
    } else if (aside || is_sibling(name, parts.name, kTemporary)) {
      remove_tree(full, fs);
    }
  }
}

void recover_all(const std::string& folder, FileSystem& fs) {
  if (!folder_exists(folder)) return;
  for (const std::string& name : names_in(folder))
    for (const char* kind : {kTemporary, kAside}) {
      const size_t at = name.rfind(kind);
      if (at == std::string::npos || at < 2) continue;
      const std::string base = name.substr(1, at - 1);
      if (is_sibling(name, base, kind)) recover(folder + "/" + base, fs);
    }
}

void remove_whole_folder(const std::string& path, FileSystem& fs) {
  const std::string target = target_of(path), doomed = sibling(target, kTemporary);
  if (fs.rename(target.c_str(), doomed.c_str()) < 0) fail_io("remove", path, errno);
  remove_tree(doomed, fs);
}

void make_folders(const std::string& path, FileSystem& fs) {
  if (path.empty() || path == "/" || folder_exists(path)) return;
  const std::string parent = split(target_of(path)).folder;
  make_folders(parent, fs);
  if (fs.make_folder(path.c_str()) < 0 && !(errno == EEXIST && folder_exists(path)))
    fail_io("make the folder", path, errno);
  sync_folder(parent, path, fs);
}

void write_file(const std::string& path, std::string_view bytes, FileSystem& fs) {
  OutputFile file(path, fs);
  file.write(bytes);
  file.commit();
}

namespace {

// The size of `file` up to and with its last newline.
uint64_t size_of_whole_lines(const InputFile& file) {
  char block[4096];
  for (uint64_t end = file.size(); end > 0;) {
    const size_t bytes = static_cast<size_t>(std::min<uint64_t>(end, sizeof block));
    file.read(end - bytes, block, bytes);
    const size_t newline = std::string_view(block, bytes).rfind('\n');
    if (newline != std::string_view::npos) return end - bytes + newline + 1;
    end -= bytes;
  }
  return 0;
}

}  // namespace

AppendFile::AppendFile(std::string path, FileSystem& fs) : fs_(fs), path_(std::move(path)) {
  const int flags = O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC | O_NONBLOCK;
  fd_ = uninterrupted([&] { return fs_.open(path_.c_str(), flags, 0666); });
  if (fd_ < 0) fail_io("open", path_, errno);
  try {
    const InputFile written(path_);
    const uint64_t keep = size_of_whole_lines(written);
    if (keep < written.size() && fs_.truncate(fd_, static_cast<off_t>(keep)) < 0)
      fail_io("drop the broken last line of", path_, errno);
  } catch (...) {
    fs_.close(fd_);
    throw;
  }
}

AppendFile::~AppendFile() { fs_.close(fd_); }

void AppendFile::append_line(std::string_view line) {
  DDPM_CHECK(line.find('\n') == std::string_view::npos, "a line of %s holds a newline",
             path_.c_str());
  append(std::string(line) + '\n');
}

void AppendFile::append(std::string_view bytes) {
  struct stat before;
  if (::fstat(fd_, &before) < 0) fail_io("append to", path_, errno);
  const ssize_t n = uninterrupted([&] { return fs_.write(fd_, bytes.data(), bytes.size()); });
  if (n == static_cast<ssize_t>(bytes.size())) return;
  const int error = n < 0 ? errno : ENOSPC;  // a regular file takes part of a write when it is full
  fs_.truncate(fd_, before.st_size);
  fail_io("append to", path_, error);
}

}  // namespace ddpm
