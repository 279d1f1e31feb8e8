#include "tools/npz.h"

#include <zip.h>

#include <vector>

#include "engine/file_io.h"
#include "kernels/error.h"

namespace ddpm::tools {
namespace {

// numpy's header, version 1.0: magic, u16 length, a dictionary padded so that the data starts at a
// multiple of 64 bytes.
std::string npy_header(int64_t count, int h, int w, int c) {
  std::string text =
      format("{'descr': '|u1', 'fortran_order': False, 'shape': (%lld, %d, %d, %d), }",
             static_cast<long long>(count), h, w, c);
  constexpr size_t kBefore = 10;  // magic 6, version 2, length 2
  text.append(63 - (kBefore + text.size()) % 64, ' ');
  text += '\n';
  std::string header("\x93NUMPY\x01\x00", 8);
  header += static_cast<char>(text.size() & 0xFF);
  header += static_cast<char>(text.size() >> 8);
  return header + text;
}

// libzip's three ways to fail, each with its own owner of the message.
[[noreturn]] void fail_zip(const std::string& path, const char* why) {
  fail(Status::kFile, "cannot write '%s': %s", path.c_str(), why);
}

struct ZipError {
  zip_error_t error;
  ZipError() { zip_error_init(&error); }
  ~ZipError() { zip_error_fini(&error); }
  ZipError(const ZipError&) = delete;
  ZipError& operator=(const ZipError&) = delete;
};

// An archive under construction in memory; its bytes outlive it in `bytes`.
class MemoryZip {
 public:
  explicit MemoryZip(const std::string& path) : path_(path) {
    bytes_ = zip_source_buffer_create(nullptr, 0, 0, &error_.error);
    if (!bytes_) fail_zip(path_, zip_error_strerror(&error_.error));
    zip_source_keep(bytes_);  // the archive owns one reference, this object the other
    archive_ = zip_open_from_source(bytes_, ZIP_TRUNCATE, &error_.error);
    if (!archive_) {
      zip_source_free(bytes_);
      zip_source_free(bytes_);
      fail_zip(path_, zip_error_strerror(&error_.error));
    }
  }
  ~MemoryZip() {
    if (archive_) zip_discard(archive_);
    zip_source_free(bytes_);
  }
  MemoryZip(const MemoryZip&) = delete;
  MemoryZip& operator=(const MemoryZip&) = delete;

  // A stored member made of two parts, which must live until finish().
  void add(const char* name, zip_buffer_fragment_t (&parts)[2]) {
    zip_source_t* source = zip_source_buffer_fragment(archive_, parts, 2, 0);
    const zip_int64_t index = source ? zip_file_add(archive_, name, source, ZIP_FL_ENC_UTF_8) : -1;
    if (index < 0) {
      zip_source_free(source);
      fail_zip(path_, zip_strerror(archive_));
    }
    constexpr zip_uint16_t kFirstDay = 1 << 5 | 1;  // 1980-01-01: the file must hold no time
    if (zip_set_file_compression(archive_, static_cast<zip_uint64_t>(index), ZIP_CM_STORE, 0) < 0 ||
        zip_file_set_dostime(archive_, static_cast<zip_uint64_t>(index), 0, kFirstDay, 0) < 0)
      fail_zip(path_, zip_strerror(archive_));
  }

  void finish() {
    if (zip_close(archive_) < 0) fail_zip(path_, zip_strerror(archive_));
    archive_ = nullptr;
  }

  void save() {
    OutputFile file(path_);
    std::vector<char> block(size_t{1} << 20);
    if (zip_source_open(bytes_) < 0) fail_zip(path_, zip_error_strerror(zip_source_error(bytes_)));
    zip_int64_t n;
    while ((n = zip_source_read(bytes_, block.data(), block.size())) > 0)
      file.write(block.data(), static_cast<size_t>(n));
    zip_source_close(bytes_);
    if (n < 0) fail_zip(path_, zip_error_strerror(zip_source_error(bytes_)));
    file.commit();
  }

 private:
  std::string path_;
  ZipError error_;
  zip_source_t* bytes_ = nullptr;
  zip_t* archive_ = nullptr;
};

}  // namespace

void write_npz(const std::string& path, const uint8_t* images, int64_t count, int h, int w, int c) {
  DDPM_CHECK(count >= 0 && h > 0 && w > 0 && c > 0, "npz of %lld images of %dx%dx%d",
             static_cast<long long>(count), h, w, c);
  std::string header = npy_header(count, h, w, c);
  zip_buffer_fragment_t parts[2] = {
      {reinterpret_cast<zip_uint8_t*>(header.data()), header.size()},
      {const_cast<zip_uint8_t*>(images), static_cast<zip_uint64_t>(count) * h * w * c}};
  MemoryZip zip(path);
  zip.add("arr_0.npy", parts);
  zip.finish();
  zip.save();
}

}  // namespace ddpm::tools
