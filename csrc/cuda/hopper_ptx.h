// The instructions of Hopper that have no name in C++: barriers in shared memory, the tensor memory accelerator, and
// matrix products of a warpgroup (PTX ISA, "mbarrier", "cp.async.bulk.tensor", "wgmma").
#pragma once

#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <stdint.h>

#include <type_traits>

namespace fastbp::cuda {

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// A barrier of shared memory: `arrivals` and the bytes that were announced end a phase.
__device__ __forceinline__ void barrier_init(uint32_t barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals));
}

__device__ __forceinline__ void barriers_visible() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ __forceinline__ void barrier_expect(uint32_t barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

// At the same place in block `rank` of the cluster.
__device__ __forceinline__ void barrier_arrive(uint32_t barrier, int rank) {
  asm volatile(
      "{\n.reg .b32 there;\n"
      "mapa.shared::cluster.u32 there, %0, %1;\n"
      "mbarrier.arrive.release.cluster.shared::cluster.b64 _, [there];\n}" ::"r"(barrier),
      "r"(rank)
      : "memory");
}

__device__ __forceinline__ void barrier_wait(uint32_t barrier, int parity) {
  asm volatile(
      "{\n.reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%0], %1;\n"
      "@done bra over;\n"
      "bra again;\n"
      "over:\n}" ::"r"(barrier),
      "r"(parity)
      : "memory");
}

__device__ __forceinline__ void cluster_sync() {
  asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;" ::: "memory");
}

__device__ __forceinline__ int rank_in_cluster() {
  int rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

// A box of a matrix into shared memory, its first number at (column, row); outside the matrix 0. With a mask of more
// than one block it comes to all of them, at the same place, and each one's barrier counts the bytes.
__device__ __forceinline__ void load_box(uint32_t to, const CUtensorMap& map, int column, int row, uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];" ::"r"(
          to),
      "l"(&map), "r"(barrier), "r"(column), "r"(row)
      : "memory");
}

__device__ __forceinline__ void load_box(uint32_t to, const CUtensorMap& map, int column, int row, uint32_t barrier,
                                         uint16_t mask) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster"
      " [%0], [%1, {%3, %4}], [%2], %5;" ::"r"(to),
      "l"(&map), "r"(barrier), "r"(column), "r"(row), "h"(mask)
      : "memory");
}

template <int REGISTERS>
__device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}

template <int REGISTERS>
__device__ __forceinline__ void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}

// All threads of a warpgroup, by a barrier of its own.
__device__ __forceinline__ void group_sync(int number) { asm volatile("bar.sync %0, 128;" ::"r"(number) : "memory"); }

// An order barrier of two warpgroups: one waits on it until the other has arrived, which goes on (PTX ISA, "bar").
__device__ __forceinline__ void order_wait(int number) { asm volatile("bar.sync %0, 256;" ::"r"(number) : "memory"); }
__device__ __forceinline__ void order_arrive(int number) {
  asm volatile("bar.arrive %0, 256;" ::"r"(number) : "memory");
}

__device__ __forceinline__ void products_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void products_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Until at most N groups of products are under way.
template <int N>
__device__ __forceinline__ void products_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
}

// Nothing that reads or writes these numbers may be moved across: the compiler does not know when products are done.
__device__ __forceinline__ void hold(float (&c)[2][64]) {
#pragma unroll
  for (int i = 0; i < 128; ++i) asm volatile("" : "+f"(c[i / 64][i % 64])::"memory");
}

#define FASTBP_4(C, I) C(I), C(I + 1), C(I + 2), C(I + 3)
#define FASTBP_16(C, I) FASTBP_4(C, I), FASTBP_4(C, I + 4), FASTBP_4(C, I + 8), FASTBP_4(C, I + 12)
#define FASTBP_64(C) FASTBP_16(C, 0), FASTBP_16(C, 16), FASTBP_16(C, 32), FASTBP_16(C, 48)
#define FASTBP_IN_OUT(I) "+f"(c[I])
#define FASTBP_MULTIPLY(TYPE)                                                                                       \
  asm volatile(                                                                                                     \
      "{\n.reg .pred adds;\nsetp.ne.b32 adds, %66, 0;\n"                                                            \
      "wgmma.mma_async.sync.aligned.m64n128k16.f32." TYPE "." TYPE                                                  \
      " {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, " \
      "%23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, "   \
      "%44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "       \
      "%64, %65, adds, 1, 1, 0, %67;\n}"                                                                            \
      : FASTBP_64(FASTBP_IN_OUT)                                                                                    \
      : "l"(a), "l"(b), "r"(static_cast<int>(adds)), "n"(B_BY_STEPS))

// C (64 × 128) = A (64 × 16) B (16 × 128), plus C where it adds. Both operands are in shared memory, A by rows of the
// reduction's steps; B so too, or by steps (B_BY_STEPS).
template <class E, int B_BY_STEPS>
__device__ __forceinline__ void multiply(float (&c)[64], uint64_t a, uint64_t b, bool adds) {
  if constexpr (std::is_same_v<E, __nv_bfloat16>) {
    FASTBP_MULTIPLY("bf16");
  } else {
    FASTBP_MULTIPLY("f16");
  }
}

// Four blocks of 8 × 8 numbers of 16 bits from the registers of a warp into rows of 16 bytes, one for each lane.
__device__ __forceinline__ void store_matrices(uint32_t row, const uint32_t (&numbers)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(row), "r"(numbers[0]),
               "r"(numbers[1]), "r"(numbers[2]), "r"(numbers[3])
               : "memory");
}

}  // namespace fastbp::cuda
