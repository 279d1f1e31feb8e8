// Vector helpers of the CPU loops, compiled once per instruction set (Highway's foreach_target).
// Tails run through the same vector code with masked loads and stores, so a value never depends on
// its place in a loop.
#if defined(DDPM_KERNELS_CPU_SIMD_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef DDPM_KERNELS_CPU_SIMD_INL_H_
#undef DDPM_KERNELS_CPU_SIMD_INL_H_
#else
#define DDPM_KERNELS_CPU_SIMD_INL_H_
#endif

#include <cstdint>

#include <hwy/contrib/math/math-inl.h>
#include <hwy/highway.h>

HWY_BEFORE_NAMESPACE();
namespace ddpm::cpu::HWY_NAMESPACE {

namespace hn = hwy::HWY_NAMESPACE;
using FloatTag = hn::ScalableTag<float>;
using Float = hn::Vec<FloatTag>;

inline HWY_ATTR int64_t lanes() { return static_cast<int64_t>(hn::Lanes(FloatTag())); }

// Up to one vector from p; lanes beyond `remaining` are zero.
HWY_INLINE HWY_ATTR Float load(const float* p, int64_t remaining) {
  const FloatTag d;
  if (HWY_LIKELY(remaining >= lanes())) return hn::LoadU(d, p);
  return hn::MaskedLoad(hn::FirstN(d, static_cast<size_t>(remaining)), d, p);
}
HWY_INLINE HWY_ATTR void store(Float v, float* p, int64_t remaining) {
  const FloatTag d;
  if (HWY_LIKELY(remaining >= lanes()))
    hn::StoreU(v, d, p);
  else
    hn::BlendedStore(v, hn::FirstN(d, static_cast<size_t>(remaining)), d, p);
}

// low += v^2 of the lower lanes, high += v^2 of the upper ones, in double. A float's square is
// exact there and cannot overflow.
using DoubleTag = hn::ScalableTag<double>;
using Double = hn::Vec<DoubleTag>;
HWY_INLINE HWY_ATTR void add_squares(Float v, Double& low, Double& high) {
  const DoubleTag d;
#if HWY_TARGET == HWY_SCALAR
  const Double a = hn::PromoteTo(d, v), b = hn::Zero(d);
#else
  const hn::Half<FloatTag> half;
  const Double a = hn::PromoteTo(d, hn::LowerHalf(half, v));
  const Double b = hn::PromoteTo(d, hn::UpperHalf(half, v));
#endif
  low = hn::MulAdd(a, a, low);
  high = hn::MulAdd(b, b, high);
}

// exp(x) for |x| <= 87, relative error 1e-7, at about half the cost of Highway's, which covers the
// whole range. exp(x) = 2^n exp(r), |r| <= ln(2) / 2, a polynomial of degree 6.
HWY_INLINE HWY_ATTR Float exp_small(Float x) {
  const FloatTag d;
  const hn::RebindToSigned<FloatTag> di;
  const auto n = hn::NearestInt(hn::Mul(x, hn::Set(d, 1.44269504f)));
  const Float whole = hn::ConvertTo(d, n);
  // ln(2) in two parts, of which the first times n is exact.
  Float r = hn::NegMulAdd(whole, hn::Set(d, 0.693359375f), x);
  r = hn::MulAdd(whole, hn::Set(d, 2.12194440e-4f), r);
  const Float rr = hn::Mul(r, r);
  Float high = hn::MulAdd(r, hn::Set(d, 1.39261818e-3f), hn::Set(d, 8.36317763e-3f));
  Float low = hn::MulAdd(r, hn::Set(d, 1.66664664e-1f), hn::Set(d, 0.5f));
  high = hn::MulAdd(r, high, hn::Set(d, 4.16665546e-2f));
  const Float p = hn::MulAdd(rr, hn::MulAdd(rr, high, low), hn::Add(r, hn::Set(d, 1.0f)));
  return hn::BitCast(d, hn::Add(hn::BitCast(di, p), hn::ShiftLeft<23>(n)));
}

// 1 / (1 + exp(-x)). The clamp keeps exp in its valid range; a NaN comes out as a number, so a
// caller that must pass NaN on multiplies by x (as SiLU does).
HWY_INLINE HWY_ATTR Float sigmoid(Float x) {
  const FloatTag d;
  const Float clamped = hn::Clamp(x, hn::Set(d, -87.0f), hn::Set(d, 87.0f));
  const Float one = hn::Set(d, 1.0f);
  return hn::Div(one, hn::Add(one, exp_small(hn::Neg(clamped))));
}

HWY_INLINE HWY_ATTR Float silu(Float x) { return hn::Mul(x, sigmoid(x)); }

// d silu / dx = s + x s (1 - s), s = sigmoid(x).
HWY_INLINE HWY_ATTR Float silu_slope(Float x) {
  const Float s = sigmoid(x);
  return hn::MulAdd(hn::Mul(x, s), hn::Sub(hn::Set(FloatTag(), 1.0f), s), s);
}

}  // namespace ddpm::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif
