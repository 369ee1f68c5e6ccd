// What the compressed save policies keep, a pack at a time, bit for bit as fastbp/compression.py has it. All of it but
// the exchange between lanes runs on the host too, where the tests read it.
#pragma once

#include "../compression.h"
#include "elementwise.h"
#include "pack.h"

namespace fastbp::cuda {

// Lanes that share a scale, each with a pack.
template <Dtype D>
constexpr int kSharers = kBlock / Pack<D>::size;

// Mantissa bits of float that a dtype lacks.
template <Dtype D>
constexpr int kSpare = spare_bits(D);

template <Dtype D>
using Whole = std::conditional_t<sizeof(Memory<D>) == 2, uint16_t, uint32_t>;

// A number from the left of the minimum and one from its right may share y. Four bits beside y tell them apart: 8 on
// the right, and the bits that come next in y. `wide_y` is what was rounded to y.
template <Dtype D>
HD uint32_t code_of(bool right, float wide_y, Memory<D> y) {
  uint32_t code = right ? 8 : 0;
  if constexpr (kSpare<D> > 0) {
    // Numbers of one sign, or y is 0: as whole numbers they differ by what was rounded. NaN is NaN whatever comes next.
    const int beyond = static_cast<int>(std::bit_cast<uint32_t>(wide_y) - std::bit_cast<uint32_t>(plain(wide(y))) +
                                        (1u << (kSpare<D> - 1))) >>
                       (kSpare<D> - 3);
    code += beyond < 0 ? 0 : beyond > 7 ? 7 : beyond;
  }
  return code;
}

// y with the side in the lowest bit where it is negative, and else in the sign.
template <Dtype D>
HD Memory<D> marked(bool right, Memory<D> y) {
  constexpr auto minus_zero = static_cast<Whole<D>>(Whole<D>{1} << (8 * sizeof(Whole<D>) - 1));
  const float number = plain(wide(y));
  auto whole = std::bit_cast<Whole<D>>(y);
  if (number < 0) {
    whole = static_cast<Whole<D>>((whole & ~1u) | right);
  } else if (right) {
    if (number == 0) whole = 0;
  } else if (number >= 0) {
    whole = minus_zero;
  }
  return std::bit_cast<Memory<D>>(whole);
}

// y = f(z), or f(z) · up of a gated layer, as a policy has it; and with Keeps::bits the codes of the pack, the first
// in the lowest bits.
template <class A, Dtype D>
HD Pack<D> value(const Bound<A, Compute<D>>& activation, const Pack<D>& z, bool gated, const Pack<D>& up, Keeps keeps,
                 uint32_t& codes) {
  Wide<D> y(z);
#pragma unroll
  for (int i = 0; i < y.size; ++i) y.at[i] = activation.value(y.at[i]);
  if (gated) {
#pragma unroll
    for (int i = 0; i < y.size; ++i) y.at[i] = y.at[i] * wide(up.at[i]);
  }
  Pack<D> out = y.rounded();
  if constexpr (A::has_grad_from_side && D != Dtype::float64) {
    constexpr auto minimum_at = static_cast<float>(A::minimum_at);
    if (keeps == Keeps::bits) {
      codes = 0;
#pragma unroll
      for (int i = 0; i < y.size; ++i) {
        codes |= code_of<D>(plain(wide(z.at[i])) >= minimum_at, plain(y.at[i]), out.at[i]) << (4 * i);
      }
    } else if (keeps == Keeps::lowest_bit) {
#pragma unroll
      for (int i = 0; i < y.size; ++i) out.at[i] = marked<D>(plain(wide(z.at[i])) >= minimum_at, out.at[i]);
    }
  }
  return out;
}

// The least y that is read back.
template <class A, Dtype D, bool IN_BITS>
constexpr float kFloor = static_cast<float>(floor_of(A::lowest, D, IN_BITS));

// dz from dy, and from y and its side; what it is before it is rounded goes onto the sums.
template <class A, Dtype D>
HD Pack<D> grad_from_side(const Bound<A, Compute<D>>&, const Pack<D>& dy, const Pack<D>& y, bool in_codes,
                          uint32_t codes, Sum<D>* sums) {
  static_assert(A::has_grad_from_side && D != Dtype::float64);
  Wide<D> d(dy);
  const float floor = in_codes ? kFloor<A, D, true> : kFloor<A, D, false>;
#pragma unroll
  for (int i = 0; i < d.size; ++i) {
    const auto whole = static_cast<uint32_t>(std::bit_cast<Whole<D>>(y.at[i]));
    const bool negative = whole >> (8 * sizeof(Memory<D>) - 1);
    float from = plain(wide(y.at[i]));
    bool right = !negative || (whole & 1);
    if (in_codes) {
      const uint32_t code = codes >> (4 * i) & 15;
      right = code >> 3;
      if constexpr (kSpare<D> > 0) {
        constexpr uint32_t middle = (1u << (kSpare<D> - 4)) - (1u << (kSpare<D> - 1));
        from = std::bit_cast<float>(std::bit_cast<uint32_t>(from) + ((code & 7) << (kSpare<D> - 3)) + middle);
      }
    }
    const Compute<D> wide_y(from < floor ? floor : from), side(right ? 1.0f : 0.0f);
    if constexpr (kSpare<D> > 0) {
      d.at[i] = A::grad_from_side_16(d.at[i], wide_y, side);
    } else {
      d.at[i] = A::grad_from_side(d.at[i], wide_y, side);
    }
    sums[i] += plain(d.at[i]);
  }
  return d.rounded();
}

// What a chain rule is compiled for: it takes the slope from z (as it is or in e4m3), from y, or from y and its side.
enum class Reads : int { z, y, side };
template <class A, Dtype D>
constexpr bool reads(Reads what) {
  return what == Reads::z ||
         (what == Reads::y ? A::has_grad_from_output : A::has_grad_from_side && D != Dtype::float64);
}

// dz from dy and what was kept, numbers as they are and codes beside them.
template <Reads READS, class A, Dtype D>
HD Pack<D> grad(const Bound<A, Compute<D>>& activation, const Pack<D>& dy, const Pack<D>& kept, Keeps keeps,
                uint32_t codes, Sum<D>* sums) {
  if constexpr (READS == Reads::side) {
    return grad_from_side(activation, dy, kept, keeps == Keeps::bits, codes, sums);
  } else {
    return grad<READS == Reads::y>(activation, dy, kept, sums);
  }
}

// A pack's numbers in e4m3, a byte each, the first in the lowest; and the codes of a pack with Keeps::bits.
template <Dtype D>
using E4m3 = std::conditional_t<Pack<D>::size == 8, uint64_t, uint32_t>;
template <Dtype D>
using Bits = std::conditional_t<Pack<D>::size == 8, uint32_t, uint16_t>;

constexpr uint32_t kInfinity = 0x7f800000;

// The bits of |x|, at most those of the largest number that e4m3 and a scale give back in the dtype. Infinity and NaN
// stay what they are.
template <Dtype D>
HD uint32_t size_of(float x) {
  constexpr auto most = static_cast<uint32_t>(largest_bits(D));
  const uint32_t size = std::bit_cast<uint32_t>(x) & 0x7fffffff;
  return size < kInfinity && size > most ? most : size;
}

// The largest of a pack's finite numbers, as the bits of a float without its sign.
template <Dtype D>
HD uint32_t largest_of(const Pack<D>& z) {
  uint32_t largest = 0;
#pragma unroll
  for (int i = 0; i < z.size; ++i) {
    const uint32_t bits = size_of<D>(plain(wide(z.at[i])));
    largest = bits < kInfinity && bits > largest ? bits : largest;
  }
  return largest;
}

// To the nearest number of e4m3, ties to even, of one that is at most 448 or NaN. Below 2⁻⁶ numbers are 2⁻⁹ apart,
// which is the unit of floats from 2¹⁴ on.
HD uint32_t e4m3_of(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x), size = bits & 0x7fffffff;
  const uint32_t small = std::bit_cast<uint32_t>(std::bit_cast<float>(size) + 16384.0f) - 0x46800000;
  const uint32_t normal = ((size + 0x7ffff + (size >> 20 & 1)) >> 20) - (120 << 3);
  const uint32_t code = size > kInfinity ? 0x7f : size < 0x3c800000 ? small : normal;
  return code | (bits >> 24 & 0x80);
}

