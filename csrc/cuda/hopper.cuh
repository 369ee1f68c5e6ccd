// The kernel behind hopper.h. Written for sm_90a and never run yet: docs/gpu-status.md.
//
// Persistent blocks of three warpgroups. One loads: the tensor memory accelerator brings tiles of A and B through a
// ring of stages, and of B each block of a cluster of two loads a half for both. Two compute, by turns (ping-pong):
// while one is in its epilogue the other has the tensor cores. So the elementwise work costs nothing as long as it
// takes less time than the products of a tile: 48 instructions a number at K = 768.
//
// The epilogue rounds the products to 16 bits into shared memory, as eager PyTorch would to main memory, and then goes
// through rows of them in packs of 16 bytes with the very functions of the elementwise kernels. Only these are there
// once for each activation, so a few kernels serve all.
#pragma once

#include "hopper.h"
#include "hopper_layout.h"
#include "hopper_ptx.h"
#include "pack.h"

namespace fastbp::cuda {

constexpr int kStages = 5;
constexpr int kStagingBytes = kTile * kTile * 2;
constexpr int kSharedBytes = 1024 + kStages * kStageBytes + 2 * kStagingBytes + 2 * kStages * 8;
constexpr int kProductThreads = 3 * kGroupThreads;
constexpr int kLoaderRegisters = 40, kComputerRegisters = 232;

#define FASTBP_NUMBER(A) number_of_##A,
enum ActivationNumber : int { FASTBP_FOR_EACH_ACTIVATION(FASTBP_NUMBER) };
#undef FASTBP_NUMBER

// f(the activation with its parameters); every case holds f once.
template <class F>
__device__ __forceinline__ void with_activation(int number, double p0, double p1, const F& f) {
#define FASTBP_CASE(A)                     \
  case number_of_##A:                      \
    f(Bound<act::A, Approximate>(p0, p1)); \
    break;
  switch (number) { FASTBP_FOR_EACH_ACTIVATION(FASTBP_CASE) }
#undef FASTBP_CASE
}

struct ProductArguments {
  Product product;
  int activation;
  double p0, p1;
};

// One warp's rows of a tile, a pack at a time.
template <Dtype D, Product::Kind KIND, bool FROM_OUTPUT>
struct Epilogue {
  static constexpr bool gated_forward = KIND == Product::gated_forward;
  static constexpr bool backward = KIND == Product::dgrad || KIND == Product::gated_dgrad;
  static constexpr int parts = gated_forward ? 8 : 16, passes = parts;               // of 32 rows
  static constexpr int columns = gated_forward ? kTile / 2 : kTile;                  // of results
  static constexpr int ahead = KIND == Product::gated_dgrad || FROM_OUTPUT ? 1 : 2;  // packs at a time, by registers
  using Number = Memory<D>;

  const ProductArguments& arguments;
  char* staging;  // of the warpgroup
  int tile_row, tile_column, warp, lane;

  // Sizes are below 2³¹, products of them are not.
  __device__ __forceinline__ int column() const { return tile_column * columns + lane % parts * 8; }
  __device__ __forceinline__ int row(int pass) const { return tile_row * kTile + pass_row(pass, warp, lane, parts); }
  __device__ __forceinline__ bool inside(int pass) const {
    return row(pass) < static_cast<int>(arguments.product.m) && column() < static_cast<int>(arguments.product.n);
  }
  __device__ __forceinline__ const Pack<D>& staged(int pass, int part) const {
    return *reinterpret_cast<const Pack<D>*>(staging + part_at(pass_row(pass, warp, lane, parts), part));
  }
  __device__ __forceinline__ int64_t offset(int pass) const {
    return static_cast<int64_t>(row(pass)) * static_cast<int>(arguments.product.n) + column();
  }
  static __device__ __forceinline__ void put(void* matrix, int64_t offset, const Pack<D>& pack) {
    *reinterpret_cast<Pack<D>*>(static_cast<Number*>(matrix) + offset) = pack;
  }

