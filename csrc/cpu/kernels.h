// What a capability offers: the loops over numbers, chosen once when the library is loaded. Nothing here depends on an
// instruction set; products.cpp, elementwise.cpp and compressed.cpp are compiled once for each and fill the table.
#pragma once

#include <stdint.h>

#include "../dtype.h"

// Best first. setup.py has the compiler's flags for each.
#if defined(__x86_64__)
#define FASTBP_FOR_EACH_CAPABILITY(F) F(avx512_bf16) F(avx512) F(avx2) F(generic)
#else
#define FASTBP_FOR_EACH_CAPABILITY(F) F(generic)
#endif

namespace fastbp::cpu {

struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

// C (rows × columns) = A B, plus C where it accumulates, plus a bias for each column. A product of pairs goes to
// `words` instead, as bfloat16, where there are any.
template <class S>
struct Product {
  int64_t rows, columns, depth;
  const S* a;
  int64_t a_stride;   // between the rows of A; or where A lies by columns, between the steps of the reduction
  bool a_by_columns;  // the rows of a tile side by side, and the tiles `a_tile` apart
  int64_t a_tile;
  const S* b;
  int64_t b_stride, b_tile;  // between the steps of the reduction; between tiles of columns
  S* c;
  int64_t c_stride;
  const S* bias;
  bool accumulate;
  uint16_t* words = nullptr;
  int64_t words_stride = 0;
};

// Rows of n numbers of one dtype; the activations in the order of activations.h.
struct Elementwise {
  using Value = void (*)(int64_t n, const void* z, void* y, const double* params);
  using Grad = void (*)(int64_t n, const void* dy, const void* z_or_y, void* dz, const double* params);
  // f(g) · u; and dg = dh · u · f'(g), du = dh · f(g), of which either may be null.
  using GatedValue = void (*)(int64_t n, const void* g, const void* u, void* y, const double* params);
  using GatedGrad = void (*)(int64_t n, const void* dh, const void* g, const void* u, void* dg, void* du,
                             const double* params);
  // Value and Grad, and GatedValue and GatedGrad, in one pass over what they have in common; dz may lie over dy.
  using ValueAndGrad = void (*)(int64_t n, const void* dy, const void* z, void* y, void* dz, const double* params);
  using GatedValueAndGrad = void (*)(int64_t n, const void* dh, const void* g, const void* u, void* h, void* dg,
                                     void* du, const double* params);
  Value value[kMostActivations];
  ValueAndGrad value_and_grad[kMostActivations];
  GatedValueAndGrad gated_value_and_grad[kMostActivations];
  Grad grad[kMostActivations], grad_from_output[kMostActivations];  // null where y does not give the slope
  GatedValue gated_value[kMostActivations];
  GatedGrad gated_grad[kMostActivations];
  // sums += the sum of rows that are `stride` numbers apart.
  void (*add_rows)(int64_t rows, int64_t n, const void* numbers, int64_t stride, double* sums);
};

// Rows of n numbers under a compressed policy.
struct Compressed {
  // y = f(z) and its bits, or where there are none the side of the minimum in y's lowest bit; and dz from that. Null
  // for activations that it does not serve.
  using Value = void (*)(int64_t n, const void* z, void* y, uint8_t* bits);
  using Grad = void (*)(int64_t n, const void* dy, const void* y, const uint8_t* bits, void* dz);
  Value value[kMostActivations];
  Grad grad[kMostActivations];
  // z in fp8 and back, from the beginning of a block of numbers that share a scale.
  void (*encode)(int64_t n, const void* z, uint8_t* codes, uint8_t* scales);
  void (*decode)(int64_t n, const uint8_t* codes, const uint8_t* scales, void* z);
};

template <class S>
struct Kernels {
  int tile_rows, tile_columns;
  void (*multiply)(const Product<S>&);
  // The same where A and B hold two bfloat16 in the place of a float, two steps of the reduction; null where the CPU
  // does not multiply those. And two rows of bfloat16 as one of such pairs.
  void (*multiply_pairs)(const Product<S>&);
  void (*pair_rows)(int64_t n, const uint16_t* even, const uint16_t* odd_or_null, S* pairs);
  // B (depth × columns) into tiles of columns, the last one filled up with zeros.
  void (*pack[kDtypes])(int64_t depth, int64_t columns, const void* b, int64_t depth_stride, int64_t column_stride,
                        S* to);
  // A matrix of rows `stride` numbers apart, and vectors: y = M x; sum += Mᵀ d; M = d xᵀ, contiguous.
  void (*dots[kDtypes])(int64_t rows, int64_t n, const void* matrix, int64_t stride, const S* x, S* y);
  void (*add_scaled[kDtypes])(int64_t rows, int64_t n, const S* d, const void* matrix, int64_t stride, S* sum);
  void (*outer[kDtypes])(int64_t rows, int64_t n, const S* d, const S* x, void* matrix);
  void (*read)(Dtype, int64_t n, const void* from, int64_t stride, S* to);
  void (*write)(Dtype, int64_t n, const S* from, void* to);
  Elementwise of[kDtypes];                     // those that are computed in S
  Compressed compressed[kDtypes];              // rows of a dtype
  Compressed rounded[kDtypes];                 // rows of S whose numbers a dtype has
  void (*add)(int64_t n, const S* a, S* sum);  // sum += a
};

template <class S>
constexpr Dtype kDtypeOf = sizeof(S) == 8 ? Dtype::float64 : Dtype::float32;
template <>
inline constexpr Dtype kDtypeOf<BFloat16> = Dtype::bfloat16;
template <>
inline constexpr Dtype kDtypeOf<Half> = Dtype::float16;

struct Capability {
  const char* name;
  bool bf16;  // whether the CPU multiplies bfloat16 itself, which the library GEMM then uses
  bool amx;   // and in tiles, which the library GEMM uses too and our own products do not
  Kernels<float> in_float;
  Kernels<double> in_double;
};

// The best that this CPU has, or what FASTBP_CPU_CAPABILITY names; found once.
const Capability& capability();

template <class S>
const Kernels<S>& kernels();
template <>
inline const Kernels<float>& kernels<float>() {
  return capability().in_float;
}
template <>
inline const Kernels<double>& kernels<double>() {
  return capability().in_double;
}

}  // namespace fastbp::cpu
