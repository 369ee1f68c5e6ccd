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

// dz = dz(dh, r), r the kept z or (from_output) y, with h = f(z) again where it is wanted, and the sums of dz's
// columns. All m × n; dh of any strides, the kept matrix's rows `stride` numbers apart, dz and h contiguous. dz may be
// dh or r.
struct ChainRule {
  const void *dh, *kept;
  void *dz, *h;  // h may be null, and so may
  void* sums;    // strips × n, float, of float64 double
  int64_t m, n, dh_stride, dh_column_stride, stride;
  bool from_output;
  Strips strips;
};
void launch(const Activation& activation, const ChainRule& rule, cudaStream_t stream);

// The same through a gated layer: dg = dh · u · f'(g), du = dh · f(g), h = f(g) · u. Any of dgate, dup, h and the sums
// may be null, and `up` where neither dgate nor h is wanted. dgate may be gate, dup may be dh or up.
struct GatedChainRule {
  const void *dh, *gate, *up;
  void *dgate, *dup, *h, *gate_sums, *up_sums;
  int64_t m, n, dh_stride, dh_column_stride, stride;
  Strips strips;
};
void launch(const Activation& activation, const GatedChainRule& rule, cudaStream_t stream);

// The second stage of a bias gradient: out (n,) of the dtype = Σ sums (strips × n), always in the same order.
void launch_column_sum(Dtype dtype, const void* sums, void* out, int64_t strips, int64_t n, cudaStream_t stream);

}  // namespace fastbp::cuda
