// What the subcommands share.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "model/device.h"

namespace ddpm::tools {

// "1,234,567" and "12.3 MiB".
std::string grouped(int64_t value);
std::string bytes_text(size_t bytes);

// The most memory this process has held so far (VmHWM), in bytes.
size_t peak_bytes();

// Error(kFile) if `path` could not be written: found out before hours of work, not after.
void require_writable(const std::string& path);
// The same of a file, whose folder nobody makes.
void require_writable_file(const std::string& path);

// Error(kFile) if the disk that `path` is or will be on has fewer bytes free; `what` needs them.
void require_space(const std::string& path, size_t bytes, const char* what);

// (N,H,W,C) to (N,C,H,W) and back.
std::vector<float> to_nchw(const std::vector<float>& nhwc, int n, int h, int w, int c);
std::vector<float> to_nhwc(const std::vector<float>& nchw, int n, int h, int w, int c);

// Images in [-1, 1] as floor(clamp((x + 1) 127.5, 0, 255) + 0.5).
std::vector<uint8_t> to_uint8(const std::vector<float>& images);

}  // namespace ddpm::tools
