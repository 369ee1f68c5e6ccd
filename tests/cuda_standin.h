// What the loops of cuda_standin.cpp do with a number and with a row.
#pragma once

#include <vector>

#include "cuda/compressed.h"

namespace fastbp::cuda {

// A number as a pack that holds it in its first place.
template <Dtype D>
Pack<D> one(const void* data, int64_t at) {
  Pack<D> pack{};
  if (data) pack.at[0] = static_cast<const Memory<D>*>(data)[at];
  return pack;
}

template <Dtype D>
void put(void* data, int64_t at, const Pack<D>& pack) {
  if (data) static_cast<Memory<D>*>(data)[at] = pack.at[0];
}

template <Dtype D>
void add_to(void* sums, int64_t at, Sum<D> number) {
  if (sums) static_cast<Sum<D>*>(sums)[at] += number;
}

// What was kept of a number, likewise.
template <Dtype D>
Raw<D> kept_one(const void* kept, const void* beside, Keeps keeps, int64_t i, int64_t j, int64_t n, int64_t stride) {
  const auto* bytes = static_cast<const uint8_t*>(beside);
  if (keeps == Keeps::fp8) {
    const E4m3<D> code = static_cast<const uint8_t*>(kept)[i * n + j];
    return {in_place<D>(code), bytes[i * scales_size(n) + j / kBlock]};
  }
  const uint32_t code = keeps == Keeps::bits ? bytes[i * bits_size(n) + j / 2] >> (j % 2 * 4) & 15 : 0;
  return {one<D>(kept, i * stride + j), code};
}

// dz by what is kept.
template <class A, Dtype D>
Pack<D> grad_one(const Bound<A, Compute<D>>& f, const Pack<D>& d, const Raw<D>& r, Keeps keeps, Sum<D>* sums) {
  if constexpr (reads<A, D>(Reads::y)) {
    if (keeps == Keeps::y) return grad<Reads::y>(f, d, r.numbers, keeps, r.beside, sums);
  }
  if constexpr (reads<A, D>(Reads::side)) {
    if (keeps == Keeps::bits || keeps == Keeps::lowest_bit) {
      return grad<Reads::side>(f, d, r.numbers, keeps, r.beside, sums);
    }
  }
  return grad<Reads::z>(f, d, numbers_of<D, Reads::z>(r, keeps), keeps, r.beside, sums);
}

// Row i of y, and of what a compressed policy keeps.
template <class A, Dtype D>
void value_of_row(const Bound<A, Compute<D>>& f, int64_t i, const std::vector<Memory<D>>& gate,
                  const std::vector<Memory<D>>& up, Keeps keeps, void* y, void* const* kept, void* const* beside) {
  constexpr int width = Pack<D>::size;
  const auto n = static_cast<int64_t>(gate.size());
  const auto pack_of = [&](const std::vector<Memory<D>>& numbers, int64_t first) {
    Pack<D> pack{};
    for (int64_t j = first; j < n && j < first + width; ++j) pack.at[j - first] = numbers[j];
    return pack;
  };
  for (int64_t j = 0; j < n; ++j) {
    uint32_t code = 0;
    put(y, i * n + j,
        value(f, one<D>(gate.data(), j), !up.empty(), up.empty() ? Pack<D>{} : one<D>(up.data(), j), keeps, code));
    if (keeps != Keeps::bits) continue;
    uint8_t& byte = static_cast<uint8_t*>(beside[0])[i * bits_size(n) + j / 2];
    byte = static_cast<uint8_t>(j % 2 ? byte | (code & 15) << 4 : code & 15);
  }
  for (int part = 0; part < 2 && keeps == Keeps::fp8; ++part) {
    if (!kept[part]) continue;
    const auto& z = part == 0 ? gate : up;
    auto *codes = static_cast<uint8_t*>(kept[part]) + i * n, *scales = static_cast<uint8_t*>(beside[part]);
    for (int64_t block = 0; block < n; block += kBlock) {
      uint32_t largest = 0;
      for (int64_t j = block; j < block + kBlock; j += width) largest = std::max(largest, largest_of(pack_of(z, j)));
      const uint32_t scale = scale_of(largest);
      scales[i * scales_size(n) + block / kBlock] = static_cast<uint8_t>(scale);
      for (int64_t j = block; j < n && j < block + kBlock; ++j) {
        codes[j] = static_cast<uint8_t>(encoded(one<D>(z.data(), j), scale));
      }
    }
  }
}

}  // namespace fastbp::cuda
