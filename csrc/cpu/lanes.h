// Bytes and half bytes beside registers of float, and some lanes of a register next to one another: what the compressed
// policies write and read, fastbp/compression.py.
#pragma once

#include <array>
#include <type_traits>

#include "../compression.h"
#include "convert.h"

namespace fastbp::cpu::FASTBP_CAPABILITY {

typedef uint64_t Quads __attribute__((vector_size(FASTBP_VECTOR_BYTES)));
constexpr int kLanes = Vec<float>::size;

// How many bits float's mantissa has more than T's.
template <class T>
constexpr int kSpare = spare_bits(kDtypeOf<T>);

// A number as T rounds it; and the bits that T has of it, at the low end of a lane, and back.
template <class T>
HD Vec<float> rounded(Vec<float> x) {
  if constexpr (std::is_same_v<T, float>) {
    return x;
  } else {
    return widen(narrow(x, T{}), T{});
  }
}
template <class T>
HD Bits32 to_bits(Vec<float> x) {
  if constexpr (std::is_same_v<T, float>) {
    return x.bits();
  } else {
    return longer(narrow(x, T{}));
  }
}
template <class T>
HD Vec<float> from_bits(Bits32 bits) {
  if constexpr (std::is_same_v<T, float>) {
    return Vec<float>::of(bits);
  } else {
    return widen(shorter(bits), T{});
  }
}

// The low bytes of the lanes.
HD void store_bytes(Bits32 lanes, uint8_t* to) {
#if defined(__AVX512F__)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_cvtepi32_epi8(reinterpret_cast<__m512i>(lanes)));
#elif defined(__AVX2__)
  const __m256i first = _mm256_set1_epi32(0x0c080400);
  const __m256i bytes = _mm256_shuffle_epi8(reinterpret_cast<__m256i>(lanes), first);
  const __m128i all = _mm_unpacklo_epi32(_mm256_castsi256_si128(bytes), _mm256_extracti128_si256(bytes, 1));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(to), all);
#else
  for (int i = 0; i < kLanes; ++i) to[i] = static_cast<uint8_t>(lanes[i]);
#endif
}
HD Bits32 load_bytes(const uint8_t* from) {
#if defined(__AVX512F__)
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
  return reinterpret_cast<Bits32>(_mm512_cvtepu8_epi32(bytes));
#elif defined(__AVX2__)
  const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(from));
  return reinterpret_cast<Bits32>(_mm256_cvtepu8_epi32(bytes));
#else
  Bits32 lanes;
  for (int i = 0; i < kLanes; ++i) lanes[i] = from[i];
  return lanes;
#endif
}

// The low halves of the lanes' low bytes, of which the others are zero, two in a byte. Two lanes are one of 64 bits.
HD void store_halves(Bits32 lanes, uint8_t* to) {
  Quads pairs = reinterpret_cast<Quads>(lanes);
  pairs = pairs | pairs >> 28;
#if defined(__AVX512F__)
  _mm_storel_epi64(reinterpret_cast<__m128i*>(to), _mm512_cvtepi64_epi8(reinterpret_cast<__m512i>(pairs)));
#elif defined(__AVX2__)
  const __m256i place = _mm256_setr_epi64x(0xffffffffffff0800, -1, 0xffffffff0800ffff, -1);
  const __m256i bytes = _mm256_shuffle_epi8(reinterpret_cast<__m256i>(pairs), place);
  const int all = _mm_cvtsi128_si32(_mm_or_si128(_mm256_castsi256_si128(bytes), _mm256_extracti128_si256(bytes, 1)));
  __builtin_memcpy(to, &all, sizeof all);
#else
  for (int i = 0; i < kLanes / 2; ++i) to[i] = static_cast<uint8_t>(pairs[i]);
#endif
}
HD Bits32 load_halves(const uint8_t* from) {
  Quads bytes;
#if defined(__AVX512F__)
  bytes = reinterpret_cast<Quads>(_mm512_cvtepu8_epi64(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from))));
#elif defined(__AVX2__)
  int all;
  __builtin_memcpy(&all, from, sizeof all);
  bytes = reinterpret_cast<Quads>(_mm256_cvtepu8_epi64(_mm_cvtsi32_si128(all)));
