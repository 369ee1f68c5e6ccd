// Rows in e4m3 with a scale for each 32 numbers, as fastbp/compression.py has them.
#pragma once

#include "lanes.h"

namespace fastbp::cpu::FASTBP_CAPABILITY {

HD float float_of(int32_t bits) {
  float number;
  __builtin_memcpy(&number, &bits, sizeof number);
  return number;
}

// To nearest, ties to even, of |x| at most 448.
HD Bits32 to_e4m3(Vec<float> x) {
  const Bits32 all = x.bits(), magnitude = all & 0x7fffffff;
  const Bits32 normal = ((magnitude + 0x7ffff + ((magnitude >> 20) & 1)) >> 20) - (120 << 3);
  // Below the least normal number, adding 2¹⁴ leaves the rounded digits in the low bits.
  const Bits32 subnormal = (Vec<float>::of(magnitude) + Vec<float>(16384.0f)).bits() - 0x46800000;
  return (magnitude < (121 << 23) ? subnormal : normal) | ((all >> 24) & 0x80);
}

HD Vec<float> from_e4m3(Bits32 codes) {
  const Bits32 magnitude = codes & 0x7f;
  const Vec<float> subnormal = Vec<float>(__builtin_convertvector(magnitude, Vec<float>::Lanes)) * Vec<float>(0x1p-9f);
  const Bits32 normal = magnitude == 0x7f ? Bits32{} + 0x7fc00000 : (magnitude << 20) + (120 << 23);
  return Vec<float>::of((magnitude < 8 ? subnormal.bits() : normal) | (codes & 0x80) << 24);
}

// f(register of a block, where it begins) for all of them.
template <class F>
HD void for_block(const F& f) {
  FASTBP_UNROLL for (int p = 0; p < kBlock / kLanes; ++p) f(p, p * kLanes);
}

// Of numbers of T, in rows of them or of float.
template <class T, class Row>
static void encode_fp8(int64_t n, const void* z, uint8_t* codes, uint8_t* scales) {
  constexpr int32_t held = largest_bits(kDtypeOf<T>);
  for (int64_t b = 0; b < n; b += kBlock) {
    const int64_t count = n - b < kBlock ? n - b : kBlock;
    const Row* from = static_cast<const Row*>(z) + b;
    Row filled[kBlock];
    if (count < kBlock) {
      for (int i = 0; i < kBlock; ++i) filled[i] = i < count ? from[i] : Row{};
      from = filled;
    }
    Vec<float> x[kBlock / kLanes];
    Bits32 largest = {}, infinite[kBlock / kLanes];
    for_block([&](int p, int i) {
      x[p] = load<Row, float>(from + i);
      const Bits32 all = x[p].bits(), magnitude = all & 0x7fffffff;
      infinite[p] = magnitude >= 0x7f800000;
      const Bits32 finite = (magnitude > held ? Bits32{} + held : magnitude) & ~infinite[p];
      x[p] = Vec<float>::of(finite | (all & ~0x7fffffff));
      largest = finite > largest ? finite : largest;
    });
    int32_t most = 0;
    for (int i = 0; i < kLanes; ++i) most = largest[i] > most ? largest[i] : most;
    const int32_t scale = scale_of(most);
    scales[b / kBlock] = static_cast<uint8_t>(scale);
    const Vec<float> factor(float_of((254 - scale) << 23));
    uint8_t whole[kBlock], *to = count < kBlock ? whole : codes + b;
    for_block([&](int p, int i) { store_bytes(infinite[p] ? Bits32{} + 0x7f : to_e4m3(x[p] * factor), to + i); });
    for (int64_t i = 0; i < count && to == whole; ++i) codes[b + i] = whole[i];
  }
}

// Numbers of T, to rows of them or of float.
template <class T, class Row>
static void decode_fp8(int64_t n, const uint8_t* codes, const uint8_t* scales, void* z) {
  for (int64_t b = 0; b < n; b += kBlock) {
    const int64_t count = n - b < kBlock ? n - b : kBlock;
    const uint8_t* from = codes + b;
    Row *to = static_cast<Row*>(z) + b, whole[kBlock];
    uint8_t filled[kBlock] = {};
    if (count < kBlock) {
      for (int64_t i = 0; i < count; ++i) filled[i] = from[i];
      from = filled;
      to = whole;
    }
    const Vec<float> factor(float_of(scales[b / kBlock] << 23));
    for_block([&](int, int i) { store<Row, float>(rounded<T>(from_e4m3(load_bytes(from + i)) * factor), to + i); });
    for (int64_t i = 0; i < count && to == whole; ++i) static_cast<Row*>(z)[b + i] = whole[i];
  }
}

}  // namespace fastbp::cpu::FASTBP_CAPABILITY
