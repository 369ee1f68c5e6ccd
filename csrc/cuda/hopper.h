// Products on Hopper's tensor cores with the elementwise work in the epilogue, for bfloat16 and float16.
#pragma once

#include "elementwise.h"

namespace fastbp::cuda {

// A matrix of rows `stride` numbers apart; rows begin at 16 bytes, columns are adjacent.
struct Operand {
  const void* data;
  int64_t rows, columns, stride;
};

// Out (m × n) from A (m × k) and B. All results are contiguous with n a multiple of 8.
//   forward        z = x Wᵀ + b (W n × k), y = f(z);                     z may be null, and so may the bias
//   gated_forward  g = x Wgᵀ + bg, u = x Wuᵀ + bu, y = f(g) · u;         g and u may be null, and so may a bias
//   dgrad          dh = d W (W k × n), dz = dz(dh, r), h = f(z)          r what was kept; h and the sums may be null
//   gated_dgrad    dh = d W, dg = dh · u · f'(g), du = dh · f(g), h = f(g) · u
// dz may be r, dg may be g, du may be u. What a policy keeps comes and goes as in CompressedValue: codes take the place
// of z, g and u, and bits or scales lie beside.
struct Product {
  enum Kind : int { forward, gated_forward, dgrad, gated_dgrad };
  Kind kind;
  Operand a, b, b2;
  int64_t m, n, k;
  const void *bias, *bias2;  // forward
  const void *gate, *up;     // dgrad: what was kept
  void *first, *second;      // z or g, u; dz or dg, du
  void* y;                   // y, or h
  Keeps keeps;
  const void *gate_beside, *up_beside;  // dgrad
  void *first_beside, *second_beside;   // forward
  // Sums of the columns of what is written to first and second: one row for each 128 rows of the result.
  float *sums, *sums2;
  void* bias_gradient;  // dgrad by cuBLASLt, which adds the columns up itself; may be null
};
constexpr int kTileRows = 128;

// Why a device or these operands are not served, or null.
const char* product_refusal(const Product& product, Dtype dtype, int capability);

// Blocks are launched in clusters of two; `processors` is how many multiprocessors there are.
void launch_product(const Activation& activation, const Product& product, int processors, cudaStream_t stream);

}  // namespace fastbp::cuda
