// What the compressed save policies keep, as far as the kernels of the CPU and of CUDA share it: fastbp/compression.py.
#pragma once

#include "dtype.h"
#include "primitives.h"

namespace fastbp {

constexpr int kBlock = 32;  // numbers that share a scale
// The lengths of rows of bits and of scales.
HD int64_t bits_size(int64_t n) { return (n + 1) / 2; }
HD int64_t scales_size(int64_t n) { return (n + kBlock - 1) / kBlock; }

// Mantissa bits of float that a dtype lacks.
constexpr int spare_bits(Dtype dtype) { return dtype == Dtype::bfloat16 ? 16 : dtype == Dtype::float16 ? 13 : 0; }

// The bits of the largest number that e4m3 and a scale give back in a dtype, as a float: 1.875 · 2¹⁵, or 1.875 · 2¹²⁷.
constexpr int32_t largest_bits(Dtype dtype) { return dtype == Dtype::float16 ? 0x47700000 : 0x7f700000; }

// The scale of a block, by the bits of its largest number without the sign: 448 = 1.75 · 2⁸ is the largest of e4m3.
HD int32_t scale_of(int32_t largest) {
  const int32_t scale = (largest >> 23) - 8 + ((largest & 0x7fffff) > 0x600000);
  return scale < 1 ? 1 : scale;
}

// The least y that is read back: a fraction of a unit above the minimum.
constexpr double floor_of(double lowest, Dtype dtype, bool in_bits) {
  double unit = 1.0 / (1 << 24);  // of numbers from 1/2 to 1 in float
  for (double size = -lowest; size < 0.5; size *= 2) unit /= 2;
  return lowest + (in_bits ? 1.0 / 80 : 1.0 / 5) * unit * (1 << spare_bits(dtype));
}

}  // namespace fastbp
