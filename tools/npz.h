// Sample files for evaluation tools: numpy's .npz with one member.
#pragma once

#include <cstdint>
#include <string>

namespace ddpm::tools {

// Writes `arr_0`, uint8 (count,H,W,C) in C order, stored without compression. Holds the file in
// memory beside the images. Equal images give equal bytes.
void write_npz(const std::string& path, const uint8_t* images, int64_t count, int h, int w, int c);

}  // namespace ddpm::tools