// Two numbers, the first in the lower byte.
HD uint32_t two_e4m3_of(float first, float second) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890
  uint16_t codes;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(codes) : "f"(second), "f"(first));
  return codes;
#else
  return e4m3_of(first) | e4m3_of(second) << 8;
#endif
}

// What is not finite becomes NaN.
template <Dtype D>
HD E4m3<D> encoded(const Pack<D>& z, uint32_t scale) {
  const float factor = std::bit_cast<float>((254 - scale) << 23);
  float scaled[z.size];
#pragma unroll
  for (int i = 0; i < z.size; ++i) {
    const float number = plain(wide(z.at[i]));
    const uint32_t size = size_of<D>(number), sign = std::bit_cast<uint32_t>(number) & 0x80000000;
    scaled[i] = std::bit_cast<float>(size < kInfinity ? size | sign : 0x7fffffffu) * factor;
  }
  E4m3<D> codes = 0;
#pragma unroll
  for (int i = 0; i < z.size; i += 2) {
    codes |= static_cast<E4m3<D>>(two_e4m3_of(scaled[i], scaled[i + 1])) << (8 * i);
  }
  return codes;
}

// Two codes, the first in the lower byte, as two halves, which have all numbers of e4m3.
HD uint32_t two_halves_of(uint16_t codes) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890
  uint32_t halves;
  asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(halves) : "h"(codes));
  return halves;
