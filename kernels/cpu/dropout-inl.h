// Dropout's decisions (kernels/desc.h), a vector of Philox blocks at a time. Compiled once per
// instruction set, like simd-inl.h.
#if defined(DDPM_KERNELS_CPU_DROPOUT_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef DDPM_KERNELS_CPU_DROPOUT_INL_H_
#undef DDPM_KERNELS_CPU_DROPOUT_INL_H_
#else
#define DDPM_KERNELS_CPU_DROPOUT_INL_H_
#endif

#include <cstring>

#include "kernels/cpu/philox-inl.h"

HWY_BEFORE_NAMESPACE();
namespace ddpm::cpu::HWY_NAMESPACE {

// The 16-bit draws of blocks first, first + 1, ... of a stream, eight per block: of each word the
// low half, then the high one. Writes `blocks` rounded up to a multiple of lanes().
HWY_INLINE HWY_ATTR void draw16(const RandomStream& stream, uint32_t first, int64_t blocks,
                                uint16_t* draws) {
  HWY_ALIGN uint32_t words[4 * hn::MaxLanes(FloatTag())];
  for (int64_t b = 0; b < blocks; b += lanes()) {
    const WordBlock w = philox_blocks(stream, first + static_cast<uint32_t>(b));
    hn::StoreInterleaved4(w.w0, w.w1, w.w2, w.w3, WordTag(), words);
    std::memcpy(draws + 8 * b, words, static_cast<size_t>(lanes()) * 16);  // little-endian
  }
}

// v * factor where the draw says keep, else 0. Reads lanes() draws.
HWY_INLINE HWY_ATTR Float drop(Float v, const uint16_t* draws, int32_t threshold, Float factor) {
  const FloatTag d;
  const hn::RebindToSigned<FloatTag> di;
  const auto draw = hn::PromoteTo(di, hn::LoadU(hn::Rebind<uint16_t, FloatTag>(), draws));
  const auto keep = hn::RebindMask(d, hn::Gt(draw, hn::Set(di, threshold - 1)));
  return hn::IfThenElseZero(keep, hn::Mul(v, factor));
}

}  // namespace ddpm::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif
