// A register of numbers, by the vector extensions that GCC and Clang share: the same text for every instruction set.
//
// Everything here and in the files that build on it is compiled once per capability (kernels.cpp), each time in a
// namespace of its own, so that no function compiled for a wide instruction set can be linked into the path of another.
#pragma once

#include <stdint.h>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "../primitives.h"

#ifndef FASTBP_CAPABILITY
#error "FASTBP_CAPABILITY must name the capability that this file is compiled for"
#endif

#if defined(__AVX512F__)
#define FASTBP_VECTOR_BYTES 64
#elif defined(__AVX2__)
#define FASTBP_VECTOR_BYTES 32
#else
#define FASTBP_VECTOR_BYTES 16
#endif

#define FASTBP_UNROLL _Pragma("GCC unroll 16")

namespace fastbp::cpu {

// A float of which a result of 16 bits is made: five digits are enough, and the polynomials shorter.
struct Coarse;

}  // namespace fastbp::cpu

namespace fastbp::cpu::FASTBP_CAPABILITY {

// The compiler's own register types; `Anywhere` is one in memory, at any address.
template <class S>
struct Native;
template <>
struct Native<float> {
  using Number = float;
  typedef float Lanes __attribute__((vector_size(FASTBP_VECTOR_BYTES)));
  typedef int32_t Bits __attribute__((vector_size(FASTBP_VECTOR_BYTES)));
  typedef float Anywhere __attribute__((vector_size(FASTBP_VECTOR_BYTES), aligned(4), may_alias));
};
template <>
struct Native<double> {
  using Number = double;
  typedef double Lanes __attribute__((vector_size(FASTBP_VECTOR_BYTES)));
  typedef int64_t Bits __attribute__((vector_size(FASTBP_VECTOR_BYTES)));
  typedef double Anywhere __attribute__((vector_size(FASTBP_VECTOR_BYTES), aligned(8), may_alias));
};

template <>
struct Native<Coarse> : Native<float> {};

template <class S>
struct Mask;

// One register of S: float, double or Coarse.
template <class S>
struct Vec {
  using Number = typename Native<S>::Number;
  static constexpr int size = FASTBP_VECTOR_BYTES / sizeof(Number);
  using Lanes = typename Native<S>::Lanes;
  using Bits = typename Native<S>::Bits;
  using Anywhere = typename Native<S>::Anywhere;

  Lanes v;

  HD Vec() = default;
  HD Vec(Lanes lanes) : v(lanes) {}
  HD Vec(Number number) : v(number - Lanes{}) {}  // x - 0 is x for every x, -0 and NaN too

  static HD Vec load(const Number* from) { return Vec(*reinterpret_cast<const Anywhere*>(from)); }
  HD void store(Number* to) const { *reinterpret_cast<Anywhere*>(to) = v; }

  // The first n numbers, with zeros after them; the first n numbers only.
  static HD Vec load(const Number* from, int64_t n) {
#if defined(__AVX512F__)
    if constexpr (sizeof(Number) == 4) {
      return Vec(reinterpret_cast<Lanes>(_mm512_maskz_loadu_ps(first(n), from)));
    } else {
      return Vec(reinterpret_cast<Lanes>(_mm512_maskz_loadu_pd(first(n), from)));
    }
#else
    Number buffer[size] = {};
    for (int64_t i = 0; i < n; ++i) buffer[i] = from[i];
    return load(buffer);
#endif
  }
  HD void store(Number* to, int64_t n) const {
#if defined(__AVX512F__)
    if constexpr (sizeof(Number) == 4) {
      _mm512_mask_storeu_ps(to, first(n), (__m512)v);
    } else {
      _mm512_mask_storeu_pd(to, first(n), (__m512d)v);
    }
#else
    Number buffer[size];
    store(buffer);
    for (int64_t i = 0; i < n; ++i) to[i] = buffer[i];
#endif
  }

  // A bit for each of the first n lanes.
  static HD uint16_t first(int64_t n) { return static_cast<uint16_t>((uint32_t{1} << n) - 1); }

  HD Bits bits() const { return reinterpret_cast<Bits>(v); }
  static HD Vec of(Bits bits) { return Vec(reinterpret_cast<Lanes>(bits)); }

  HD Vec operator-() const { return Vec(-v); }
  friend HD Vec operator+(Vec a, Vec b) { return Vec(a.v + b.v); }
  friend HD Vec operator-(Vec a, Vec b) { return Vec(a.v - b.v); }
  friend HD Vec operator*(Vec a, Vec b) { return Vec(a.v * b.v); }
  friend HD Vec operator/(Vec a, Vec b) { return Vec(a.v / b.v); }
  friend HD Mask<S> operator<(Vec a, Vec b) { return {a.v < b.v}; }
  friend HD Mask<S> operator<=(Vec a, Vec b) { return {a.v <= b.v}; }
  friend HD Mask<S> operator>(Vec a, Vec b) { return {a.v > b.v}; }
  friend HD Mask<S> operator>=(Vec a, Vec b) { return {a.v >= b.v}; }
  friend HD Mask<S> operator==(Vec a, Vec b) { return {a.v == b.v}; }
};

// What a comparison gives: all bits of a lane, or none.
template <class S>
struct Mask {
  typename Vec<S>::Bits m;
};

// The lesser and the greater of a number and a limit, NaN kept. One instruction each; GCC makes two of the plain text.
template <class S>
HD Vec<S> lesser(Vec<S> x, Vec<S> limit) {
#if defined(__AVX512F__)
  if constexpr (sizeof(typename Vec<S>::Number) == 4) {
    return Vec<S>(reinterpret_cast<Native<float>::Lanes>(_mm512_min_ps((__m512)limit.v, (__m512)x.v)));
  } else {
    return Vec<S>(reinterpret_cast<Native<double>::Lanes>(_mm512_min_pd((__m512d)limit.v, (__m512d)x.v)));
  }
#elif defined(__AVX2__)
  if constexpr (sizeof(typename Vec<S>::Number) == 4) {
    return Vec<S>(reinterpret_cast<Native<float>::Lanes>(_mm256_min_ps((__m256)limit.v, (__m256)x.v)));
  } else {
    return Vec<S>(reinterpret_cast<Native<double>::Lanes>(_mm256_min_pd((__m256d)limit.v, (__m256d)x.v)));
  }
#else
  return Vec<S>(limit.v < x.v ? limit.v : x.v);
#endif
}

template <class S>
HD Vec<S> greater(Vec<S> x, Vec<S> limit) {
  return -lesser(-x, -limit);
}

}  // namespace fastbp::cpu::FASTBP_CAPABILITY
