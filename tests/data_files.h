// Files for the tests of data sets and images: bytes in and out, and what an expression throws.
#pragma once

#include <cstdint>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <string>
#include <vector>

#include "kernels/error.h"
#include "tests/temp_folder.h"

namespace ddpm::test {

inline void put_file(const std::string& path, const std::vector<uint8_t>& bytes) {
  std::filesystem::create_directories(std::filesystem::path(path).parent_path());
  std::ofstream(path, std::ios::binary)
      .write(reinterpret_cast<const char*>(bytes.data()),
             static_cast<std::streamsize>(bytes.size()));
}

inline std::vector<uint8_t> get_file(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), {}};
}

// What `run` throws; status kOk where it throws nothing.
struct Thrown {
  Status status = Status::kOk;
  std::string message;

  bool says(const std::string& part) const { return message.find(part) != std::string::npos; }
};

template <typename F>
Thrown thrown_by(F run) {
  try {
    run();
  } catch (const Error& e) {
    return {e.status(), e.what()};
  }
  return {};
}

}  // namespace ddpm::test
