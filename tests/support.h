// Running one Call on a backend: slots with guard bytes behind them, outputs poisoned with NaN.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <string>
#include <vector>

#include "kernels/backend.h"
#include "kernels/bf16.h"
#include "kernels/philox.h"

namespace ddpm::test {

// Seeded values, the same on every machine: uniform on [-1, 1) times scale plus offset.
inline std::vector<float> random_values(int64_t count, uint64_t seed, float scale = 1,
                                        float offset = 0) {
  std::vector<float> v(static_cast<size_t>(count));
  const RandomStream stream{.seed = seed, .purpose = Purpose::kShapes, .step = 7};
  for (size_t i = 0; i < v.size(); ++i) {
    const uint32_t bits = stream.block(static_cast<uint32_t>(i / 4))[i % 4];
    v[i] = (static_cast<float>(bits) * 0x1p-31f - 1.0f) * scale + offset;
  }
  return v;
}

inline std::vector<double> to_double(const std::vector<float>& v) {
  return std::vector<double>(v.begin(), v.end());
}

// ||a - b|| / ||b||, or ||a|| where b is zero; NaN if any value is.
template <typename A, typename B>
double relative_error(const std::vector<A>& a, const std::vector<B>& b) {
  if (a.size() != b.size()) return std::numeric_limits<double>::infinity();
  double diff = 0, norm = 0;
  for (size_t i = 0; i < a.size(); ++i) {
    const double d = static_cast<double>(a[i]) - static_cast<double>(b[i]);
    diff += d * d;
    norm += static_cast<double>(b[i]) * static_cast<double>(b[i]);
  }
  return norm > 0 ? std::sqrt(diff / norm) : std::sqrt(diff);
}

// Values as the backend's activations can hold them.
inline std::vector<float> rounded(const Backend& backend, std::vector<float> v) {
  if (backend.compute_type() == DType::kBF16)
    for (float& x : v) x = to_float(to_bf16(x));
  return v;
}
// Relative L2 error of many activations that were rounded once, and of what else `fp32` is the bound.
// Rounding to 8 bits moves an element by at most 2^-8 of itself, their root mean square by 2^-9.
inline double activation_tolerance(const Backend& backend, double fp32) {
  return backend.compute_type() == DType::kBF16 ? 0x1p-9 + fp32 : fp32;
}

// Slots of one backend, for running single calls.
class Bench {
 public:
  // Without guards where the backend itself reports every access outside a tensor.
  explicit Bench(Backend& backend)
      : backend_(backend), guard_(backend.name() == "simt" ? 0 : kGuard) {}

  template <typename T>
  In in(const std::vector<T>& values) {
    return {add(values.data(), values.size() * sizeof(T))};
  }
  // An output of `count` elements that holds NaN (all bits set) until it is written.
  template <typename T = float>
  Out out(int64_t count) {
    const std::vector<uint8_t> poison(static_cast<size_t>(count) * sizeof(T), 0xFF);
    return {add(poison.data(), poison.size())};
  }
  // Activations: in the backend's compute type.
  In activation(const std::vector<float>& values) {
    if (backend_.compute_type() == DType::kF32) return in(values);
    std::vector<bf16> narrow;
    for (float v : values) narrow.push_back(to_bf16(v));
    return in(narrow);
  }
  Out activation_out(int64_t count) {
    return backend_.compute_type() == DType::kF32 ? out(count) : out<bf16>(count);
  }
  Out activation_inout(const std::vector<float>& values) { return {activation(values).slot}; }
  std::vector<float> get_activation(Out o) const {
    if (backend_.compute_type() == DType::kF32) return get(o);
    std::vector<float> wide;
    for (bf16 v : get<bf16>(o)) wide.push_back(to_float(v));
    return wide;
  }
  // An output that a call accumulates into, or a state it updates.
  template <typename T>
  Out inout(const std::vector<T>& values) {
    return {add(values.data(), values.size() * sizeof(T))};
  }
  In state(const StepState& s) { return in(std::vector<StepState>{s}); }

  void run(const Call& call) {
    if (call.workspace > 0) workspace_ = backend_.allocate(call.workspace + guard_);
    if (workspace_) backend_.fill(workspace_->data(), 0xFF, workspace_->size());
    call.run(Run{pointers_.data(), workspace_ ? workspace_->data() : nullptr, nullptr});
    backend_.synchronize();
    if (call.workspace > 0)
      check_guard(*workspace_, call.workspace, std::string(call.op) + " workspace");
    for (size_t i = 0; i < slots_.size(); ++i)
      check_guard(*slots_[i].memory, slots_[i].bytes,
                  std::string(call.op) + " slot " + std::to_string(i));
  }

  template <typename T = float>
  std::vector<T> get(int slot) const {
    const Slot& s = slots_.at(static_cast<size_t>(slot));
    std::vector<T> v(s.bytes / sizeof(T));
    backend_.download(v.data(), s.memory->data(), v.size() * sizeof(T));
    return v;
  }
  template <typename T = float>
  std::vector<T> get(Out o) const {
    return get<T>(o.slot);
  }

 private:
  static constexpr size_t kGuard = 256;
  static constexpr uint8_t kGuardByte = 0xA5;
  struct Slot {
    std::unique_ptr<Memory> memory;
    size_t bytes;
  };

  int add(const void* data, size_t bytes) {
    Slot s{backend_.allocate(bytes + guard_), bytes};
    backend_.fill(s.memory->data(), kGuardByte, s.memory->size());
    if (bytes > 0) backend_.upload(s.memory->data(), data, bytes);
    pointers_.push_back(s.memory->data());
    slots_.push_back(std::move(s));
    return static_cast<int>(slots_.size()) - 1;
  }
  void check_guard(const Memory& memory, size_t bytes, const std::string& what) {
    std::vector<uint8_t> all(memory.size());
    backend_.download(all.data(), memory.data(), all.size());
    const uint8_t expected = what.ends_with("workspace") ? 0xFF : kGuardByte;
    for (size_t i = bytes; i < bytes + guard_ && i < all.size(); ++i)
      if (all[i] != expected) fail(Status::kBug, "%s: wrote behind its end", what.c_str());
  }

  Backend& backend_;
  size_t guard_;
  std::vector<Slot> slots_;
  std::vector<void*> pointers_;
  std::unique_ptr<Memory> workspace_;
};

}  // namespace ddpm::test
