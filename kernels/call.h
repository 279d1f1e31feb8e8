// A prepared call: algorithm chosen, shapes fixed, nothing left to decide or allocate. Tensors are
// named by their slot in a pointer table, which arrives with Run; so one Call runs over any memory.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <vector>

namespace ddpm {

// A tensor a call reads, or one it writes: a slot in Run::data. slot -1 means absent.
struct In {
  int slot = -1;
  explicit operator bool() const { return slot >= 0; }
};
struct Out {
  int slot = -1;
  explicit operator bool() const { return slot >= 0; }
};

// What a call does to a gradient destination. Decided at build time: the first writer overwrites,
// later ones add.
enum class Write { kOverwrite, kAccumulate };

struct Run {
  void* const* data = nullptr;  // pointer of each slot, 64-byte aligned
  void* workspace = nullptr;    // Call::workspace bytes, 64-byte aligned, contents undefined
  void* stream = nullptr;       // the backend's stream of this step's lane; unused on the CPU

  template <typename T>
  const T* in(In x) const {
    return x ? static_cast<const T*>(data[x.slot]) : nullptr;
  }
  template <typename T>
  T* out(Out x) const {
    return x ? static_cast<T*>(data[x.slot]) : nullptr;
  }
};

struct Call {
  const char* op = "";      // the name in profiles and error messages, a string literal
  std::vector<In> reads;    // everything it reads; what it accumulates into stands in writes only
  std::vector<Out> writes;  // everything it writes
  size_t workspace = 0;     // bytes
  std::function<void(const Run&)> run;
  int64_t macs = 0;         // multiply-adds of the products it stands for; 0 where memory decides
  bool collective = false;  // waits for the same call of other ranks
};

}  // namespace ddpm
