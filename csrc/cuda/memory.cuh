// How packs come and go in the elementwise kernels, and what is kept beside them.
//
// Memory is the limit, so every access is of 16 bytes where addresses and sizes allow it, and each thread has several
// under way before it computes. Where they do not allow it (an odd number of columns, a view that begins anywhere, a
// gradient of any strides), the same packs are gathered and scattered number by number.
#pragma once

#include "compressed.h"

namespace fastbp::cuda {

constexpr int kThreads = 128, kLanes = 32, kWarps = kThreads / kLanes;
constexpr int kFlat = 4;  // packs of a thread in the flat kernel
// Rows that a warp of the chain rule has under way; one where packs are gathered, which takes registers.
constexpr int kRowsAtOnce = 4, kGatedAtOnce = 2;

// Blocks of a multiprocessor at least: twelve warps have 48 KB under way, which is enough; float64's exp and erf need
// the registers of eight. Said to the compiler, which else aims higher and spills.
template <Dtype D>
constexpr int kBlocks = D == Dtype::float64 ? 2 : 3;

// Numbers [first, first + size) of a row as a pack; beyond `count` 0. `whole` says that one access does it.
template <Dtype D>
__device__ Pack<D> load(const Memory<D>* row, int64_t first, int64_t count, int64_t stride, bool whole) {
  if (whole) return load_pack<D>(row + first);
  Pack<D> pack;
#pragma unroll
  for (int i = 0; i < pack.size; ++i) {
    pack.at[i] = first + i < count ? row[(first + i) * stride] : static_cast<Memory<D>>(0.0f);
  }
  return pack;
}

template <Dtype D>
__device__ void store(Memory<D>* row, int64_t first, int64_t count, const Pack<D>& pack, bool whole) {
  if (whole) {
    store_pack(row + first, pack);
    return;
  }
#pragma unroll
  for (int i = 0; i < pack.size; ++i) {
    if (first + i < count) row[first + i] = pack.at[i];
  }
}

// Bytes [first, first + sizeof(W)) of a row as a word; beyond `count` 0.
template <class W>
__device__ W load_bytes(const void* row, int64_t first, int64_t count, bool whole) {
  const auto* from = static_cast<const uint8_t*>(row) + first;
  if (whole) return *reinterpret_cast<const W*>(from);
  W word = 0;
#pragma unroll
  for (int i = 0; i < static_cast<int>(sizeof(W)); ++i) {
    if (first + i < count) word |= static_cast<W>(static_cast<W>(from[i]) << (8 * i));
  }
  return word;
}

template <class W>
__device__ void store_bytes(void* row, int64_t first, int64_t count, W word, bool whole) {
  auto* to = static_cast<uint8_t*>(row) + first;
  if (whole) {
    *reinterpret_cast<W*>(to) = word;
    return;
  }
#pragma unroll
  for (int i = 0; i < static_cast<int>(sizeof(W)); ++i) {
    if (first + i < count) to[i] = static_cast<uint8_t>(word >> (8 * i));
  }
}

// `column` is inside of the row.
template <Dtype D, Reads READS>
__device__ Raw<D> load_kept(const void* kept, const void* beside, Keeps keeps, int64_t row, int64_t stride,
                            int64_t column, int64_t n, bool whole) {
  Raw<D> raw;
  if (D != Dtype::float64 && READS == Reads::z && keeps == Keeps::fp8) {
    const auto* codes = static_cast<const uint8_t*>(kept) + row * n;
    raw.numbers = in_place<D>(load_bytes<E4m3<D>>(codes, column, n, whole));
    raw.beside = static_cast<const uint8_t*>(beside)[row * scales_size(n) + column / kBlock];
    return raw;
  }
  raw.numbers = load<D>(static_cast<const Memory<D>*>(kept) + row * stride, column, n, 1, whole);
  if (READS == Reads::side && keeps == Keeps::bits) {
    const int64_t bytes = bits_size(n);
    raw.beside = load_bytes<Bits<D>>(static_cast<const uint8_t*>(beside) + row * bytes, column / 2, bytes, whole);
  }
  return raw;
}

template <class... P>
bool all_at(uintptr_t bytes, P... pointers) {
  return ((reinterpret_cast<uintptr_t>(pointers) % bytes == 0) && ...);
}

}  // namespace fastbp::cuda
