// Sixteen bytes of numbers, how they come and go, and the activations on them: what the elementwise kernels and the
// epilogues of the products share. All of it runs on the host too, where the tests read it.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <bit>
#include <type_traits>

#include "../activations.h"
#include "../dtype.h"
#include "approximate.h"

namespace fastbp::cuda {

// What a dtype is in memory, and what it is computed in.
template <Dtype>
struct Numbers;
template <>
struct Numbers<Dtype::float64> {
  using Memory = double;
  using Compute = double;
  using Sum = double;
};
template <>
struct Numbers<Dtype::float32> {
  using Memory = float;
  using Compute = float;
  using Sum = float;
};
template <>
struct Numbers<Dtype::bfloat16> {
  using Memory = __nv_bfloat16;
  using Compute = Approximate;
  using Sum = float;
};
template <>
struct Numbers<Dtype::float16> {
  using Memory = __half;
  using Compute = Approximate;
  using Sum = float;
};

template <Dtype D>
using Memory = typename Numbers<D>::Memory;
template <Dtype D>
using Compute = typename Numbers<D>::Compute;
template <Dtype D>
using Sum = typename Numbers<D>::Sum;

HD double wide(double x) { return x; }
HD float wide(float x) { return x; }
HD Approximate wide(__nv_bfloat16 x) { return Approximate(__bfloat162float(x)); }
HD Approximate wide(__half x) { return Approximate(__half2float(x)); }

HD double plain(double x) { return x; }
HD float plain(float x) { return x; }
HD float plain(Approximate x) { return x.v; }

// To the nearest, ties to even, and what is too large to inf, as PyTorch rounds.
template <Dtype D>
HD Memory<D> rounded(Compute<D> x) {
  if constexpr (D == Dtype::bfloat16) {
    return __float2bfloat16_rn(x.v);
  } else if constexpr (D == Dtype::float16) {
    return __float2half_rn(x.v);
  } else {
    return x;
  }
}

template <Dtype D>
struct alignas(16) Pack {
  static constexpr int size = 16 / sizeof(Memory<D>);
  Memory<D> at[size];
};

#ifdef __CUDACC__
// One access to memory at 16 bytes. (The compiler makes four stores of what was computed four bytes at a time, unless
// it is told by name to make one.)
template <Dtype D>
__device__ inline Pack<D> load_pack(const void* from) {
  return std::bit_cast<Pack<D>>(*static_cast<const uint4*>(from));
}

template <Dtype D>
__device__ inline void store_pack(void* to, const Pack<D>& pack) {
  __stwb(static_cast<uint4*>(to), std::bit_cast<uint4>(pack));
}
#endif

// A pack in the compute type. (The compiler makes one conversion of two neighbours where the GPU has it.)
template <Dtype D>
struct Wide {
  static constexpr int size = Pack<D>::size;
  Compute<D> at[size];

  Wide() = default;
  HD explicit Wide(const Pack<D>& pack) {
#pragma unroll
    for (int i = 0; i < size; ++i) at[i] = wide(pack.at[i]);
  }
  HD Pack<D> rounded() const {
    Pack<D> pack;
#pragma unroll
    for (int i = 0; i < size; ++i) pack.at[i] = cuda::rounded<D>(at[i]);
    return pack;
  }
};

// An activation with its parameters in the compute type.
template <class A, class C>
struct Bound {
  C p0, p1;

  HD Bound(double first, double second) : p0(static_cast<C>(first)), p1(static_cast<C>(second)) {}

  HD C value(C z) const {
    if constexpr (A::num_params == 2) return A::value(z, p0, p1);
    if constexpr (A::num_params == 1) return A::value(z, p0);
    if constexpr (A::num_params == 0) return A::value(z);
  }
  HD C grad(C dy, C z) const {
    if constexpr (A::num_params == 2) return A::grad(dy, z, p0, p1);
    if constexpr (A::num_params == 1) return A::grad(dy, z, p0);
    if constexpr (A::num_params == 0) return A::grad(dy, z);
  }
  HD C grad_from_output(C dy, C y) const {
    if constexpr (A::num_params == 2) return A::grad_from_output(dy, y, p0, p1);
    if constexpr (A::num_params == 1) return A::grad_from_output(dy, y, p0);
    if constexpr (A::num_params == 0) return A::grad_from_output(dy, y);
  }
};

// y = f(z), of a whole pack.
template <class A, Dtype D>
HD Pack<D> value(const Bound<A, Compute<D>>& activation, const Pack<D>& z) {
  Wide<D> y(z);
#pragma unroll
  for (int i = 0; i < y.size; ++i) y.at[i] = activation.value(y.at[i]);
  return y.rounded();
}

// y = f(g) · u.
template <class A, Dtype D>
HD Pack<D> gated_value(const Bound<A, Compute<D>>& activation, const Pack<D>& gate, const Pack<D>& up) {
  Wide<D> y(gate);
  const Wide<D> u(up);
#pragma unroll
  for (int i = 0; i < y.size; ++i) y.at[i] = activation.value(y.at[i]) * u.at[i];
  return y.rounded();
}

// dz from dy and what was kept, z or (FROM_OUTPUT) y; what it is before it is rounded goes onto the sums.
template <bool FROM_OUTPUT, class A, Dtype D>
HD Pack<D> grad(const Bound<A, Compute<D>>& activation, const Pack<D>& dy, const Pack<D>& kept, Sum<D>* sums) {
  Wide<D> d(dy);
  const Wide<D> r(kept);
#pragma unroll
  for (int i = 0; i < d.size; ++i) {
    if constexpr (FROM_OUTPUT) {
      d.at[i] = activation.grad_from_output(d.at[i], r.at[i]);
    } else {
      d.at[i] = activation.grad(d.at[i], r.at[i]);
    }
    sums[i] += plain(d.at[i]);
  }
  return d.rounded();
}

template <Dtype D>
struct GatedGrad {
  Pack<D> gate, up;
};

// dg = dh · u · f'(g), du = dh · f(g). The product dh · u is rounded as eager PyTorch rounds it: then what overflows
// there overflows here.
template <class A, Dtype D>
HD GatedGrad<D> gated_grad(const Bound<A, Compute<D>>& activation, const Pack<D>& dh, const Pack<D>& gate,
                           const Pack<D>& up, Sum<D>* gate_sums, Sum<D>* up_sums) {
  const Wide<D> d(dh), g(gate), u(up);
  Wide<D> dg, du;
#pragma unroll
  for (int i = 0; i < d.size; ++i) {
    dg.at[i] = activation.grad(wide(rounded<D>(d.at[i] * u.at[i])), g.at[i]);
    du.at[i] = d.at[i] * activation.value(g.at[i]);
    gate_sums[i] += plain(dg.at[i]);
    up_sums[i] += plain(du.at[i]);
  }
  return {dg.rounded(), du.rounded()};
}

}  // namespace fastbp::cuda