  // What backward kept, of some passes; 0 outside, where dh is 0 too, and so is dz(0, 0) of every activation.
  struct Kept {
    Pack<D> gate[ahead], up[ahead];
  };
  __device__ __forceinline__ Pack<D> get(const void* matrix, int pass) const {
    if (pass >= passes || !inside(pass)) return Pack<D>{};
    return *reinterpret_cast<const Pack<D>*>(static_cast<const Number*>(matrix) + offset(pass));
  }
  __device__ __forceinline__ Kept fetch(int first) const {
    Kept kept{};
#pragma unroll
    for (int i = 0; i < ahead; ++i) {
      if constexpr (backward) kept.gate[i] = get(arguments.product.gate, first + i);
      if constexpr (KIND == Product::gated_dgrad) kept.up[i] = get(arguments.product.up, first + i);
    }
    return kept;
  }

  __device__ __forceinline__ float bias_of(const void* bias, int64_t at) const {
    return bias && at < arguments.product.n ? wide(static_cast<const Number*>(bias)[at]).v : 0.0f;
  }

  // The products, with the bias, in 16 bits into shared memory.
  __device__ __forceinline__ void stage(const float (&c)[2][64]) const {
    const Product& p = arguments.product;
    const int64_t first = static_cast<int64_t>(tile_column) * columns;
    __syncwarp();  // the pass over the tile before this one has read what lies here
#pragma unroll
    for (int sixteen = 0; sixteen < 8; ++sixteen) {
      float bias[4] = {};
      if constexpr (!backward) {
        const bool second = gated_forward && sixteen >= 4;
        const void* of = second ? p.bias2 : p.bias;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int number = 8 * sixteen + i / 2 * 4 + i % 2;
          bias[i] = bias_of(of, first + register_column(lane, number) - (second ? columns : 0));
        }
      }
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        uint32_t rows[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float *pair = &c[half][8 * sixteen + 2 * i], *b = &bias[i / 2 * 2];
          const Number numbers[2] = {rounded<D>(Approximate(pair[0] + b[0])), rounded<D>(Approximate(pair[1] + b[1]))};
          rows[i] = *reinterpret_cast<const uint32_t*>(numbers);
        }
        store_matrices(shared_address(staging + part_at(stored_row(half, warp, lane), stored_part(sixteen, lane))),
                       rows);
      }
    }
    __syncwarp();
  }

  // A row of the sums: a lane has eight columns of half of the warp's rows; then the warps' are added in their order.
  __device__ __forceinline__ void add_up(float (&mine)[8], float* out, int barrier) const {
    float* shared = reinterpret_cast<float*>(staging);
#pragma unroll
    for (int i = 0; i < 8; ++i) mine[i] += __shfl_xor_sync(0xffffffff, mine[i], 16);
    group_sync(barrier);  // every warp has read what was staged
    if (lane < 16) {
#pragma unroll
      for (int i = 0; i < 8; ++i) shared[warp * kTile + lane * 8 + i] = mine[i];
    }
    group_sync(barrier);
    const int thread = warp * 32 + lane;
    const int64_t at = static_cast<int64_t>(tile_column) * kTile + thread, n = arguments.product.n;
    float total = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) total += shared[i * kTile + thread];
    if (at < n) out[tile_row * n + at] = total;
    group_sync(barrier);  // before somebody stages again
  }

  // The activation is chosen once for a few packs, and only arithmetic depends on it: addresses around it are common.
  template <class F>
  __device__ __forceinline__ void choose(const F& f) const {
    with_activation(arguments.activation, arguments.p0, arguments.p1, f);
  }

  __device__ __forceinline__ void forward_passes() const {
    const Product& p = arguments.product;
#pragma unroll 1
    for (int first = 0; first < passes; first += ahead) {
      Pack<D> z[ahead], u[ahead], y[ahead];
#pragma unroll
      for (int i = 0; i < ahead; ++i) {
        z[i] = staged(first + i, lane % parts);
        if constexpr (gated_forward) u[i] = staged(first + i, lane % parts + parts);
      }
      choose([&](const auto& activation) {
#pragma unroll
        for (int i = 0; i < ahead; ++i) {
          if constexpr (gated_forward) {
            y[i] = gated_value(activation, z[i], u[i]);
          } else {
            y[i] = value(activation, z[i]);
          }
        }
      });
#pragma unroll
      for (int i = 0; i < ahead; ++i) {
        if (!inside(first + i)) continue;
        const int64_t at = offset(first + i);
        if (p.first) put(p.first, at, z[i]);
        if (gated_forward && p.second) put(p.second, at, u[i]);
        put(p.y, at, y[i]);
      }
    }
  }

  __device__ __forceinline__ void backward_passes(int barrier) const {
    const Product& p = arguments.product;
    Kept kept = fetch(0);
    float sums[8] = {}, sums2[8] = {};
#pragma unroll 1
    for (int first = 0; first < passes; first += ahead) {
      const Kept next = fetch(first + ahead);
      Pack<D> dh[ahead], dup[ahead], h[ahead];
#pragma unroll
      for (int i = 0; i < ahead; ++i) dh[i] = staged(first + i, lane % parts);
      choose([&]<class A>(const Bound<A, Approximate>& activation) {
#pragma unroll
        for (int i = 0; i < ahead; ++i) {
          if constexpr (KIND == Product::gated_dgrad) {
            const GatedGrad<D> both = gated_grad(activation, dh[i], kept.gate[i], kept.up[i], sums, sums2);
            dh[i] = both.gate;
            dup[i] = both.up;
            if (p.y) h[i] = gated_value(activation, kept.gate[i], kept.up[i]);
          } else {
            if (p.y) h[i] = value(activation, kept.gate[i]);
            dh[i] = grad < FROM_OUTPUT && A::has_grad_from_output > (activation, dh[i], kept.gate[i], sums);
          }
        }
      });
#pragma unroll
      for (int i = 0; i < ahead; ++i) {
        if (!inside(first + i)) continue;
        const int64_t at = offset(first + i);
        put(p.first, at, dh[i]);
        if (KIND == Product::gated_dgrad) put(p.second, at, dup[i]);
        if (p.y) put(p.y, at, h[i]);
      }
      kept = next;
    }
    if (p.sums) add_up(sums, p.sums, barrier);
    if (KIND == Product::gated_dgrad && p.sums2) add_up(sums2, p.sums2, barrier);
  }

  __device__ __forceinline__ void run(const float (&c)[2][64], int barrier) const {
    stage(c);
    if constexpr (backward) {
      backward_passes(barrier);
    } else {
      forward_passes();
    }
  }
};

