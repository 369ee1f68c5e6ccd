// The products of one capability, and how numbers come to them. Compiled once for each, see kernels.h.
#include "gemm.h"

namespace fastbp::cpu::FASTBP_CAPABILITY {

template <class S>
static void read(Dtype dtype, int64_t n, const void* from, int64_t stride, S* to) {
  switch (dtype) {
    case Dtype::bfloat16:
      if constexpr (sizeof(S) == 4) return read_row<BFloat16, S>(n, from, stride, to);
      return;
    case Dtype::float16:
      if constexpr (sizeof(S) == 4) return read_row<Half, S>(n, from, stride, to);
      return;
    default:
      return read_row<S, S>(n, from, stride, to);
  }
}

template <class S>
static void write(Dtype dtype, int64_t n, const S* from, void* to) {
  switch (dtype) {
    case Dtype::bfloat16:
      if constexpr (sizeof(S) == 4) return write_row<BFloat16, S>(n, from, to);
      return;
    case Dtype::float16:
      if constexpr (sizeof(S) == 4) return write_row<Half, S>(n, from, to);
      return;
    default:
      return write_row<S, S>(n, from, to);
  }
}

// Two rows of bfloat16 as one of pairs; the second may be missing.
static void pair_rows(int64_t n, const uint16_t* even, const uint16_t* odd, float* pairs) {
  constexpr int size = Vec<float>::size;
  const auto words = [](const uint16_t* from) { return longer(*reinterpret_cast<const WordsAnywhere*>(from)); };
  int64_t i = 0;
  for (; i + size <= n; i += size) {
    Vec<float>::of(words(even + i) | (odd ? words(odd + i) << 16 : Bits32{})).store(pairs + i);
  }
  for (; i < n; ++i) {
    const uint32_t pair = even[i] | (odd ? static_cast<uint32_t>(odd[i]) << 16 : 0);
    __builtin_memcpy(pairs + i, &pair, sizeof pair);
  }
}

template <class S>
static void fill(Kernels<S>& t) {
  t.tile_rows = kTileRows;
  t.tile_columns = kTileColumns<S>;
  t.multiply = multiply<S, Numbers<S>>;
  t.read = read<S>;
  t.write = write<S>;
}

void fill_products(Kernels<float>& t);
void fill_products(Kernels<double>& t);
void fill_products(Kernels<float>& t) {
  fill(t);
#if defined(__AVX512BF16__)
  t.multiply_pairs = multiply<float, Pairs>;
#endif
  t.pair_rows = pair_rows;
  t.pack[static_cast<int>(Dtype::float32)] = pack<float, float>;
  t.pack[static_cast<int>(Dtype::bfloat16)] = pack<BFloat16, float>;
  t.pack[static_cast<int>(Dtype::float16)] = pack<Half, float>;
}
void fill_products(Kernels<double>& t) {
  fill(t);
  t.pack[static_cast<int>(Dtype::float64)] = pack<double, double>;
}

}  // namespace fastbp::cpu::FASTBP_CAPABILITY
