// The kernel behind hopper.h. Written for sm_90a and never run yet: docs/gpu-status.md.
//
// Persistent blocks of three warpgroups. One loads: the tensor memory accelerator brings tiles of A and B through a
// ring of stages, and of B each block of a cluster of two loads a half for both. Two compute, by turns (ping-pong):
// while one is in its epilogue the other has the tensor cores. So the elementwise work costs nothing as long as it
// takes less time than the products of a tile: 48 instructions a number at K = 768.
//
// The turns have an order. A wait on a stage sees only whether a phase is odd, so a group that looked two phases early
// would pass. Therefore it begins a tile when the other has waited for every step of the tile before, and has issued
// its products: two order barriers, one for each group (CUTLASS, OrderedSequenceBarrier). The first tile of a cluster
// waits for nobody, and after the last nobody is told, so each arrival has its wait.
#pragma once

#include "hopper_epilogue.cuh"

namespace fastbp::cuda {

constexpr int kStages = 5;
constexpr int kStagingBytes = kTile * kTile * 2;
constexpr int kSharedBytes = 1024 + kStages * kStageBytes + 2 * kStagingBytes + 2 * kStages * 8;
constexpr int kProductThreads = 3 * kGroupThreads;
constexpr int kLoaderRegisters = 40, kComputerRegisters = 232;
constexpr int kFirstOrderBarrier = 3;  // 1 and 2 are the groups' own, in the epilogue

template <Dtype D, Product::Kind KIND, Reads READS>
__global__ void __cluster_dims__(2, 1, 1) __launch_bounds__(kProductThreads, 1)
    product_kernel(const __grid_constant__ CUtensorMap a, const __grid_constant__ CUtensorMap b,
                   const __grid_constant__ CUtensorMap b2, const __grid_constant__ ProductArguments arguments) {
  constexpr int by_steps = KIND == Product::dgrad || KIND == Product::gated_dgrad;
  using Own = Epilogue<D, KIND, READS>;
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
      if (tile != cluster) order_wait(kFirstOrderBarrier + which);
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
      if (tile + clusters < tiles) order_arrive(kFirstOrderBarrier + 1 - which);
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