#else
  // As the bits of a half a code is 2⁸ times too small, and exactly that.
  const auto half_of = [](uint32_t code) -> uint32_t {
    const uint32_t size = (code & 0x7f) == 0x7f ? 0x7fff : (code & 0x7f) << 7;
    const float small = __half2float(std::bit_cast<__half>(static_cast<uint16_t>(size | (code & 0x80) << 8)));
    return std::bit_cast<uint16_t>(__float2half_rn(small * 256.0f));
  };
  return half_of(codes) | half_of(codes >> 8) << 16;
#endif
}

template <Dtype D>
HD Pack<D> decoded(E4m3<D> codes, uint32_t scale) {
  const float factor = std::bit_cast<float>(scale << 23);
  Wide<D> z;
#pragma unroll
  for (int i = 0; i < z.size; i += 2) {
    const uint32_t halves = two_halves_of(static_cast<uint16_t>(codes >> (8 * i)));
    z.at[i] = Compute<D>(__half2float(std::bit_cast<__half>(static_cast<uint16_t>(halves))) * factor);
    z.at[i + 1] = Compute<D>(__half2float(std::bit_cast<__half>(static_cast<uint16_t>(halves >> 16))) * factor);
  }
  return z.rounded();
}

// What was kept of a pack, as it lies in memory: numbers, or codes in their place; and bits or a scale.
template <Dtype D>
struct Raw {
  Pack<D> numbers;
  uint32_t beside;
};

template <Dtype D>
struct InPlace {
  E4m3<D> codes, rest[sizeof(Pack<D>) / sizeof(E4m3<D>) - 1];
};
template <Dtype D>
HD Pack<D> in_place(E4m3<D> codes) {
  return std::bit_cast<Pack<D>>(InPlace<D>{codes, {}});
}

// z or y of it.
template <Dtype D, Reads READS>
HD Pack<D> numbers_of(const Raw<D>& raw, Keeps keeps) {
  if constexpr (D != Dtype::float64 && READS == Reads::z) {
    if (keeps == Keeps::fp8) return decoded<D>(std::bit_cast<InPlace<D>>(raw.numbers).codes, raw.beside);
  }
  return raw.numbers;
}

#ifdef __CUDACC__
// The scale of a block, of which each lane has a pack. All lanes of the warp must come here.
template <Dtype D>
__device__ inline uint32_t scale_of_block(const Pack<D>& z) {
  uint32_t largest = largest_of(z);
#pragma unroll
  for (int lanes = 1; lanes < kSharers<D>; lanes *= 2) {
    largest = max(largest, __shfl_xor_sync(0xffffffff, largest, lanes));
  }
  return static_cast<uint32_t>(scale_of(static_cast<int32_t>(largest)));
}
#endif

}  // namespace fastbp::cuda