#else
  for (int i = 0; i < kLanes / 2; ++i) bytes[i] = from[i];
#endif
  return reinterpret_cast<Bits32>((bytes | bytes << 28) & 0x0000000f0000000f);
}
// Of the first n lanes; the other half of a last byte is zero.
HD void store_halves(Bits32 lanes, uint8_t* to, int64_t n) {
  if (n == kLanes) return store_halves(lanes, to);
  for (int64_t i = n; i < kLanes; ++i) lanes[i] = 0;
  uint8_t buffer[kLanes / 2];
  store_halves(lanes, buffer);
  for (int64_t i = 0; i < (n + 1) / 2; ++i) to[i] = buffer[i];
}
HD Bits32 load_halves(const uint8_t* from, int64_t n) {
  if (n == kLanes) return load_halves(from);
  uint8_t buffer[kLanes / 2] = {};
  for (int64_t i = 0; i < (n + 1) / 2; ++i) buffer[i] = from[i];
  return load_halves(buffer);
}

// A bit for each lane whose highest bit is set.
HD uint32_t high_bits(Bits32 lanes) {
#if defined(__AVX512F__)
  return _mm512_movepi32_mask(reinterpret_cast<__m512i>(lanes));
#elif defined(__AVX2__)
  return static_cast<uint32_t>(_mm256_movemask_ps(reinterpret_cast<__m256>(lanes)));
#else
  uint32_t found = 0;
  for (int i = 0; i < kLanes; ++i) found |= (static_cast<uint32_t>(lanes[i]) >> 31) << i;
  return found;
#endif
}

#if defined(__AVX2__) && !defined(__AVX512F__)
// For each set of eight lanes, a byte a lane: which lane comes to this place, and to which place this lane goes.
using Orders = std::array<uint64_t, 256>;
constexpr Orders orders(bool together) {
  Orders all{};
  for (uint32_t set = 0; set < 256; ++set) {
    int place = 0;
    for (int lane = 0; lane < 8; ++lane) {
      if (!together) all[set] |= static_cast<uint64_t>(place) << 8 * lane;
      if (!(set >> lane & 1)) continue;
      if (together) all[set] |= static_cast<uint64_t>(lane) << 8 * place;
      ++place;
    }
  }
  return all;
}
inline constexpr Orders kTogether = orders(true), kApart = orders(false);

HD Vec<float> reordered(Vec<float> x, const uint64_t& order) {
  const __m256i lanes = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(&order)));
  return Vec<float>(reinterpret_cast<Vec<float>::Lanes>(_mm256_permutevar8x32_ps((__m256)x.v, lanes)));
}
#endif

// The lanes of a set next to one another, and anything after them.
HD void store_together(Vec<float> x, uint32_t set, float* to) {
#if defined(__AVX512F__)
  _mm512_storeu_ps(to, _mm512_maskz_compress_ps(static_cast<__mmask16>(set), (__m512)x.v));
#elif defined(__AVX2__)
  reordered(x, kTogether[set]).store(to);
#else
  for (int i = 0; i < kLanes; ++i) {
    *to = x.v[i];
    to += set >> i & 1;
  }
#endif
}

// x with those numbers back in the lanes of the set.
HD Vec<float> put_back(Vec<float> x, uint32_t set, const float* from) {
#if defined(__AVX512F__)
  const __m512 numbers = _mm512_loadu_ps(from);
  return Vec<float>(
      reinterpret_cast<Vec<float>::Lanes>(_mm512_mask_expand_ps((__m512)x.v, static_cast<__mmask16>(set), numbers)));
#elif defined(__AVX2__)
  const __m256i bits = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  const __m256i chosen = _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(static_cast<int>(set)), bits), bits);
  const Vec<float> numbers = reordered(Vec<float>::load(from), kApart[set]);
  return Vec<float>(reinterpret_cast<Vec<float>::Lanes>(
      _mm256_blendv_ps((__m256)x.v, (__m256)numbers.v, reinterpret_cast<__m256>(chosen))));
#else
  for (int i = 0; i < kLanes; ++i) {
    if (!(set >> i & 1)) continue;
    x.v[i] = *from++;
  }
  return x;
#endif
}

}  // namespace fastbp::cpu::FASTBP_CAPABILITY
