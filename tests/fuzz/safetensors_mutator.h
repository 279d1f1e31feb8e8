// A safetensors file begins with its header's length, so a change anywhere else hardly ever leaves
// a file that is read any further. Header and data are changed apart, and the length is set again.
#pragma once

#include <algorithm>
#include <cstring>
#include <vector>

#include "tests/fuzz/fuzz.h"

extern "C" size_t LLVMFuzzerCustomMutator(uint8_t* data, size_t size, size_t max_size,
                                          unsigned seed) {
  uint64_t length = 0;
  if (size >= 8) std::memcpy(&length, data, 8);
  if (seed % 8 == 0 || size < 8 || length > size - 8) return LLVMFuzzerMutate(data, size, max_size);
  std::vector<uint8_t> header(data + 8, data + 8 + length), rest(data + 8 + length, data + size);
  std::vector<uint8_t>& part = seed % 8 == 1 ? rest : header;
  const size_t old = part.size(), room = max_size - (size - old);
  part.resize(room);
  part.resize(LLVMFuzzerMutate(part.data(), old, room));
  length = header.size();
  std::memcpy(data, &length, 8);
  std::copy(header.begin(), header.end(), data + 8);
  std::copy(rest.begin(), rest.end(), data + 8 + header.size());
  return 8 + header.size() + rest.size();
}
