// The device functions of csrc/cuda as the host computes them, for tests/test_cuda_math.py; and Hopper's shared memory,
// as the PTX ISA describes it, emulated around the arithmetic of hopper_layout.h.
#include <algorithm>
#include <cstring>
#include <vector>

#include "cuda/compressed.h"
#include "cuda/hopper_layout.h"

using namespace fastbp;
using namespace fastbp::cuda;

namespace {

template <class A, Dtype D>
void run_as(int form, const void* first, const void* second, const void* third, void* out, void* out2, double* sums,
            size_t packs, double p0, double p1) {
  const Bound<A, Compute<D>> activation(p0, p1);
  const auto *a = static_cast<const Pack<D>*>(first), *b = static_cast<const Pack<D>*>(second),
             *c = static_cast<const Pack<D>*>(third);
  auto *o = static_cast<Pack<D>*>(out), *o2 = static_cast<Pack<D>*>(out2);
  constexpr int width = Pack<D>::size;
  Sum<D> total[width] = {}, total2[width] = {};
  for (size_t i = 0; i < packs; ++i) {
    if (form == 0) o[i] = value(activation, a[i]);
    if (form == 1) o[i] = grad<false>(activation, a[i], b[i], total);
    if constexpr (A::has_grad_from_output) {
      if (form == 2) o[i] = grad<true>(activation, a[i], b[i], total);
    }
    if (form == 3) o[i] = gated_value(activation, a[i], b[i]);
    if (form == 4) {
      const GatedGrad<D> both = gated_grad(activation, a[i], b[i], c[i], total, total2);
      o[i] = both.gate;
      o2[i] = both.up;
    }
  }
  for (int i = 0; i < width; ++i) sums[i] = total[i], sums[width + i] = total2[i];
}

// y and the codes of bits of packs of z; or dz from dy, y and codes. What float32 f(z) is that was rounded, into
// `wide`.
template <class A, Dtype D>
void side_as(bool forward, bool in_codes, const void* first, const void* second, void* codes, void* out, float* wide_y,
             double* sums, size_t packs) {
  if constexpr (A::has_grad_from_side && D != Dtype::float64) {
    const Bound<A, Compute<D>> activation(0, 0);
    const auto *a = static_cast<const Pack<D>*>(first), *b = static_cast<const Pack<D>*>(second);
    auto* o = static_cast<Pack<D>*>(out);
    auto* bits = static_cast<Bits<D>*>(codes);
    constexpr int width = Pack<D>::size;
    const Keeps keeps = in_codes ? Keeps::bits : Keeps::lowest_bit;
    Sum<D> total[width] = {};
    for (size_t i = 0; i < packs; ++i) {
      if (!forward) {
        o[i] = grad<Reads::side>(activation, a[i], b[i], keeps, in_codes ? bits[i] : 0, total);
        continue;
      }
      uint32_t found = 0;
      o[i] = value(activation, a[i], false, Pack<D>{}, keeps, found);
      if (in_codes) bits[i] = static_cast<Bits<D>>(found);
      for (int j = 0; j < width; ++j) wide_y[i * width + j] = plain(activation.value(wide(a[i].at[j])));
    }
    for (int i = 0; i < width; ++i) sums[i] = total[i];
  }
}

using Side = void (*)(bool, bool, const void*, const void*, void*, void*, float*, double*, size_t);

template <Dtype D>
Side side_of(int activation) {
#define SIDE(A) side_as<act::A, D>,
  static constexpr Side sides[] = {FASTBP_FOR_EACH_ACTIVATION(SIDE)};
  return sides[activation];
}

// Blocks of numbers to e4m3 and a scale each, and back.
template <Dtype D>
void e4m3_as(const void* z, void* codes, uint8_t* scales, void* back, size_t blocks) {
  const auto* from = static_cast<const Pack<D>*>(z);
  auto* to = static_cast<E4m3<D>*>(codes);
  for (size_t block = 0; block < blocks; ++block) {
    uint32_t largest = 0;
    for (int i = 0; i < kSharers<D>; ++i) largest = std::max(largest, largest_of(from[block * kSharers<D> + i]));
    scales[block] = static_cast<uint8_t>(scale_of(largest));
    for (int i = 0; i < kSharers<D>; ++i) {
      const size_t at = block * kSharers<D> + i;
      to[at] = encoded(from[at], scales[block]);
      static_cast<Pack<D>*>(back)[at] = numbers_of<D, Reads::z>(Raw<D>{in_place<D>(to[at]), scales[block]}, Keeps::fp8);
    }
  }
}

template <Dtype D>
void mark_as(const uint8_t* right, const void* y, void* marks, size_t n) {
  const auto* from = static_cast<const Memory<D>*>(y);
  for (size_t i = 0; i < n; ++i) static_cast<Memory<D>*>(marks)[i] = marked<D>(right[i], from[i]);
}

using Run = void (*)(int, const void*, const void*, const void*, void*, void*, double*, size_t, double, double);

template <Dtype D>
Run run_of(int activation) {
#define RUN(A) run_as<act::A, D>,
  static constexpr Run runs[] = {FASTBP_FOR_EACH_ACTIVATION(RUN)};
  return runs[activation];
}

// Shared memory in the 128-byte swizzle: bits 4 to 6 of an address are exchanged by bits 7 to 9.
uint32_t swizzled(uint32_t address) { return address ^ ((address >> 7 & 7) << 4); }

// A box of 64 numbers in each of `rows` rows, as the tensor memory accelerator lays it out.
void load_box(std::vector<char>& shared, uint32_t to, const int16_t* from, int rows, int stride) {
  for (int r = 0; r < rows; ++r) {
    for (int i = 0; i < kDepth; ++i) memcpy(&shared[swizzled(to + 128 * r + 2 * i)], from + r * stride + i, 2);
  }
}

// What a descriptor says of number `i` of a step of the reduction: by rows of steps, or by steps.
int16_t number_at(const std::vector<char>& shared, uint64_t descriptor, int i, int step, bool by_steps) {
  const auto field = [&](int bit) { return static_cast<uint32_t>(descriptor >> bit & 0x3fff) << 4; };
  const uint32_t start = field(0), leading = field(16), stride = field(32);
  const uint32_t at = by_steps ? start + i / 64 * leading + i % 64 * 2 + step / 8 * stride + step % 8 * 128
                               : start + i / 8 * stride + i % 8 * 128 + step * 2;
  int16_t number;
  memcpy(&number, &shared[swizzled(at)], 2);
  return number;
}

}  // namespace

