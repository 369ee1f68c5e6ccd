// The elementwise kernel of a forward that keeps less than z (compressed.h).
#pragma once

#include "launch.cuh"
#include "memory.cuh"

namespace fastbp::cuda {

// A warp takes pieces of rows, as in the chain rule: a row of bits begins with a byte, and one of scales with a block.
template <class A, Dtype D, bool ALIGNED>
__global__ void __launch_bounds__(kThreads, kBlocks<D>)
    compressed_value_kernel(CompressedValue v, double p0, double p1) {
  constexpr int width = Pack<D>::size, rows = ALIGNED ? kGatedAtOnce : 1;
  const Bound<A, Compute<D>> activation(p0, p1);
  const int lane = threadIdx.x % kLanes, warp = threadIdx.x / kLanes;
  const int64_t n = v.n, column = (static_cast<int64_t>(blockIdx.x) * kLanes + lane) * width;
  const int64_t begin = blockIdx.y * v.strips.rows, end = min(begin + v.strips.rows, v.m);
  const bool inside = column < n, whole = ALIGNED && inside;
  const Keeps given = v.scales[0] ? Keeps::fp8 : Keeps::z;
  for (int64_t row = begin + warp; row < end; row += rows * kWarps) {
    Pack<D> part[2][rows];
#pragma unroll
    for (int i = 0; i < rows; ++i) {
      const int64_t at = row + i * kWarps;
      if (at >= end) break;
      const auto load_part = [&](const void* kept, const void* scales) {
        if (!inside) return Pack<D>{};  // its lane is wanted all the same, for the scales of its neighbours
        return numbers_of<D, Reads::z>(load_kept<D, Reads::z>(kept, scales, given, at, n, column, n, whole), given);
      };
      part[0][i] = load_part(v.gate, v.scales[0]);
      if (v.up) part[1][i] = load_part(v.up, v.scales[1]);
    }
#pragma unroll
    for (int i = 0; i < rows; ++i) {
      const int64_t at = row + i * kWarps;
      if (at >= end) break;
      uint32_t bits = 0;
      const Pack<D> y = value(activation, part[0][i], v.up != nullptr, part[1][i], v.keeps, bits);
      if (inside) store<D>(static_cast<Memory<D>*>(v.y) + at * n, column, n, y, whole);
      if (inside && v.keeps == Keeps::bits) {
        const int64_t bytes = bits_size(n);
        if (column + width > n) bits &= (1u << (4 * (n - column))) - 1;
        store_bytes(static_cast<uint8_t*>(v.beside[0]) + at * bytes, column / 2, bytes, static_cast<Bits<D>>(bits),
                    whole);
      }
#pragma unroll
      for (int which = 0; which < 2; ++which) {
        if (!v.kept[which]) continue;
        const uint32_t scale = scale_of_block(part[which][i]);
        auto *codes = static_cast<uint8_t*>(v.kept[which]) + at * n, *scales = static_cast<uint8_t*>(v.beside[which]);
        if (!inside) continue;
        store_bytes(codes, column, n, encoded(part[which][i], scale), whole);
        if (column % kBlock == 0) scales[at * scales_size(n) + column / kBlock] = static_cast<uint8_t>(scale);
      }
    }
  }
}

template <Dtype D, class Rule>
dim3 grid_of(const Rule& rule) {
  constexpr int64_t columns = kLanes * Pack<D>::size;
  return dim3(static_cast<unsigned>((rule.n + columns - 1) / columns), static_cast<unsigned>(rule.strips.strips));
}

template <class A, Dtype D>
void launch_as(const Activation& activation, const CompressedValue& v, cudaStream_t stream) {
  if constexpr (D != Dtype::float64) {  // which the policies do not serve
    if (v.n == 0) return;
    const bool aligned = v.n % Pack<D>::size == 0 && all_at(v.scales[0] ? sizeof(E4m3<D>) : 16, v.gate, v.up) &&
                         all_at(16, v.y) && all_at(sizeof(E4m3<D>), v.kept[0], v.kept[1]) &&
                         (v.keeps != Keeps::bits || all_at(sizeof(Bits<D>), v.beside[0]));
    const auto kernel = aligned ? compressed_value_kernel<A, D, true> : compressed_value_kernel<A, D, false>;
    launch_kernel(kernel, grid_of<D>(v), kThreads, 0, stream, v, activation.params[0], activation.params[1]);
  }
}

}  // namespace fastbp::cuda
