// Philox4x32-10 on vectors, and the normal numbers made of it: lane l of a vector holds block
// first + l of a stream (kernels/philox.h), so a number depends on its address alone.
#if defined(DDPM_KERNELS_CPU_PHILOX_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef DDPM_KERNELS_CPU_PHILOX_INL_H_
#undef DDPM_KERNELS_CPU_PHILOX_INL_H_
#else
#define DDPM_KERNELS_CPU_PHILOX_INL_H_
#endif

#include <cstring>
#include <numbers>

#include "kernels/cpu/simd-inl.h"
#include "kernels/philox.h"

HWY_BEFORE_NAMESPACE();
namespace ddpm::cpu::HWY_NAMESPACE {

using WordTag = hn::ScalableTag<uint32_t>;
using Words = hn::Vec<WordTag>;

// The four words of as many blocks as there are lanes.
struct WordBlock {
  Words w0, w1, w2, w3;
};

HWY_INLINE HWY_ATTR void multiply_wide(Words a, Words b, Words& high, Words& low) {
  const WordTag d;
#if HWY_TARGET == HWY_SCALAR
  const uint64_t product = uint64_t{hn::GetLane(a)} * hn::GetLane(b);
  high = hn::Set(d, static_cast<uint32_t>(product >> 32));
  low = hn::Set(d, static_cast<uint32_t>(product));
#else
  const hn::ScalableTag<uint64_t> wide;
  const auto even = hn::MulEven(a, b);
  const auto odd = hn::MulEven(hn::BitCast(d, hn::ShiftRight<32>(hn::BitCast(wide, a))), b);
  high = hn::OddEven(hn::BitCast(d, odd), hn::BitCast(d, hn::ShiftRight<32>(even)));
  low = hn::OddEven(hn::BitCast(d, hn::ShiftLeft<32>(odd)), hn::BitCast(d, even));
#endif
}

HWY_INLINE HWY_ATTR WordBlock philox_blocks(const RandomStream& stream, uint32_t first) {
  const WordTag d;
  const Philox4 counter = stream.counter(first);
  WordBlock c{hn::Iota(d, counter[0]), hn::Set(d, counter[1]), hn::Set(d, counter[2]),
              hn::Set(d, counter[3])};
  uint32_t key_low = static_cast<uint32_t>(stream.seed);
  uint32_t key_high = static_cast<uint32_t>(stream.seed >> 32);
  const Words m0 = hn::Set(d, 0xD2511F53u), m1 = hn::Set(d, 0xCD9E8D57u);
  for (int round = 0; round < 10; ++round) {
    Words high0, low0, high1, low1;
    multiply_wide(c.w0, m0, high0, low0);
    multiply_wide(c.w2, m1, high1, low1);
    c = {hn::Xor(hn::Xor(high1, c.w1), hn::Set(d, key_low)), low1,
         hn::Xor(hn::Xor(high0, c.w3), hn::Set(d, key_high)), low0};
    key_low += 0x9E3779B9u;
    key_high += 0xBB67AE85u;
  }
  return c;
}

// uniform_open() of each lane. Both halves convert exactly, so their sum rounds once.
HWY_INLINE HWY_ATTR Float uniform_open(Words bits) {
  const FloatTag d;
  const hn::RebindToSigned<WordTag> di;
  const Float high = hn::ConvertTo(d, hn::BitCast(di, hn::ShiftRight<16>(bits)));
  const Float low = hn::ConvertTo(d, hn::BitCast(di, hn::And(bits, hn::Set(WordTag(), 0xFFFFu))));
  const Float all = hn::MulAdd(high, hn::Set(d, 65536.0f), low);
  return hn::MulAdd(all, hn::Set(d, 0x1p-32f), hn::Set(d, 0x1p-33f));
}

// sin and cos of 2 pi u, 0 <= u <= 1. u = q / 4 + f is exact with |f| <= 1/8, so only the angle
// 2 pi f rounds; up to pi / 4 the Taylor series to x^9 and x^8 are within 3e-8.
HWY_INLINE HWY_ATTR void sin_cos_turn(Float u, Float& sine, Float& cosine) {
  const FloatTag d;
  const auto quarter = hn::NearestInt(hn::Mul(u, hn::Set(d, 4.0f)));
  const Float f = hn::NegMulAdd(hn::ConvertTo(d, quarter), hn::Set(d, 0.25f), u);
  const Float x = hn::Mul(f, hn::Set(d, 2 * std::numbers::pi_v<float>));
  const Float xx = hn::Mul(x, x);
  Float s = hn::MulAdd(xx, hn::Set(d, 1.0f / 362880), hn::Set(d, -1.0f / 5040));
  s = hn::MulAdd(xx, s, hn::Set(d, 1.0f / 120));
  s = hn::MulAdd(xx, s, hn::Set(d, -1.0f / 6));
  s = hn::MulAdd(hn::Mul(xx, x), s, x);
  Float c = hn::MulAdd(xx, hn::Set(d, 1.0f / 40320), hn::Set(d, -1.0f / 720));
  c = hn::MulAdd(xx, c, hn::Set(d, 1.0f / 24));
  c = hn::MulAdd(xx, c, hn::Set(d, -0.5f));
  c = hn::MulAdd(xx, c, hn::Set(d, 1.0f));

  // A turn by q quarters: (c, s), (-s, c), (-c, -s), (s, -c).
  const hn::RebindToSigned<FloatTag> di;
  const auto one = hn::Set(di, 1), two = hn::Set(di, 2);
  const auto odd = hn::RebindMask(d, hn::Eq(hn::And(quarter, one), one));
  const auto sine_sign = hn::ShiftLeft<30>(hn::And(quarter, two));
  const auto cosine_sign = hn::ShiftLeft<30>(hn::And(hn::Add(quarter, one), two));
  sine = hn::Xor(hn::IfThenElse(odd, c, s), hn::BitCast(d, sine_sign));
  cosine = hn::Xor(hn::IfThenElse(odd, s, c), hn::BitCast(d, cosine_sign));
}

// Box-Muller: two normal numbers from two words.
HWY_INLINE HWY_ATTR void box_muller(Words w0, Words w1, Float& z0, Float& z1) {
  const FloatTag d;
  const Float radius = hn::Sqrt(hn::Mul(hn::Set(d, -2.0f), hn::Log(d, uniform_open(w0))));
  Float sine, cosine;
  sin_cos_turn(uniform_open(w1), sine, cosine);
  z0 = hn::Mul(radius, cosine);
  z1 = hn::Mul(radius, sine);
}

// The first `count` normals of a stream from block `first` on: element i is component i % 4 of
// block first + i / 4.
inline HWY_ATTR void normals(const RandomStream& stream, uint32_t first, int64_t count,
                             float* out) {
  const FloatTag d;
  HWY_ALIGN float last[4 * hn::MaxLanes(d)];
  for (int64_t i = 0; i < count; i += 4 * lanes(), first += static_cast<uint32_t>(lanes())) {
    const WordBlock w = philox_blocks(stream, first);
    Float z0, z1, z2, z3;
    box_muller(w.w0, w.w1, z0, z1);
    box_muller(w.w2, w.w3, z2, z3);
    if (count - i >= 4 * lanes()) {
      hn::StoreInterleaved4(z0, z1, z2, z3, d, out + i);
    } else {
      hn::StoreInterleaved4(z0, z1, z2, z3, d, last);
      std::memcpy(out + i, last, static_cast<size_t>(count - i) * sizeof(float));
    }
  }
}

}  // namespace ddpm::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif
