// The products of one capability, and how numbers come to them. Compiled once for each, see kernels.h.
#include "gemm.h"
#include "gemv.h"

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

// What reads or writes matrices of T.
template <class T, class S>
static void fill_for(Kernels<S>& t, Dtype dtype) {
  const int i = static_cast<int>(dtype);
  t.pack[i] = pack<T, S>;
  t.dots[i] = dots<T, S>;
  t.add_scaled[i] = add_scaled<T, S>;
  t.outer[i] = outer<T, S>;
}

void fill_products(Kernels<float>& t);
void fill_products(Kernels<double>& t);
void fill_products(Kernels<float>& t) {
  fill(t);
#if defined(__AVX512BF16__)
  t.multiply_pairs = multiply<float, Pairs>;
#endif
  t.pair_rows = pair_rows;
  fill_for<float>(t, Dtype::float32);
  fill_for<BFloat16>(t, Dtype::bfloat16);
  fill_for<Half>(t, Dtype::float16);
}
void fill_products(Kernels<double>& t) {
  fill(t);
  fill_for<double>(t, Dtype::float64);
}

}  // namespace fastbp::cpu::FASTBP_CAPABILITY
