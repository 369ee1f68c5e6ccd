// C = A B, a tile at a time: the micro-kernel, and the packing of B.
//
// A tile is MR rows by NR columns of C, held in registers over the whole reduction. B comes packed, NR columns side by
// side, so that it is read in order; A is read where it lies. The scheme is that of Goto and van de Geijn, "Anatomy of
// high-performance matrix multiplication" (2008), with A left unpacked because its panels are short-lived.
#pragma once

#include "convert.h"

namespace fastbp::cpu::FASTBP_CAPABILITY {

// Rows of a tile: as many as leave registers for two vectors of B and a number of A.
constexpr int kTileRows = FASTBP_VECTOR_BYTES == 64 ? 12 : 6;

template <class S>
constexpr int kTileColumns = 2 * Vec<S>::size;

// Where a tile of A lies: row-major (rows `stride` apart) or by columns (steps of the reduction `stride` apart).
enum class Order { rows, columns };

// How a number of A and a register of B come to a sum.
template <class S>
struct Numbers {
  using Lanes = typename Vec<S>::Lanes;
  static HD Lanes add(Lanes sum, S number, Lanes b) { return sum + number * b; }
};

#if defined(__AVX512BF16__)
// Two bfloat16 in the place of a float: two steps of the reduction in one.
struct Pairs {
  using Lanes = Vec<float>::Lanes;
  static HD Lanes add(Lanes sum, float pair, Lanes b) {
    const auto a = _mm512_set1_ps(pair);
    return reinterpret_cast<Lanes>(
        _mm512_dpbf16_ps(reinterpret_cast<__m512>(sum), reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b)));
  }
};
#endif

template <class S, class Arithmetic, int R, Order order>
static void tile(int64_t depth, const S* a, int64_t stride, const S* b, int64_t b_stride, S* c, int64_t c_stride,
                 const S* bias, bool accumulate, int64_t columns) {
  using V = Vec<S>;
  typename V::Lanes low[R], high[R];
  FASTBP_UNROLL for (int i = 0; i < R; ++i) low[i] = high[i] = typename V::Lanes{};
  constexpr int kTriples = (R + 2) / 3;
  const S* rows[kTriples];
  FASTBP_UNROLL for (int j = 0; j < kTriples; ++j) rows[j] = a + 3 * j * stride;
  for (int64_t p = 0; p < depth; ++p) {
    const auto b_low = V::load(b).v, b_high = V::load(b + V::size).v;
    FASTBP_UNROLL for (int i = 0; i < R; ++i) {
      // Row 3j + r lies r strides behind row 3j: four addresses and one stride serve twelve rows.
      const S number = order == Order::rows ? rows[i / 3][(i % 3) * stride] : a[i];
      low[i] = Arithmetic::add(low[i], number, b_low);
      high[i] = Arithmetic::add(high[i], number, b_high);
    }
    if (order == Order::rows) {
      FASTBP_UNROLL for (int j = 0; j < kTriples; ++j)++ rows[j];
    }
    if (order == Order::columns) a += stride;
    b += b_stride;
  }
  const bool whole = columns == kTileColumns<S>;
  const int64_t left = columns < V::size ? columns : V::size, right = columns - left;
  V bias_low(S(0)), bias_high(S(0));
  if (bias) {
    bias_low = whole ? V::load(bias) : V::load(bias, left);
    bias_high = whole ? V::load(bias + V::size) : V::load(bias + V::size, right);
  }
  FASTBP_UNROLL for (int i = 0; i < R; ++i) {
    S* to = c + i * c_stride;
    V first = V(low[i]) + bias_low, second = V(high[i]) + bias_high;
    if (whole) {
      if (accumulate) {
        first = first + V::load(to);
        second = second + V::load(to + V::size);
      }
      first.store(to);
      second.store(to + V::size);
    } else {
      if (accumulate) {
        first = first + V::load(to, left);
        second = second + V::load(to + V::size, right);
      }
      first.store(to, left);
      second.store(to + V::size, right);
    }
  }
}

// The same for a number of rows that is known only now: a last tile of few rows costs no more than it must.
template <class S, class Arithmetic, Order order, int R = kTileRows>
static void tile_of(int rows, int64_t depth, const S* a, int64_t stride, const S* b, int64_t b_stride, S* c,
                    int64_t c_stride, const S* bias, bool accumulate, int64_t columns) {
  if constexpr (R > 1) {
    if (rows < R) {
      return tile_of<S, Arithmetic, order, R - 1>(rows, depth, a, stride, b, b_stride, c, c_stride, bias, accumulate,
                                                  columns);
    }
  }
  tile<S, Arithmetic, R, order>(depth, a, stride, b, b_stride, c, c_stride, bias, accumulate, columns);
}

