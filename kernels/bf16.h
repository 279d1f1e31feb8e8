// bfloat16: the upper half of a float. Integer arithmetic, the same on host and device.
#pragma once

#include <bit>
#include <cstdint>

namespace ddpm {

struct bf16 {
  uint16_t bits;
  friend constexpr bool operator==(const bf16&, const bf16&) = default;
};

constexpr float to_float(bf16 x) { return std::bit_cast<float>(uint32_t{x.bits} << 16); }
constexpr float to_float(float x) { return x; }

// Round to nearest, ties to even; a NaN stays one.
constexpr bf16 to_bf16(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  if ((bits & 0x7FFFFFFFu) > 0x7F800000u) return {static_cast<uint16_t>(bits >> 16 | 0x40u)};
  return {static_cast<uint16_t>((bits + 0x7FFFu + (bits >> 16 & 1u)) >> 16)};
}

}  // namespace ddpm
