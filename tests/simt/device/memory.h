// The host's version of kernels/cuda/device/memory.h: pointers that check every access.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "kernels/bf16.h"
#include "tests/simt/machine.h"

namespace ddpm::cuda {

using simt::Access;

// A checked element: reads and writes go through the pointer it came from.
template <typename Pointer, typename T>
class Element {
 public:
  Element(const Pointer& p, T* at) : p_(p), at_(at) {}
  operator T() const {  // NOLINT: stands for a value
    p_.check(at_, sizeof(T), Access::kRead);
    return *at_;
  }
  T operator=(T value) const {  // NOLINT: as a reference would
    p_.check(at_, sizeof(T), Access::kWrite);
    return *at_ = value;
  }
  T operator=(const Element& other) const { return *this = static_cast<T>(other); }  // NOLINT
  T operator+=(T value) const { return *this = static_cast<T>(*this) + value; }

 private:
  Pointer p_;
  T* at_;
};

template <typename Self, typename T>
class Checked {
 public:
  using Value = std::remove_const_t<T>;

  explicit Checked(T* p) : p_(p) {}
  explicit operator bool() const { return p_ != nullptr; }
  friend bool operator==(const Self& a, std::nullptr_t) { return a.raw() == nullptr; }
  T* raw() const { return p_; }

  Self operator+(int64_t i) const { return self().at(p_ + i); }
  Self operator-(int64_t i) const { return self().at(p_ - i); }
  Self& operator+=(int64_t i) {
    p_ += i;
    return static_cast<Self&>(*this);
  }
  auto operator[](int64_t i) const {
    if constexpr (std::is_const_v<T>) {
      self().check(p_ + i, sizeof(T), Access::kRead);
      return p_[i];
    } else {
      return Element<Self, T>(self(), p_ + i);
    }
  }
  auto operator*() const { return (*this)[0]; }

 protected:
  T* p_;

 private:
  const Self& self() const { return static_cast<const Self&>(*this); }
};

template <typename T>
class Global : public Checked<Global<T>, T> {
  using Base = Checked<Global<T>, T>;

 public:
  Global(T* p) : Base(p), extent_(p == nullptr ? nullptr : simt::find_extent(p)) {}  // NOLINT
  Global(std::nullptr_t) : Base(nullptr) {}                                          // NOLINT
  template <typename U>
  requires std::is_same_v<const U, T> Global(
      const Global<U>& other)  // NOLINT: as T* becomes const T*
      : Base(other.raw()), extent_(other.extent()) {}

  simt::Extent* extent() const { return extent_; }
  Global at(T* p) const {
    Global moved = *this;
    moved.p_ = p;
    return moved;
  }
  void check(const void* at, size_t bytes, Access access) const {
    if (extent_ == nullptr) simt::fail_thread("follows a null pointer");
    simt::check_global(*extent_, at, bytes, access);
  }

 private:
  simt::Extent* extent_ = nullptr;
};

template <typename T>
using GlobalAliased = Global<T>;

template <typename T>
class Smem : public Checked<Smem<T>, T> {
  using Base = Checked<Smem<T>, T>;

 public:
  Smem() : Base(nullptr) {}
  Smem(T* p, const void* begin, size_t bytes)
      : Base(p), begin_(static_cast<const char*>(begin)), bytes_(bytes) {}
  template <typename U>
  requires std::is_same_v<const U, T> Smem(const Smem<U>& other)  // NOLINT
      : Base(other.raw()), begin_(other.begin()), bytes_(other.bytes()) {}

  const char* begin() const { return begin_; }
  size_t bytes() const { return bytes_; }
  Smem at(T* p) const { return {p, begin_, bytes_}; }
  void check(const void* at, size_t bytes, Access access) const {
    check_bounds(at, bytes);
    simt::check_shared(at, bytes, access);
  }
  void check_bounds(const void* at, size_t bytes) const {
    const char* p = static_cast<const char*>(at);
    if (p < begin_ || p + bytes > begin_ + bytes_)
      simt::fail_thread(format("is outside a part of %zu bytes of shared memory, at byte %lld",
                               bytes_, static_cast<long long>(p - begin_)));
  }

 private:
  const char* begin_ = nullptr;
  size_t bytes_ = 0;
};

template <typename T>
constexpr size_t shared_bytes(size_t count) {
  return (count * sizeof(T) + 127) / 128 * 128;
}

class SharedMemory {
 public:
  template <typename T>
  Smem<T> take(int count) {
    const size_t bytes = static_cast<size_t>(count) * sizeof(T);
    T* part = static_cast<T*>(simt::shared_part(used_, bytes));
    used_ += shared_bytes<T>(static_cast<size_t>(count));
    return {part, part, bytes};
  }

 private:
  size_t used_ = 0;
};

inline void block_sync() { simt::block_barrier(); }

template <int N>
struct alignas(4 * N) Words {
  uint32_t w[N];
};

inline void check_alignment(const void* p, size_t bytes) {
  if (reinterpret_cast<uintptr_t>(p) % bytes != 0)
    simt::fail_thread(format("moves %zu bytes at an address that is not aligned to them", bytes));
}

template <int N, typename Self, typename T>
Words<N> load_words(const Checked<Self, T>& from) {
  Words<N> words;
  check_alignment(from.raw(), sizeof words);
  static_cast<const Self&>(from).check(from.raw(), sizeof words, Access::kRead);
  std::memcpy(&words, from.raw(), sizeof words);
  return words;
}
template <int N, typename Self, typename T>
void store_words(const Checked<Self, T>& to, const Words<N>& words) {
  check_alignment(to.raw(), sizeof words);
  static_cast<const Self&>(to).check(to.raw(), sizeof words, Access::kWrite);
  std::memcpy(to.raw(), &words, sizeof words);
}

// Not a race: blocks may do it in any order.
inline void atomic_or(const Global<uint32_t>& to, uint32_t bits) { *to.raw() |= bits; }

}  // namespace ddpm::cuda