template <Dtype D, Product::Kind KIND, bool FROM_OUTPUT>
__global__ void __cluster_dims__(2, 1, 1) __launch_bounds__(kProductThreads, 1)
    product_kernel(const __grid_constant__ CUtensorMap a, const __grid_constant__ CUtensorMap b,
                   const __grid_constant__ CUtensorMap b2, const __grid_constant__ ProductArguments arguments) {
  constexpr int by_steps = KIND == Product::dgrad || KIND == Product::gated_dgrad;
  using Own = Epilogue<D, KIND, FROM_OUTPUT>;
  extern __shared__ char memory[];
  char* const stages = memory + (1024 - shared_address(memory) % 1024) % 1024;
  char* const staging = stages + kStages * kStageBytes;
  const uint32_t full = shared_address(staging + 2 * kStagingBytes), empty = full + kStages * 8;
  const int thread = threadIdx.x, group = thread / kGroupThreads, lane = thread % 32, rank = rank_in_cluster();
  const Product& p = arguments.product;
  const int row_pairs = static_cast<int>((p.m + 2 * kTile - 1) / (2 * kTile));
  const int columns = static_cast<int>((p.n + Own::columns - 1) / Own::columns);
  const int steps = static_cast<int>((p.k + kDepth - 1) / kDepth);
  const int tiles = row_pairs * columns;
  const int cluster = blockIdx.x / 2, clusters = gridDim.x / 2;

  if (thread == 0) {
    for (int i = 0; i < kStages; ++i) {
      barrier_init(full + 8 * i, 1);
      barrier_init(empty + 8 * i, 2 * kGroupThreads / 32);  // the warps that have read it, in both blocks
    }
    barriers_visible();
  }
  cluster_sync();

  if (group == 0) {
    give_registers<kLoaderRegisters>();
    if (thread == 0) {
      int stage = 0, parity = 1;
      for (int tile = cluster; tile < tiles; tile += clusters) {
        const Place place = tile_at(tile, row_pairs, columns, rank);
        for (int step = 0; step < steps; ++step) {
          const uint32_t to = shared_address(stages + stage * kStageBytes), ready = full + 8 * stage;
          const uint32_t half = to + kOperandBytes + rank * kHalfBytes;
          barrier_wait(empty + 8 * stage, parity);
          barrier_expect(ready, kStageBytes);
          load_box(to, a, step * kDepth, place.row * kTile, ready);
          if constexpr (by_steps) {
            load_box(half, b, place.column * kTile + rank * kDepth, step * kDepth, ready, 3);
          } else if constexpr (KIND == Product::gated_forward) {
            load_box(half, rank ? b2 : b, step * kDepth, place.column * Own::columns, ready, 3);
          } else {
            load_box(half, b, step * kDepth, place.column * kTile + rank * kHalfRows, ready, 3);
          }
          if (++stage == kStages) {
            stage = 0;
            parity ^= 1;
          }
        }
      }
    }
  } else {
    take_registers<kComputerRegisters>();
    const int which = group - 1;
    const auto release = [&](int stage) {
      if (lane < 2) barrier_arrive(empty + 8 * stage, lane);
    };
    int turn = which * steps % (2 * kStages);  // in the ring, gone through twice: the second time parities are odd
    for (int tile = cluster + which * clusters; tile < tiles; tile += 2 * clusters) {
      int stage = turn % kStages, parity = turn / kStages;
      turn = (turn + 2 * steps) % (2 * kStages);
      int before = 0;
      float c[2][64];
      for (int step = 0; step < steps; ++step) {
        const uint32_t from = shared_address(stages + stage * kStageBytes);
        barrier_wait(full + 8 * stage, parity);
        products_begin();
#pragma unroll
        for (int i = 0; i < kDepth / 16; ++i) {
          const uint64_t of_b = b_at(from, i, by_steps);
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const uint64_t of_a = a_at(from, half, i);
            multiply<Memory<D>, by_steps>(c[half], of_a, of_b, step > 0 || i > 0);
          }
        }
        products_commit();
        products_wait<1>();
        if (step > 0) release(before);  // its products are done
        before = stage;
        if (++stage == kStages) {
          stage = 0;
          parity ^= 1;
        }
      }
      products_wait<0>();
      hold(c);
      release(before);
      const Place place = tile_at(tile, row_pairs, columns, rank);
      // From the start again: else the compiler computes the addresses once, and holds them in registers meanwhile.
      int own = threadIdx.x;
      asm volatile("" : "+r"(own));
      char* const tile_of_group = staging + (own / kGroupThreads - 1) * kStagingBytes;
      const Own epilogue{arguments, tile_of_group, place.row, place.column, own / 32 % 4, own % 32};
      epilogue.run(c, own / kGroupThreads);
    }
  }
  cluster_sync();  // shared memory must not go while the other block writes to it
}

}  // namespace fastbp::cuda