template <class S, class Arithmetic>
static void multiply(const Product<S>& p) {
  constexpr int64_t width = kTileColumns<S>;
  for (int64_t j = 0; j < p.columns; j += width) {  // a tile of columns of B stays in the cache for all rows of A
    const int64_t columns = p.columns - j < width ? p.columns - j : width;
    const S* b = p.b + j / width * p.b_tile;
    const S* bias = p.bias ? p.bias + j : nullptr;
    for (int64_t i = 0; i < p.rows; i += kTileRows) {
      const int rows = p.rows - i < kTileRows ? p.rows - i : kTileRows;
      S* c = p.c + i * p.c_stride + j;
      if (p.a_by_columns) {
        tile_of<S, Arithmetic, Order::columns>(rows, p.depth, p.a + i / kTileRows * p.a_tile, p.a_stride, b, p.b_stride,
                                               c, p.c_stride, bias, p.accumulate, columns);
      } else {
        tile_of<S, Arithmetic, Order::rows>(rows, p.depth, p.a + i * p.a_stride, p.a_stride, b, p.b_stride, c,
                                            p.c_stride, bias, p.accumulate, columns);
      }
    }
  }
}

// Exchange the blocks of s × s numbers beside the diagonal of rows i and i + s; after s = 1, 2, 4, ... all rows are
// columns.
template <int s, class S>
HD void exchange(Vec<S>& a, Vec<S>& b) {
  constexpr int size = Vec<S>::size;
  typename Vec<S>::Bits low, high;
  FASTBP_UNROLL for (int i = 0; i < size; ++i) {
    low[i] = i & s ? size + i - s : i;
    high[i] = i & s ? size + i : i + s;
  }
#if defined(__clang__)
  typename Vec<S>::Lanes first, second;
  for (int i = 0; i < size; ++i) first[i] = i & s ? b.v[i - s] : a.v[i];
  for (int i = 0; i < size; ++i) second[i] = i & s ? b.v[i] : a.v[i + s];
#else
  const auto first = __builtin_shuffle(a.v, b.v, low), second = __builtin_shuffle(a.v, b.v, high);
#endif
  a = Vec<S>(first);
  b = Vec<S>(second);
}

template <int s, class S>
HD void transpose(Vec<S> (&rows)[Vec<S>::size]) {
  if constexpr (s < Vec<S>::size) {
    FASTBP_UNROLL for (int i = 0; i < Vec<S>::size; ++i) {
      if (!(i & s)) exchange<s>(rows[i], rows[i + s]);
    }
    transpose<2 * s>(rows);
  }
}

template <class T, class S>
static void pack(int64_t depth, int64_t columns, const void* source, int64_t depth_stride, int64_t column_stride,
                 S* to) {
  constexpr int64_t width = kTileColumns<S>, size = Vec<S>::size;
  for (int64_t j = 0; j < columns; j += width, to += depth * width) {
    const int64_t count = columns - j < width ? columns - j : width;
    const T* from = static_cast<const T*>(source) + j * column_stride;
    if (column_stride == 1 && count == width) {
      for (int64_t p = 0; p < depth; ++p) {
        const T* row = from + p * depth_stride;
        load<T, S>(row).store(to + p * width);
        load<T, S>(row + size).store(to + p * width + size);
      }
      continue;
    }
    int64_t p = 0;
    if (depth_stride == 1 && count == width) {
      for (; p + size <= depth; p += size) {
        for (int64_t half = 0; half < width; half += size) {
          Vec<S> rows[size];
          FASTBP_UNROLL for (int i = 0; i < size; ++i) rows[i] = load<T, S>(from + (half + i) * column_stride + p);
          transpose<1>(rows);
          FASTBP_UNROLL for (int i = 0; i < size; ++i) rows[i].store(to + (p + i) * width + half);
        }
      }
    }
    for (; p < depth; ++p) {
      read_row<T, S>(count, from + p * depth_stride, column_stride, to + p * width);
      for (int64_t i = count; i < width; ++i) to[p * width + i] = 0;
    }
  }
}

}  // namespace fastbp::cpu::FASTBP_CAPABILITY
