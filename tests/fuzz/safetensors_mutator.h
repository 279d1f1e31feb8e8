// A safetensors file begins with its header's length, so a change anywhere else hardly ever leaves
// a file that is read any further. Header and data are changed apart, and the length is set again.
// What a reader must not believe are mostly the header's numbers: these are replaced whole.
#pragma once

#include <algorithm>
#include <cctype>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "tests/fuzz/fuzz.h"

namespace ddpm::fuzz {

inline void replace_number(std::vector<uint8_t>& header, std::mt19937& random) {
  const auto digit = [&](size_t i) { return i < header.size() && std::isdigit(header[i]) != 0; };
  std::vector<size_t> starts;
  for (size_t i = 0; i < header.size(); ++i)
    if (digit(i) && (i == 0 || !digit(i - 1))) starts.push_back(i);
  if (starts.empty()) return;
  const size_t begin = starts[random() % starts.size()];
  size_t end = begin;
  while (digit(end)) ++end;
  constexpr uint64_t kEdges[] = {255,       65536,     INT32_MAX, UINT32_MAX, uint64_t{1} << 32,
                                 INT64_MAX, UINT64_MAX};
  const unsigned pick = random() % 16;
  const std::string number = std::to_string(pick < 9 ? pick : kEdges[pick - 9]);
  header.erase(header.begin() + static_cast<ptrdiff_t>(begin),
               header.begin() + static_cast<ptrdiff_t>(end));
  header.insert(header.begin() + static_cast<ptrdiff_t>(begin), number.begin(), number.end());
}

}  // namespace ddpm::fuzz

extern "C" size_t LLVMFuzzerCustomMutator(uint8_t* data, size_t size, size_t max_size,
                                          unsigned seed) {
  uint64_t length = 0;
  if (size >= 8) std::memcpy(&length, data, 8);
  if (seed % 8 == 0 || size < 8 || length > size - 8) return LLVMFuzzerMutate(data, size, max_size);
  std::vector<uint8_t> header(data + 8, data + 8 + length), rest(data + 8 + length, data + size);
  std::vector<uint8_t>& part = seed % 8 == 1 ? rest : header;
  const size_t old = part.size(), room = max_size - (size - old);
  if (std::mt19937 random(seed); seed % 8 > 4 && room > old + 20) {
    ddpm::fuzz::replace_number(header, random);
  } else {
    part.resize(room);
    part.resize(LLVMFuzzerMutate(part.data(), old, room));
  }
  length = header.size();
  std::memcpy(data, &length, 8);
  std::copy(header.begin(), header.end(), data + 8);
  std::copy(rest.begin(), rest.end(), data + 8 + header.size());
  return 8 + header.size() + rest.size();
}
