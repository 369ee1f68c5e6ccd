// Numbers of every dtype into registers of the compute type, and back: 16-bit floats are computed in float.
#pragma once

#include "kernels.h"
#include "vec.h"

namespace fastbp::cpu::FASTBP_CAPABILITY {

typedef uint16_t Words __attribute__((vector_size(FASTBP_VECTOR_BYTES / 2)));
typedef uint16_t WordsAnywhere __attribute__((vector_size(FASTBP_VECTOR_BYTES / 2), aligned(2), may_alias));
using Bits32 = Native<float>::Bits;

// GCC takes a detour for __builtin_convertvector between these widths.
HD Bits32 longer(Words words) {
#if defined(__AVX512F__)
  return reinterpret_cast<Bits32>(_mm512_cvtepu16_epi32(reinterpret_cast<__m256i>(words)));
#elif defined(__AVX2__)
  return reinterpret_cast<Bits32>(_mm256_cvtepu16_epi32(reinterpret_cast<__m128i>(words)));
#else
  return __builtin_convertvector(words, Bits32);
#endif
}

// The low halves.
HD Words shorter(Bits32 bits) {
#if defined(__AVX512F__)
  return reinterpret_cast<Words>(_mm512_cvtepi32_epi16(reinterpret_cast<__m512i>(bits)));
#else
  return __builtin_convertvector(bits, Words);
#endif
}

HD Vec<float> widen(Words words, BFloat16) { return Vec<float>::of(longer(words) << 16); }

// To nearest, ties to even; NaN becomes the quiet NaN that PyTorch writes.
HD Words narrow(Vec<float> x, BFloat16) {
#if defined(__AVX512BF16__)  // which makes a subnormal 0, as its products do
  return reinterpret_cast<Words>(_mm512_cvtneps_pbh(reinterpret_cast<__m512>(x.v)));
#else
  const Bits32 bits = x.bits(), rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  return shorter((x == x).m ? rounded : Bits32{} + 0x7fc0);
#endif
}

HD Vec<float> widen(Words words, Half) {
#if defined(__AVX512F__)
  return Vec<float>(reinterpret_cast<Native<float>::Lanes>(_mm512_cvtph_ps(reinterpret_cast<__m256i>(words))));
#elif defined(__F16C__)
  return Vec<float>(reinterpret_cast<Native<float>::Lanes>(_mm256_cvtph_ps(reinterpret_cast<__m128i>(words))));
#else
  // The exponent is moved to float's place by a product, which also makes subnormal halves normal.
  const Bits32 bits = longer(words), magnitude = (bits & 0x7fff) << 13;
  const Bits32 moved = (Vec<float>::of(magnitude) * Vec<float>(0x1p112f)).bits();
  const Bits32 special = magnitude >= 0x7c00 << 13;  // inf and NaN
  return Vec<float>::of((special ? magnitude | 0x7f800000 : moved) | ((bits & 0x8000) << 16));
#endif
}

HD Words narrow(Vec<float> x, Half) {
#if defined(__AVX512F__)
  return reinterpret_cast<Words>(_mm512_cvtps_ph(reinterpret_cast<__m512>(x.v), _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__)
  return reinterpret_cast<Words>(_mm256_cvtps_ph(reinterpret_cast<__m256>(x.v), _MM_FROUND_TO_NEAREST_INT));
#else
  const Bits32 all = x.bits(), magnitude = all & 0x7fffffff;
  const Bits32 normal = (magnitude - (112 << 23) + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  // Below the least normal half, adding 1/2 leaves the rounded digits in the low bits.
  const Bits32 subnormal = (Vec<float>::of(magnitude) + Vec<float>(0.5f)).bits() - 0x3f000000;
  const Bits32 finite = magnitude < 113 << 23 ? subnormal : normal;
  const Bits32 special = magnitude > 0x7f800000 ? Bits32{} + 0x7e00 : Bits32{} + 0x7c00;
  const Bits32 half = magnitude >= 0x477ff000 ? special : finite;  // 65520 rounds to inf
  return shorter(half | ((all >> 16) & 0x8000));
#endif
}

template <class T, class S>
HD Vec<S> load(const T* from) {
  if constexpr (sizeof(T) == sizeof(typename Vec<S>::Number)) {
    return Vec<S>::load(reinterpret_cast<const typename Vec<S>::Number*>(from));
  } else {
    return Vec<S>(widen(*reinterpret_cast<const WordsAnywhere*>(from), T{}).v);
  }
}

template <class T, class S>
HD void store(Vec<S> x, T* to) {
  if constexpr (sizeof(T) == sizeof(typename Vec<S>::Number)) {
    x.store(reinterpret_cast<typename Vec<S>::Number*>(to));
  } else {
    *reinterpret_cast<WordsAnywhere*>(to) = narrow(Vec<float>(x.v), T{});
  }
}

template <class T, class S>
HD Vec<S> load(const T* from, int64_t n) {
  if constexpr (sizeof(T) == sizeof(typename Vec<S>::Number)) {
    return Vec<S>::load(reinterpret_cast<const typename Vec<S>::Number*>(from), n);
  } else {
#if defined(__AVX512F__)
    const __m256i words = _mm256_maskz_loadu_epi16(Vec<float>::first(n), from);
    return Vec<S>(widen(reinterpret_cast<Words>(words), T{}).v);
#else
    T buffer[Vec<S>::size] = {};
    for (int64_t i = 0; i < n; ++i) buffer[i] = from[i];
    return load<T, S>(buffer);
#endif
  }
}

template <class T, class S>
HD void store(Vec<S> x, T* to, int64_t n) {
  if constexpr (sizeof(T) == sizeof(typename Vec<S>::Number)) {
    x.store(reinterpret_cast<typename Vec<S>::Number*>(to), n);
  } else {
#if defined(__AVX512F__)
    const Words words = narrow(Vec<float>(x.v), T{});
    _mm256_mask_storeu_epi16(to, Vec<float>::first(n), reinterpret_cast<__m256i>(words));
#else
    T buffer[Vec<S>::size];
    store<T, S>(x, buffer);
    for (int64_t i = 0; i < n; ++i) to[i] = buffer[i];
#endif
  }
}

// n numbers, `stride` apart, into a row.
template <class T, class S>
static void read_row(int64_t n, const void* source, int64_t stride, S* to) {
  const T* from = static_cast<const T*>(source);
  constexpr int width = Vec<S>::size;
  if (stride != 1) {
    T buffer[width];
    for (int64_t i = 0; i < n; i += width) {
      const int64_t count = n - i < width ? n - i : width;
      for (int64_t j = 0; j < count; ++j) buffer[j] = from[(i + j) * stride];
      for (int64_t j = count; j < width; ++j) buffer[j] = T{};
      load<T, S>(buffer).store(to + i, count);
    }
    return;
  }
  int64_t i = 0;
  for (; i + width <= n; i += width) load<T, S>(from + i).store(to + i);
  if (i < n) load<T, S>(from + i, n - i).store(to + i, n - i);
}

template <class T, class S>
static void write_row(int64_t n, const S* from, void* target) {
  T* to = static_cast<T*>(target);
  constexpr int width = Vec<S>::size;
  int64_t i = 0;
  for (; i + width <= n; i += width) store<T, S>(Vec<S>::load(from + i), to + i);
  if (i < n) store<T, S>(Vec<S>::load(from + i, n - i), to + i, n - i);
}

}  // namespace fastbp::cpu::FASTBP_CAPABILITY
