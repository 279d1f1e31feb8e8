#include "tools/common.h"

#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cmath>
#include <cstring>
#include <filesystem>
#include <fstream>

namespace ddpm::tools {
std::string grouped(int64_t value) {
  std::string text = std::to_string(value);
  const size_t sign = value < 0 ? 1 : 0;
  for (size_t i = text.size(); i > sign + 3;) text.insert(i -= 3, ",");
  return text;
}

std::string bytes_text(size_t bytes) {
  const double mib = static_cast<double>(bytes) / (1 << 20);
  return mib < 1024 ? format("%.1f MiB", mib) : format("%.2f GiB", mib / 1024);
}

size_t peak_bytes() {
  std::ifstream status("/proc/self/status");
  std::string word;
  while (status >> word)
    if (word == "VmHWM:") {
      size_t kib = 0;
      status >> kib;
      return kib * 1024;
    }
  return 0;
}

namespace {

// The path itself, or the nearest folder above it that is there.
std::filesystem::path existing_part(const std::string& path) {
  std::error_code error;
  std::filesystem::path at = std::filesystem::absolute(path, error);
  while (!at.empty() && !std::filesystem::exists(at, error) && at != at.root_path())
    at = at.parent_path();
  return at;
}

}  // namespace

void require_space(const std::string& path, size_t bytes, const char* what) {
  std::error_code error;
  const std::filesystem::space_info space = std::filesystem::space(existing_part(path), error);
  if (error || space.available >= bytes) return;  // a disk that does not say is tried
  fail(Status::kFile, "%s: %s need %s, and %s are free; free some space, or choose another place",
       path.c_str(), what, bytes_text(bytes).c_str(), bytes_text(space.available).c_str());
}

void require_writable(const std::string& path) {
  namespace fs = std::filesystem;
  std::error_code error;
  const fs::path at = existing_part(path);
  if (access(at.c_str(), W_OK) != 0)
    fail(Status::kFile, "cannot write %s: %s: %s; choose another --out", path.c_str(), at.c_str(),
         std::strerror(errno));
  if (at != fs::absolute(path, error) && !fs::is_directory(at, error))
    fail(Status::kFile, "cannot write %s: %s is not a folder; choose another --out", path.c_str(),
         at.c_str());
}

void require_writable_file(const std::string& path) {
  require_writable(path);
  std::error_code error;
  const std::filesystem::path folder = std::filesystem::absolute(path, error).parent_path();
  if (!std::filesystem::is_directory(folder, error))
    fail(Status::kFile, "cannot write %s: there is no folder %s; make it, or choose another place",
         path.c_str(), folder.c_str());
  if (std::filesystem::is_directory(path, error))
    fail(Status::kFile, "cannot write %s: it is a folder; name a file", path.c_str());
}

std::vector<float> to_nchw(const std::vector<float>& nhwc, int n, int h, int w, int c) {
  std::vector<float> out(nhwc.size());
  const size_t pixels = static_cast<size_t>(h) * w, channels = static_cast<size_t>(c);
  for (size_t i = 0; i < static_cast<size_t>(n); ++i)
    for (size_t p = 0; p < pixels; ++p)
      for (size_t k = 0; k < channels; ++k)
        out[(i * channels + k) * pixels + p] = nhwc[(i * pixels + p) * channels + k];
  return out;
}

std::vector<float> to_nhwc(const std::vector<float>& nchw, int n, int h, int w, int c) {
  std::vector<float> out(nchw.size());
  const size_t pixels = static_cast<size_t>(h) * w, channels = static_cast<size_t>(c);
  for (size_t i = 0; i < static_cast<size_t>(n); ++i)
    for (size_t k = 0; k < channels; ++k)
      for (size_t p = 0; p < pixels; ++p)
        out[(i * pixels + p) * channels + k] = nchw[(i * channels + k) * pixels + p];
  return out;
}

std::vector<uint8_t> to_uint8(const std::vector<float>& images) {
  std::vector<uint8_t> out(images.size());
  for (size_t i = 0; i < images.size(); ++i) {
    const float scaled = std::clamp((images[i] + 1.0f) * 127.5f, 0.0f, 255.0f);
    out[i] = static_cast<uint8_t>(std::floor(scaled + 0.5f));
  }
  return out;
}

}  // namespace ddpm::tools
