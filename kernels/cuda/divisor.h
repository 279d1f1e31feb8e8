// Division by a number known when a call is prepared: a multiplication and a shift on the device.
#pragma once

#include <device/launch.h>

#include <cstdint>

namespace ddpm::cuda {

class Divisor {
 public:
  // 1 <= divisor < 2^31
  explicit Divisor(int64_t divisor) : divisor_(static_cast<uint32_t>(divisor)) {
    uint32_t bits = 0;  // divisor <= 2^bits
    while (uint64_t{1} << bits < divisor_) ++bits;
    shift_ = 31 + bits;
    factor_ = static_cast<uint32_t>(((uint64_t{1} << shift_) + divisor_ - 1) / divisor_);
  }
  // n / divisor and the rest, n < 2^31. Exact: factor * divisor exceeds 2^shift by less than
  // 2^(shift - 31) (Granlund & Montgomery 1994, theorem 4.2).
  __device__ __forceinline__ uint32_t divide(uint32_t n, uint32_t& rest) const {
    const auto quotient = static_cast<uint32_t>((uint64_t{n} * factor_) >> shift_);
    rest = n - quotient * divisor_;
    return quotient;
  }

 private:
  uint32_t divisor_, factor_, shift_;
};

}  // namespace ddpm::cuda
