// float for results of 16 bits: the same operators, and primitives of few instructions, each exact to a fraction of
// float16's unit. The activations of activations.h take it as they take float and double.
//
// What the special function unit has is taken as it is: ex2, rcp, lg2, sqrt and tanh by their .approx forms (PTX ISA,
// "Floating Point Instructions"). Errors are relative to the result, so that the tails of sigmoid and of the normal
// distribution keep their digits: tanh.approx alone, off by 2⁻¹¹, would leave none of 1 + tanh(u) at u = −4, and serves
// for tanh itself. On the host the five are computed exactly, but for the subnormal numbers that .ftz makes 0, and all
// else is the same text
// (docs/decisions/2026-11-24-epilogue-arithmetic.md).
#pragma once

#include <cmath>

#include "../primitives.h"
#include "normal_logit.h"

namespace fastbp::cuda {

struct Approximate {
  float v;

  Approximate() = default;
  HD explicit constexpr Approximate(double x) : v(static_cast<float>(x)) {}
  HD explicit constexpr Approximate(float x) : v(x) {}

  HD Approximate operator-() const { return Approximate(-v); }
  HD friend Approximate operator+(Approximate a, Approximate b) { return Approximate(a.v + b.v); }
  HD friend Approximate operator-(Approximate a, Approximate b) { return Approximate(a.v - b.v); }
  HD friend Approximate operator*(Approximate a, Approximate b) { return Approximate(a.v * b.v); }
  HD friend bool operator<(Approximate a, Approximate b) { return a.v < b.v; }
  HD friend bool operator>(Approximate a, Approximate b) { return a.v > b.v; }
  HD friend bool operator<=(Approximate a, Approximate b) { return a.v <= b.v; }
  HD friend bool operator>=(Approximate a, Approximate b) { return a.v >= b.v; }
  HD friend bool operator==(Approximate a, Approximate b) { return a.v == b.v; }
};

#ifndef __CUDA_ARCH__
// What .ftz makes of a number that goes in or comes out.
inline float flushed(float x) { return std::abs(x) < 1.1754943508222875e-38f ? std::copysign(0.0f, x) : x; }
#endif

// 2ˣ, off by 2⁻²², 0 below 2⁻¹²⁶.
HD float power_of_two(float x) {
#ifdef __CUDA_ARCH__
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return flushed(std::exp2(flushed(x)));
#endif
}

// 1 / x, off by one unit; 0 for |x| above 2¹²⁶.
HD float reciprocal(float x) {
#ifdef __CUDA_ARCH__
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return flushed(1.0f / flushed(x));
#endif
}

HD float log_of(float x) {
#ifdef __CUDA_ARCH__
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y * 0.6931471805599453f;
#else
  return std::log(flushed(x));
#endif
}

// Of any b from 2⁻¹²⁴ on: its quarter has a reciprocal.
HD Approximate operator/(Approximate a, Approximate b) { return Approximate(a.v * 0.25f * reciprocal(b.v * 0.25f)); }

}  // namespace fastbp::cuda

namespace fastbp::prim {

using cuda::Approximate;

template <>
HD Approximate absolute(Approximate x) {
  return Approximate(std::abs(x.v));
}

template <>
HD Approximate exp(Approximate x) {
  return Approximate(cuda::power_of_two(x.v * 1.4426950408889634f));
}

// Near 0 by its series: there the difference cancels.
template <>
HD Approximate expm1(Approximate x) {
  const float near = x.v + x.v * x.v * (0.5f + x.v * 0.16666666666666666f);
  return Approximate(std::abs(x.v) < 0.03125f ? near : exp(x).v - 1.0f);
}

// Near 0 by its series: there the sum has lost the digits of x.
template <>
HD Approximate log1p(Approximate x) {
  const float near = x.v - x.v * x.v * (0.5f - x.v * 0.3333333333333333f);
  return Approximate(std::abs(x.v) < 0.015625f ? near : cuda::log_of(1.0f + x.v));
}

// 1 / (1 + e^(−x p(x²))): the logit of Φ over x is smooth and even.
template <>
HD Approximate normal_cdf(Approximate x) {
  const float square = minimum(x.v * x.v, cuda::kNormalEndSquared);
  return Approximate(cuda::reciprocal(1.0f + cuda::power_of_two(x.v * cuda::normal_logit(square))));
}

template <>
HD Approximate normal_pdf(Approximate x) {
  return Approximate(cuda::power_of_two(x.v * x.v * -0.7213475204444817f - 1.3257480647361592f));
}

// Where e⁻ˣ overflows, 1 / inf is the 0 that belongs there.
template <>
HD Approximate sigmoid(Approximate x) {
  return Approximate(cuda::reciprocal(1.0f + cuda::power_of_two(x.v * -1.4426950408889634f)));
}

template <>
HD Approximate sqrt(Approximate x) {
#ifdef __CUDA_ARCH__
  Approximate y;
  asm("sqrt.approx.ftz.f32 %0, %1;" : "=f"(y.v) : "f"(x.v));
  return y;
#else
  return Approximate(std::sqrt(cuda::flushed(x.v)));
#endif
}

template <>
HD Approximate tanh(Approximate x) {
#ifdef __CUDA_ARCH__
  Approximate y;
  asm("tanh.approx.f32 %0, %1;" : "=f"(y.v) : "f"(x.v));
  return y;
#else
  return Approximate(std::tanh(x.v));
#endif
}

// 1 / (1 + e⁻²ˣ), which keeps the digits of the tail.
template <>
HD Approximate tanh_cdf(Approximate x) {
  return Approximate(cuda::reciprocal(1.0f + cuda::power_of_two(x.v * -2.8853900817779268f)));
}

// 2 c (1 − c) with c the value, which is computed once for both.
template <>
HD Approximate tanh_pdf(Approximate x) {
  const float c = tanh_cdf(x).v;
  return Approximate(2.0f * c * (1.0f - c));
}

}  // namespace fastbp::prim