extern "C" {

void run(int activation, int dtype, int form, const void* a, const void* b, const void* c, void* out, void* out2,
         double* sums, size_t packs, double p0, double p1) {
  const Run of[] = {run_of<Dtype::float64>(activation), run_of<Dtype::float32>(activation),
                    run_of<Dtype::bfloat16>(activation), run_of<Dtype::float16>(activation)};
  of[dtype](form, a, b, c, out, out2, sums, packs, p0, p1);
}

void side(int activation, int dtype, bool forward, bool in_codes, const void* a, const void* b, void* codes, void* out,
          float* wide_y, double* sums, size_t packs) {
  const Side of[] = {nullptr, side_of<Dtype::float32>(activation), side_of<Dtype::bfloat16>(activation),
                     side_of<Dtype::float16>(activation)};
  of[dtype](forward, in_codes, a, b, codes, out, wide_y, sums, packs);
}

void e4m3(int dtype, const void* z, void* codes, uint8_t* scales, void* back, size_t blocks) {
  constexpr decltype(&e4m3_as<Dtype::float32>) of[] = {nullptr, e4m3_as<Dtype::float32>, e4m3_as<Dtype::bfloat16>,
                                                       e4m3_as<Dtype::float16>};
  of[dtype](z, codes, scales, back, blocks);
}

void mark(int dtype, const uint8_t* right, const void* y, void* marks, size_t n) {
  constexpr decltype(&mark_as<Dtype::float32>) of[] = {nullptr, mark_as<Dtype::float32>, mark_as<Dtype::bfloat16>,
                                                       mark_as<Dtype::float16>};
  of[dtype](right, y, marks, n);
}

// A tile of whole numbers, out (128 × 128) = A (128 × 64) B, by the way of the kernel: B is 128 × 64, or by steps 64 ×
// 128. `parts` is 16, or 8 where the tile holds two results side by side, which come one after the other. Returns
// whether each result was written once.
bool product(const int16_t* a, const int16_t* b, bool by_steps, int parts, int16_t* out) {
  constexpr uint32_t stage = 2048;
  std::vector<char> shared(stage + kStageBytes), tile(kTile * kTile * 2);
  load_box(shared, stage, a, kTile, kDepth);
  for (int half = 0; half < 2; ++half) {  // by the blocks of a cluster
    const uint32_t to = stage + kOperandBytes + half * kHalfBytes;
    if (by_steps) {
      load_box(shared, to, b + half * 64, kDepth, kTile);
    } else {
      load_box(shared, to, b + half * 64 * kDepth, 64, kDepth);
    }
  }
  for (int warp = 0; warp < 4; ++warp) {
    for (int half = 0; half < 2; ++half) {
      for (int sixteen = 0; sixteen < 8; ++sixteen) {
        int16_t registers[32][4][2];
        uint32_t rows[32];
        for (int lane = 0; lane < 32; ++lane) {
          rows[lane] = part_at(stored_row(half, warp, lane), stored_part(sixteen, lane));
          for (int number = 0; number < 8; ++number) {
            const int r = register_row(0, warp, lane, 8 * sixteen + number);
            const int column = register_column(lane, 8 * sixteen + number);
            int sum = 0;
            for (int step = 0; step < kDepth; ++step) {
              sum += number_at(shared, a_at(stage, half, step / 16), r, step % 16, false) *
                     number_at(shared, b_at(stage, step / 16, by_steps), column, step % 16, by_steps);
            }
            registers[lane][number / 2][number % 2] = static_cast<int16_t>(sum);
          }
        }
        // stmatrix: lane 8 i + r names row r of matrix i, whose numbers 2 c and 2 c + 1 lane 4 r + c has in register i
        for (int lane = 0; lane < 32; ++lane) {
          for (int c = 0; c < 4; ++c) memcpy(&tile[rows[lane] + 4 * c], registers[lane % 8 * 4 + c][lane / 8], 4);
        }
      }
    }
  }
  std::vector<int> written(kTile * kTile);
  for (int warp = 0; warp < 4; ++warp) {
    for (int pass = 0; pass < parts; ++pass) {
      for (int lane = 0; lane < 32; ++lane) {
        for (int part = lane % parts; part < 16; part += parts) {
          const int row = pass_row(pass, warp, lane, parts);
          memcpy(out + row * kTile + part * 8, &tile[part_at(row, part)], 16);
          for (int i = 0; i < 8; ++i) ++written[row * kTile + part * 8 + i];
        }
      }
    }
  }
  for (int times : written) {
    if (times != 1) return false;
  }
  return true;
}

// Both blocks' tiles, numbered; -1 twice where two are the same or one is outside.
void tiles(int row_pairs, int columns, int* rows_and_columns) {
  for (int number = 0; number < row_pairs * columns; ++number) {
    for (int rank = 0; rank < 2; ++rank) {
      const Place place = tile_at(number, row_pairs, columns, rank);
      *rows_and_columns++ = place.row;
      *rows_and_columns++ = place.column;
    }
  }
}
}
