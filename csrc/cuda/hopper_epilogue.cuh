// The epilogue of a product on Hopper.
//
// It rounds the products to 16 bits into shared memory, as eager PyTorch would to main memory, and then goes through
// rows of them in packs of 16 bytes with the very functions of the elementwise kernels. Only these are there once for
// each activation, so a few kernels serve all.
#pragma once

#include "compressed.h"
#include "hopper.h"
#include "hopper_layout.h"
#include "hopper_ptx.h"
#include "numbers.h"

namespace fastbp::cuda {

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
template <Dtype D, Product::Kind KIND, Reads READS>
struct Epilogue {
  static constexpr bool gated_forward = KIND == Product::gated_forward;
  static constexpr bool backward = KIND == Product::dgrad || KIND == Product::gated_dgrad;
  static constexpr int parts = gated_forward ? 8 : 16, passes = parts;  // of 32 rows
  static constexpr int columns = gated_forward ? kTile / 2 : kTile;     // of results
  static constexpr int ahead =
      KIND == Product::gated_dgrad || READS != Reads::z ? 1 : 2;  // packs at a time, by registers
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
    store_pack(static_cast<Number*>(matrix) + offset, pack);
  }

  // Of a byte of what lies beside a matrix: of its bits, which are half a byte a number, and of its scales.
  __device__ __forceinline__ int64_t bits_at(int pass) const { return offset(pass) / 2; }
  __device__ __forceinline__ int64_t scale_at(int pass) const {
    return static_cast<int64_t>(row(pass)) * scales_size(static_cast<int>(arguments.product.n)) + column() / kBlock;
  }

  // What backward kept, of some passes. Outside it is 0, and 0 of the right side, where dh is 0 too, and so is dz(0, 0)
  // of every activation.
  struct Kept {
    Raw<D> gate[ahead], up[ahead];
  };
  __device__ __forceinline__ Raw<D> get(const void* matrix, const void* beside, int pass) const {
    Raw<D> raw{Pack<D>{}, 0xcccccccc};
    if (pass >= passes || !inside(pass)) return raw;
    const Keeps keeps = arguments.product.keeps;
    if (READS == Reads::z && keeps == Keeps::fp8) {
      raw.numbers = in_place<D>(static_cast<const uint64_t*>(matrix)[offset(pass) / 8]);
      raw.beside = static_cast<const uint8_t*>(beside)[scale_at(pass)];
      return raw;
    }
    raw.numbers = load_pack<D>(static_cast<const Number*>(matrix) + offset(pass));
    if (READS == Reads::side && keeps == Keeps::bits) {
      raw.beside = static_cast<const uint32_t*>(beside)[bits_at(pass) / 4];
    }
    return raw;
  }
  __device__ __forceinline__ Kept fetch(int first) const {
    const Product& p = arguments.product;
    Kept kept;
#pragma unroll
    for (int i = 0; i < ahead; ++i) {
      if constexpr (backward) kept.gate[i] = get(p.gate, p.gate_beside, first + i);
      if constexpr (KIND == Product::gated_dgrad) kept.up[i] = get(p.up, p.up_beside, first + i);
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
    // The second block of a cluster may have a tile below the last row, for which there is no row of sums.
    if (at < n && tile_row * kTile < arguments.product.m) out[tile_row * n + at] = total;
    group_sync(barrier);  // before somebody stages again
  }

  // The activation is chosen once for a few packs, and only arithmetic depends on it: addresses around it are common.
  template <class F>
  __device__ __forceinline__ void choose(const F& f) const {
    with_activation(arguments.activation, arguments.p0, arguments.p1, f);
  }

  // z in e4m3 and its scales. All lanes come here: four share a scale.
  __device__ __forceinline__ void put_e4m3(void* codes, void* scales, int pass, const Pack<D>& z) const {
    const uint32_t scale = scale_of_block(z);
    if (!inside(pass)) return;
    static_cast<uint64_t*>(codes)[offset(pass) / 8] = encoded(z, scale);
    if (column() % kBlock == 0) static_cast<uint8_t*>(scales)[scale_at(pass)] = static_cast<uint8_t>(scale);
  }

  __device__ __forceinline__ void forward_passes() const {
    const Product& p = arguments.product;
#pragma unroll 1
    for (int first = 0; first < passes; first += ahead) {
      Pack<D> z[ahead], u[ahead], y[ahead];
      uint32_t bits[ahead];
#pragma unroll
      for (int i = 0; i < ahead; ++i) {
        z[i] = staged(first + i, lane % parts);
        if constexpr (gated_forward) u[i] = staged(first + i, lane % parts + parts);
      }
      choose([&](const auto& activation) {
#pragma unroll
        for (int i = 0; i < ahead; ++i) {
          if constexpr (gated_forward) {
            y[i] = gated_value(activation, z[i], u[i]);  // its policies change nothing of y, and keep no bits
          } else {
            y[i] = value(activation, z[i], false, u[i], p.keeps, bits[i]);
          }
        }
      });
#pragma unroll
      for (int i = 0; i < ahead; ++i) {
        if (p.keeps == Keeps::fp8) {
          put_e4m3(p.first, p.first_beside, first + i, z[i]);
          if constexpr (gated_forward) put_e4m3(p.second, p.second_beside, first + i, u[i]);
        }
        if (!inside(first + i)) continue;
        const int64_t at = offset(first + i);
        if (!gated_forward && p.keeps == Keeps::bits) {
          static_cast<uint32_t*>(p.first_beside)[bits_at(first + i) / 4] = bits[i];
        } else if (p.keeps != Keeps::fp8) {
          if (p.first) put(p.first, at, z[i]);
          if (gated_forward && p.second) put(p.second, at, u[i]);
        }
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
      Pack<D> dh[ahead], dup[ahead], h[ahead], gate[ahead], up[ahead];
#pragma unroll
      for (int i = 0; i < ahead; ++i) {
        // Outside the products are of rows of zeros with W, whose inf and NaN must not reach the sums.
        dh[i] = inside(first + i) ? staged(first + i, lane % parts) : Pack<D>{};
        gate[i] = numbers_of<D, READS>(kept.gate[i], p.keeps);
        if constexpr (KIND == Product::gated_dgrad) up[i] = numbers_of<D, READS>(kept.up[i], p.keeps);
      }
      choose([&]<class A>(const Bound<A, Approximate>& activation) {
#pragma unroll
        for (int i = 0; i < ahead; ++i) {
          if constexpr (KIND == Product::gated_dgrad) {
            const GatedGrad<D> both = gated_grad(activation, dh[i], gate[i], up[i], sums, sums2);
            dh[i] = both.gate;
            dup[i] = both.up;
            if (p.y) h[i] = gated_value(activation, gate[i], up[i]);
          } else if constexpr (reads<A, D>(READS)) {  // nobody asks for the others
            if (READS == Reads::z && p.y) h[i] = value(activation, gate[i]);
            dh[i] = grad<READS>(activation, dh[i], gate[i], p.keeps, kept.gate[i].beside, sums);
          }
        }
      });
#pragma unroll
      for (int i = 0; i < ahead; ++i) {
        if (!inside(first + i)) continue;
        const int64_t at = offset(first + i);
        put(p.first, at, dh[i]);
        if (KIND == Product::gated_dgrad) put(p.second, at, dup[i]);
        if (READS == Reads::z && p.y) put(p.y, at, h[i]);
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

}  // namespace fastbp::cuda
