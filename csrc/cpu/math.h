// The primitives of fastbp/formulas.py on registers, for float and double, and the activations made of them.
//
// exp, expm1 and sigmoid rest on one polynomial for eʳ − 1 after the reduction of Cody and Waite, x = n ln 2 + r; tanh
// and erf have a range near 0 and one made of exp, log1p the series of atanh; the normal distribution is looked up
// where there is AVX-512. Polynomials: tools/fit_polynomials.py. Errors: docs/numerics.md. NaN stays NaN everywhere, as
// a comparison with it is false.
#pragma once

#include <type_traits>

#include "vec.h"
// after vec.h, which declares Coarse
#include "polynomials.h"

namespace fastbp::prim {

template <class S>
using Register = cpu::FASTBP_CAPABILITY::Vec<S>;
template <class S>
using Number = typename Register<S>::Number;
template <class S>
using Condition = cpu::FASTBP_CAPABILITY::Mask<S>;

template <class S>
struct Range;
template <>
struct Range<float> {
  static constexpr float kHuge = 89, kTiny = -104;  // where eˣ is inf and 0
  static constexpr float kLog2Hi = 0.693145751953125f, kLog2Lo = 1.42860682e-06f;
  static constexpr float kMagic = 12582912.0f;  // 1.5 · 2²³: adding it rounds to an integer, in the low bits
  static constexpr float kTanhIsOne = 10, kErfEnd = 4, kExpm1IsExp = 30, kMost = 3.4028235e38f;
  static constexpr int kMantissa = 23, kBias = 127, kSqrtHalf = 0x3f3504f3, kAbs = 0x7fffffff;
};
template <>
struct Range<cpu::Coarse> : Range<float> {};
template <>
struct Range<double> {
  static constexpr double kHuge = 710, kTiny = -746;
  static constexpr double kLog2Hi = 6.93147180369123816490e-01, kLog2Lo = 1.90821492927058770002e-10;
  static constexpr double kMagic = 6755399441055744.0;  // 1.5 · 2⁵², whose low bits are zero too
  static constexpr double kTanhIsOne = 20, kErfEnd = 6, kExpm1IsExp = 60, kMost = 1.7976931348623157e308;
  static constexpr int64_t kMantissa = 52, kBias = 1023, kSqrtHalf = 0x3fe6a09e667f3bcd, kAbs = 0x7fffffffffffffff;
};

template <class S>
HD Register<S> select(Condition<S> condition, Register<S> a, Register<S> b) {
  return Register<S>(condition.m ? a.v : b.v);
}

template <class S>
HD Register<S> maximum(Register<S> a, Register<S> b) {
  return greater(a, b);
}

template <class S>
HD Register<S> minimum(Register<S> a, Register<S> b) {
  return lesser(a, b);
}

template <class S>
HD Register<S> absolute(Register<S> x) {
  return Register<S>::of(x.bits() & Range<S>::kAbs);
}

template <class S>
HD Register<S> copy_sign(Register<S> magnitude, Register<S> sign) {
  return Register<S>::of((magnitude.bits() & Range<S>::kAbs) | (sign.bits() & ~Range<S>::kAbs));
}

template <class S>
HD Register<S> sqrt(Register<S> x) {
  for (int i = 0; i < Register<S>::size; ++i)
    x.v[i] = sizeof(Number<S>) == 4 ? __builtin_sqrtf(x.v[i]) : __builtin_sqrt(x.v[i]);
  return x;
}

template <class S, class N, int count>
HD Register<S> horner(const N (&coefficients)[count], Register<S> x) {
  Register<S> sum(coefficients[0]);
  FASTBP_UNROLL for (int i = 1; i < count; ++i) sum = sum * x + Register<S>(coefficients[i]);
  return sum;
}

// eˣ = (tail + 1) · power, where neither leaves the range of the type: |x| below 80.
template <class S>
struct Bounded {
  Register<S> tail, power;
};

template <class S>
HD Register<S> reduced(Register<S> x, Register<S>& shifted) {
  using V = Register<S>;
  using R = Range<S>;
  shifted = x * V(Number<S>(1.4426950408889634)) + V(R::kMagic);
  const V n = shifted - V(R::kMagic);
  const V r = (x - n * V(R::kLog2Hi)) - n * V(R::kLog2Lo);
  return r + r * r * horner(cpu::polynomials::Of<S>::kExpm1, r);
}

template <class S>
HD Bounded<S> bounded_exponential(Register<S> x) {
  using V = Register<S>;
  using R = Range<S>;
  V shifted;
  const V tail = reduced(x, shifted);
  // The integer is in the low bits of `shifted`, and all that is above them goes out on the left.
  return {tail, V::of((shifted.bits() + R::kBias) << R::kMantissa)};
}

template <class S>
HD Register<S> bounded_exp(Register<S> x) {
  const auto e = bounded_exponential(x);
  return e.tail * e.power + e.power;
}

// The same for every x: eˣ = (tail + 1) · first · second, the power of two by halves, for it may leave the range where
// eˣ does not.
template <class S>
struct Exponential {
  Register<S> tail, first, second;
};

template <class S>
HD Exponential<S> exponential(Register<S> x) {
  using V = Register<S>;
  using R = Range<S>;
  V shifted;
  const V tail = reduced(maximum(minimum(x, V(R::kHuge)), V(R::kTiny)), shifted);
  const auto power = shifted.bits() - V(R::kMagic).bits(), half = power >> 1;
  return {tail, V::of((half + R::kBias) << R::kMantissa), V::of((power - half + R::kBias) << R::kMantissa)};
}

template <class S>
HD Register<S> exp(Register<S> x) {
  const auto e = exponential(x);
  return (e.tail + Register<S>(Number<S>(1))) * e.first * e.second;
}

template <class S>
HD Register<S> expm1(Register<S> x) {
  using V = Register<S>;
  const auto e = exponential(x);
  const V one(Number<S>(1)), power = e.first * e.second;
  return select(x > V(Range<S>::kExpm1IsExp), (e.tail + one) * e.first * e.second, e.tail * power + (power - one));
}

template <class S>
HD Register<S> sigmoid(Register<S> x) {
  return Register<S>(Number<S>(1)) / (Register<S>(Number<S>(1)) + exp(-x));
}

template <class S>
HD Register<S> tanh(Register<S> x) {
  using V = Register<S>;
  const V t = minimum(absolute(x), V(Range<S>::kTanhIsOne)), one(Number<S>(1)), two(Number<S>(2));
  const V near = t + t * horner(cpu::polynomials::Of<S>::kTanh, t * t);
  const V far = one - two / (bounded_exp(t + t) + one);
  return copy_sign(select(t < V(Number<S>(0.6)), near, far), x);
}

template <class S>
HD Register<S> erf(Register<S> x) {
  using V = Register<S>;
  using P = cpu::polynomials::Of<S>;
  const V t = minimum(absolute(x), V(Range<S>::kErfEnd)), one(Number<S>(1));
  if constexpr (std::is_same_v<S,
                               cpu::Coarse>) {  // erf t = 1 − e^(−q); by way of e^(−q) − 1 a small t keeps its digits
    const auto e = bounded_exponential(-(t * horner(P::kErfc, t)));
    return copy_sign(e.tail * e.power + (e.power - one), x);
  } else {
    const V near = t + t * horner(P::kErf, t * t);
    const V far = one - bounded_exp(-horner(P::kErfc, t - one));
    return copy_sign(select(t < one, near, far), x);
  }
}

#if defined(__AVX512F__)
// Φ(−|x|) and its derivative by |x| with the sign turned, φ(|x|), from a table of polynomials: 32 numbers are looked up
// in one instruction. Half the time of erf and exp.
template <class S>
struct Normal {
  Register<S> tail, density;
};

template <class S>
HD Normal<S> normal(Register<S> x) {
  using V = Register<S>;
  using P = cpu::polynomials::Of<S>;
  constexpr int count = sizeof P::kNormal / sizeof P::kNormal[0];
  const V magic(Range<float>::kMagic), width(P::kPiece), t = minimum(absolute(x), V(31 * P::kPiece));
  const V shifted = t * V(1 / P::kPiece) + magic;  // the piece's number is in the low bits, which the lookup takes
  const V r = t - (shifted - magic) * width;
  const auto coefficient = [&](const float (&of)[32]) {
    return V(reinterpret_cast<typename V::Lanes>(
        _mm512_permutex2var_ps(_mm512_loadu_ps(of), reinterpret_cast<__m512i>(shifted.v), _mm512_loadu_ps(of + 16))));
  };
  V value = coefficient(P::kNormal[0]), slope = value;
  value = value * r + coefficient(P::kNormal[1]);
  FASTBP_UNROLL for (int i = 2; i < count; ++i) {
    slope = slope * r + value;
    value = value * r + coefficient(P::kNormal[i]);
  }
  return {value, -slope};
}
#endif

template <class S>
HD Register<S> normal_cdf(Register<S> x) {
  using V = Register<S>;
  const V one(Number<S>(1));
#if defined(__AVX512F__)
  if constexpr (sizeof(Number<S>) == 4) {
    const V tail = normal(x).tail;
    return select(x > V(0), one - tail, tail);
  }
#endif
  return V(Number<S>(0.5)) * (one + erf(x * V(Number<S>(0.7071067811865476))));
}

template <class S>
HD Register<S> normal_pdf(Register<S> x) {
  using V = Register<S>;
#if defined(__AVX512F__)
  if constexpr (sizeof(Number<S>) == 4) return normal(x).density;
#endif
  return V(Number<S>(0.3989422804014327)) * exp(V(Number<S>(-0.5)) * x * x);
}

template <class S>
HD Register<S> tanh_cdf(Register<S> x) {
  using V = Register<S>;
  return V(Number<S>(0.5)) * (V(Number<S>(1)) + tanh(x));
}

template <class S>
HD Register<S> tanh_pdf(Register<S> x) {
  using V = Register<S>;
  const V t = tanh(x);
  return V(Number<S>(0.5)) * (V(Number<S>(1)) - t * t);
}

// For x >= 0, which is all that softplus asks. With u = 1 + x rounded, log(1 + x) = log u + (1 + x − u) / u.
template <class S>
HD Register<S> log1p(Register<S> x) {
  using V = Register<S>;
  using R = Range<S>;
  const V one(Number<S>(1)), u = one + x;
  const V lost = select(x < one, x - (u - one), one - (u - x));
  const auto exponent = (u.bits() - R::kSqrtHalf) >> R::kMantissa;
  const V f = V::of(u.bits() - (exponent << R::kMantissa)) - one;
  const V s = f / (V(Number<S>(2)) + f), w = s * s;
  const V k(__builtin_convertvector(exponent, typename V::Lanes));
  const V log = (s + s) + s * w * horner(cpu::polynomials::Of<S>::kLog, w);
  return select(x <= V(R::kMost), k * V(R::kLog2Hi) + (log + (k * V(R::kLog2Lo) + lost / u)), x);
}

}  // namespace fastbp::prim

#include "../activations.h"
