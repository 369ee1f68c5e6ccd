// The elementwise kernels around products of PyTorch's own: one pass each way, for every dtype. Launches go to the
// stream that is named, on the current device; nothing waits.
#pragma once

#include <cuda_runtime_api.h>

#include "../dtype.h"

namespace fastbp::cuda {

// cudaSuccess, or why no kernel here can run on the current device. Launches nothing.
cudaError_t find_kernels();

struct Activation {
  Dtype dtype;
  int number;  // in activations.h
  double params[2];
};

// What is kept of a hidden layer (fastbp/saving.py): z; y; y and four bits a number beside it; y with a bit of z in the
// lowest of its own; z in e4m3 and scales beside it, a byte each.
enum class Keeps : int { z, y, bits, lowest_bit, fp8 };

// y = f(z), z in `gate`; or with `up` y = f(g) · u. All of `size` adjacent numbers; y may be one of the others.
struct Value {
  const void *gate, *up;
  void* y;
  int64_t size;
};
void launch(const Activation& activation, const Value& value, cudaStream_t stream);

// How the rows of an m × n matrix are dealt out: a block takes `rows` rows of 32 lanes' columns, and writes their sums
// into its row of `strips`.
struct Strips {
  int64_t rows, strips;
};
Strips strips_of(int64_t m, int64_t n, Dtype dtype, int processors);

// The same with what a compressed policy keeps. All m × n and contiguous; y may be z.
//   bits        the bits into `beside`
//   lowest_bit  y is changed
//   fp8         the codes of g and u into `kept`, their scales into `beside`
// Or with `scales` g and u are such codes themselves, and there is y alone to write.
struct CompressedValue {
  const void *gate, *up, *scales[2];
  void *y, *kept[2], *beside[2];
  int64_t m, n;
  Keeps keeps;
  Strips strips;
};
void launch(const Activation& activation, const CompressedValue& value, cudaStream_t stream);

// dz = dz(dh, r), r what was kept, with h = f(z) again where it is wanted, and the sums of dz's columns. All m × n; dh
// of any strides, rows of a kept z or y `stride` numbers apart, all else contiguous. dz may be dh or r.
struct ChainRule {
  const void *dh, *kept, *beside;  // bits or scales
  void *dz, *h;                    // h may be null, and so may
  void* sums;                      // strips × n, float, of float64 double
  int64_t m, n, dh_stride, dh_column_stride, stride;
  Keeps keeps;
  Strips strips;
};
void launch(const Activation& activation, const ChainRule& rule, cudaStream_t stream);

// The same through a gated layer: dg = dh · u · f'(g), du = dh · f(g), h = f(g) · u. Any of dgate, dup, h and the sums
// may be null, and `up` where neither dgate nor h is wanted. dgate may be gate, dup may be dh or up.
struct GatedChainRule {
  const void *dh, *gate, *up, *gate_scales, *up_scales;
  void *dgate, *dup, *h, *gate_sums, *up_sums;
  int64_t m, n, dh_stride, dh_column_stride, stride;
  Keeps keeps;  // z or fp8
  Strips strips;
};
void launch(const Activation& activation, const GatedChainRule& rule, cudaStream_t stream);

// The second stage of a bias gradient: out (n,) of the dtype = Σ sums (strips × n), always in the same order.
void launch_column_sum(Dtype dtype, const void* sums, void* out, int64_t strips, int64_t n, cudaStream_t stream);

}  // namespace fastbp::cuda
