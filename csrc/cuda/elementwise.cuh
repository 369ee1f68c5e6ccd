// The kernels of elementwise.h for one dtype; the .cu files instantiate them.
#pragma once

#include <algorithm>

#include "compressed.cuh"
#include "launch.cuh"

namespace fastbp::cuda {

template <class A, Dtype D, bool GATED>
__global__ void __launch_bounds__(kThreads, kBlocks<D>)
    value_kernel(const Memory<D>* gate, const Memory<D>* up, Memory<D>* y, int64_t size, double p0, double p1,
                 bool aligned) {
  constexpr int width = Pack<D>::size;
  const Bound<A, Compute<D>> activation(p0, p1);
  const int64_t first = (static_cast<int64_t>(blockIdx.x) * kFlat * kThreads + threadIdx.x) * width;
  Pack<D> g[kFlat], u[kFlat];
#pragma unroll
  for (int i = 0; i < kFlat; ++i) {
    const int64_t at = first + static_cast<int64_t>(i) * kThreads * width;
    const bool whole = aligned && at + width <= size;
    g[i] = load<D>(gate, at, size, 1, whole);
    if constexpr (GATED) u[i] = load<D>(up, at, size, 1, whole);
  }
#pragma unroll
  for (int i = 0; i < kFlat; ++i) {
    const int64_t at = first + static_cast<int64_t>(i) * kThreads * width;
    Pack<D> out;
    if constexpr (GATED) {
      out = gated_value(activation, g[i], u[i]);
    } else {
      out = value(activation, g[i]);
    }
    store<D>(y, at, size, out, aligned && at + width <= size);
  }
}

// The sums of a block's columns: every warp's by turns, in an order that is always the same.
template <Dtype D>
__device__ void add_up(const Sum<D> (&mine)[Pack<D>::size], Sum<D>* out, int64_t n) {
  constexpr int width = Pack<D>::size, columns = kLanes * width;
  __shared__ Sum<D> shared[kWarps][columns];
  const int lane = threadIdx.x % kLanes, warp = threadIdx.x / kLanes;
  __syncthreads();  // for whoever used it before
#pragma unroll
  for (int i = 0; i < width; ++i) shared[warp][lane * width + i] = mine[i];
  __syncthreads();
  const int64_t first = static_cast<int64_t>(blockIdx.x) * columns;
  for (int c = threadIdx.x; c < columns && first + c < n; c += kThreads) {
    Sum<D> total = 0;
#pragma unroll
    for (int i = 0; i < kWarps; ++i) total += shared[i][c];
    out[blockIdx.y * n + first + c] = total;
  }
}

template <class A, Dtype D, Reads READS, bool ALIGNED>
__global__ void __launch_bounds__(kThreads, kBlocks<D>) chain_rule_kernel(ChainRule rule, double p0, double p1) {
  constexpr int width = Pack<D>::size, rows = ALIGNED ? kRowsAtOnce : 1;
  const Bound<A, Compute<D>> activation(p0, p1);
  const int lane = threadIdx.x % kLanes, warp = threadIdx.x / kLanes;
  const int64_t n = rule.n, column = (static_cast<int64_t>(blockIdx.x) * kLanes + lane) * width;
  const int64_t begin = blockIdx.y * rule.strips.rows, end = min(begin + rule.strips.rows, rule.m);
  const auto* dh = static_cast<const Memory<D>*>(rule.dh);
  auto *dz = static_cast<Memory<D>*>(rule.dz), *h = static_cast<Memory<D>*>(rule.h);
  Sum<D> sums[width] = {};
  for (int64_t row = begin + warp; column < n && row < end; row += rows * kWarps) {
    Pack<D> d[rows];
    Raw<D> raw[rows];
#pragma unroll
    for (int i = 0; i < rows; ++i) {
      const int64_t at = row + i * kWarps;
      if (at >= end) break;
      d[i] = load<D>(dh + at * rule.dh_stride, column, n, rule.dh_column_stride, ALIGNED);
      raw[i] = load_kept<D, READS>(rule.kept, rule.beside, rule.keeps, at, rule.stride, column, n, ALIGNED);
    }
#pragma unroll
    for (int i = 0; i < rows; ++i) {
      const int64_t at = row + i * kWarps;
      if (at >= end) break;
      const Pack<D> r = numbers_of<D, READS>(raw[i], rule.keeps);
      if (READS == Reads::z && h) store<D>(h + at * n, column, n, value(activation, r), ALIGNED);
      const Pack<D> found = grad<READS>(activation, d[i], r, rule.keeps, raw[i].beside, sums);
      store<D>(dz + at * n, column, n, found, ALIGNED);
    }
  }
  if (rule.sums) add_up<D>(sums, static_cast<Sum<D>*>(rule.sums), n);
}

template <class A, Dtype D, bool ALIGNED>
__global__ void __launch_bounds__(kThreads, kBlocks<D>)
    gated_chain_rule_kernel(GatedChainRule rule, double p0, double p1) {
  constexpr int width = Pack<D>::size, rows = ALIGNED ? kGatedAtOnce : 1;
  const Bound<A, Compute<D>> activation(p0, p1);
  const int lane = threadIdx.x % kLanes, warp = threadIdx.x / kLanes;
  const int64_t n = rule.n, column = (static_cast<int64_t>(blockIdx.x) * kLanes + lane) * width;
  const int64_t begin = blockIdx.y * rule.strips.rows, end = min(begin + rule.strips.rows, rule.m);
  const auto* dh = static_cast<const Memory<D>*>(rule.dh);
  auto *dgate = static_cast<Memory<D>*>(rule.dgate), *dup = static_cast<Memory<D>*>(rule.dup);
  auto* h = static_cast<Memory<D>*>(rule.h);
  Sum<D> gate_sums[width] = {}, up_sums[width] = {};
  for (int64_t row = begin + warp; column < n && row < end; row += rows * kWarps) {
    Pack<D> d[rows];
    Raw<D> gate[rows], up[rows];
#pragma unroll
    for (int i = 0; i < rows; ++i) {
      const int64_t at = row + i * kWarps;
      if (at >= end) break;
      d[i] = load<D>(dh + at * rule.dh_stride, column, n, rule.dh_column_stride, ALIGNED);
      const auto load_part = [&](const void* kept, const void* scales) {
        return load_kept<D, Reads::z>(kept, scales, rule.keeps, at, rule.stride, column, n, ALIGNED);
      };
      gate[i] = load_part(rule.gate, rule.gate_scales);
      up[i] = rule.up ? load_part(rule.up, rule.up_scales) : gate[i];  // nobody looks at it then
    }
#pragma unroll
    for (int i = 0; i < rows; ++i) {
      const int64_t at = row + i * kWarps;
      if (at >= end) break;
      const Pack<D> g = numbers_of<D, Reads::z>(gate[i], rule.keeps), u = numbers_of<D, Reads::z>(up[i], rule.keeps);
      if (h) store<D>(h + at * n, column, n, gated_value(activation, g, u), ALIGNED);
      const GatedGrad<D> found = gated_grad(activation, d[i], g, u, gate_sums, up_sums);
      if (dgate) store<D>(dgate + at * n, column, n, found.gate, ALIGNED);
      if (dup) store<D>(dup + at * n, column, n, found.up, ALIGNED);
    }
  }
  if (rule.gate_sums) add_up<D>(gate_sums, static_cast<Sum<D>*>(rule.gate_sums), n);
  if (rule.up_sums) add_up<D>(up_sums, static_cast<Sum<D>*>(rule.up_sums), n);
}

// A warp takes every kWarps-th row of the sums, a lane a column; the warps' totals are added in their order.
template <Dtype D>
__global__ void __launch_bounds__(kThreads)
    column_sum_kernel(const Sum<D>* sums, Memory<D>* out, int64_t strips, int64_t n) {
  __shared__ Sum<D> shared[kWarps][kLanes];
  const int lane = threadIdx.x % kLanes, warp = threadIdx.x / kLanes;
  const int64_t column = static_cast<int64_t>(blockIdx.x) * kLanes + lane;
  Sum<D> total = 0;
  if (column < n) {
#pragma unroll 4
    for (int64_t row = warp; row < strips; row += kWarps) total += sums[row * n + column];
  }
  shared[warp][lane] = total;
  __syncthreads();
  if (warp > 0 || column >= n) return;
#pragma unroll
  for (int i = 1; i < kWarps; ++i) total += shared[i][lane];
  out[column] = rounded<D>(static_cast<Compute<D>>(total));
}

template <class A, Dtype D>
void launch_as(const Activation& activation, const Value& v, cudaStream_t stream) {
  constexpr int64_t each = int64_t{kThreads} * kFlat * Pack<D>::size;
  const auto blocks = static_cast<unsigned>((v.size + each - 1) / each);
  if (blocks == 0) return;
  const auto *gate = static_cast<const Memory<D>*>(v.gate), *up = static_cast<const Memory<D>*>(v.up);
  auto* y = static_cast<Memory<D>*>(v.y);
  const bool aligned = all_at(16, v.gate, v.up, v.y);
  const auto [p0, p1] = activation.params;
  const auto kernel = up ? value_kernel<A, D, true> : value_kernel<A, D, false>;
  launch_kernel(kernel, blocks, kThreads, 0, stream, gate, up, y, v.size, p0, p1, aligned);
}

// Whether packs of 16 bytes reach all of a matrix, and words what lies beside it or in its place.
template <Dtype D, class Rule, class... Kept>
bool in_packs(const Rule& rule, Kept... kept) {
  constexpr int width = Pack<D>::size;
  return rule.dh_column_stride == 1 && rule.n % width == 0 && rule.dh_stride % width == 0 && rule.stride % width == 0 &&
         all_at(rule.keeps == Keeps::fp8 ? sizeof(E4m3<D>) : 16, kept...) && all_at(16, rule.dh, rule.h);
}

template <class A, Dtype D>
void launch_as(const Activation& activation, const ChainRule& rule, cudaStream_t stream) {
  if (rule.n == 0) return;
  const bool aligned = in_packs<D>(rule, rule.kept) && all_at(16, rule.dz) &&
                       (rule.keeps != Keeps::bits || all_at(sizeof(Bits<D>), rule.beside));
  void (*kernel)(ChainRule, double, double) =
      aligned ? chain_rule_kernel<A, D, Reads::z, true> : chain_rule_kernel<A, D, Reads::z, false>;
  if constexpr (reads<A, D>(Reads::y)) {
    if (rule.keeps == Keeps::y) {
      kernel = aligned ? chain_rule_kernel<A, D, Reads::y, true> : chain_rule_kernel<A, D, Reads::y, false>;
    }
  }
  if constexpr (reads<A, D>(Reads::side)) {
    if (rule.keeps == Keeps::bits || rule.keeps == Keeps::lowest_bit) {
      kernel = aligned ? chain_rule_kernel<A, D, Reads::side, true> : chain_rule_kernel<A, D, Reads::side, false>;
    }
  }
  launch_kernel(kernel, grid_of<D>(rule), kThreads, 0, stream, rule, activation.params[0], activation.params[1]);
}

template <class A, Dtype D>
void launch_as(const Activation& activation, const GatedChainRule& rule, cudaStream_t stream) {
  if (rule.n == 0) return;
  const bool aligned = in_packs<D>(rule, rule.gate, rule.up) && all_at(16, rule.dgate, rule.dup);
  const auto kernel = aligned ? gated_chain_rule_kernel<A, D, true> : gated_chain_rule_kernel<A, D, false>;
  launch_kernel(kernel, grid_of<D>(rule), kThreads, 0, stream, rule, activation.params[0], activation.params[1]);
}

template <Dtype D, class Pass>
void launch_of(const Activation& activation, const Pass& pass, cudaStream_t stream) {
  using Launcher = void (*)(const Activation&, const Pass&, cudaStream_t);
#define FASTBP_LAUNCHER(A) launch_as<act::A, D>,
  static constexpr Launcher launchers[] = {FASTBP_FOR_EACH_ACTIVATION(FASTBP_LAUNCHER)};
#undef FASTBP_LAUNCHER
  launchers[activation.number](activation, pass, stream);
}

template <Dtype D>
void launch_column_sum_of(const void* sums, void* out, int64_t strips, int64_t n, cudaStream_t stream) {
  const auto blocks = static_cast<unsigned>((n + kLanes - 1) / kLanes);
  if (blocks == 0) return;
  launch_kernel(column_sum_kernel<D>, blocks, kThreads, 0, stream, static_cast<const Sum<D>*>(sums),
                static_cast<Memory<D>*>(out), strips, n);
}

// What a .cu file instantiates, of one dtype.
#define FASTBP_ELEMENTWISE(PREFIX, D)                                                                          \
  PREFIX template void launch_of<D, CompressedValue>(const Activation&, const CompressedValue&, cudaStream_t); \
  PREFIX template void launch_of<D, Value>(const Activation&, const Value&, cudaStream_t);                     \
  PREFIX template void launch_of<D, ChainRule>(const Activation&, const ChainRule&, cudaStream_t);             \
  PREFIX template void launch_of<D, GatedChainRule>(const Activation&, const GatedChainRule&, cudaStream_t);   \
  PREFIX template void launch_column_sum_of<D>(const void*, void*, int64_t, int64_t, cudaStream_t);

}  // namespace fastbp::cuda
