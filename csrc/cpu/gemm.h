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
  static constexpr bool kToWords = false;
  using Lanes = typename Vec<S>::Lanes;
  static HD Lanes add(Lanes sum, S number, Lanes b) { return sum + number * b; }
};

#if defined(__AVX512BF16__)
// Two bfloat16 in the place of a float: two steps of the reduction in one.
struct Pairs {
  static constexpr bool kToWords = true;  // as a Product may ask
  using Lanes = Vec<float>::Lanes;
  static HD Lanes add(Lanes sum, float pair, Lanes b) {
    const auto a = _mm512_set1_ps(pair);
    return reinterpret_cast<Lanes>(
        _mm512_dpbf16_ps(reinterpret_cast<__m512>(sum), reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b)));
  }
};
#endif

template <class S>
struct Tile {
  int64_t depth;
  const S* a;
  int64_t a_stride;
  const S* b;
  int64_t b_stride;
  S* c;
  int64_t c_stride;
  const S* bias;
  bool accumulate;
  int64_t columns;
  uint16_t* words;
  int64_t words_stride;
};

// R rows by H registers of columns, of which the last may be filled in part.
template <class S, class Arithmetic, Order order, int H, int R>
static void multiply_tile(const Tile<S>& t) {
  using V = Vec<S>;
  typename V::Lanes sums[R][H];
  FASTBP_UNROLL for (int i = 0; i < R; ++i) {
    FASTBP_UNROLL for (int h = 0; h < H; ++h) sums[i][h] = typename V::Lanes{};
  }
  constexpr int kTriples = (R + 2) / 3;
  const S *a = t.a, *b = t.b, *rows[kTriples];
  const int64_t stride = t.a_stride, b_stride = t.b_stride, depth = t.depth;
  FASTBP_UNROLL for (int j = 0; j < kTriples; ++j) rows[j] = a + 3 * j * stride;
  for (int64_t p = 0; p < depth; ++p) {
    typename V::Lanes b_lanes[H];
    FASTBP_UNROLL for (int h = 0; h < H; ++h) b_lanes[h] = V::load(b + h * V::size).v;
    FASTBP_UNROLL for (int i = 0; i < R; ++i) {
      // Row 3j + r lies r strides behind row 3j: four addresses and one stride serve twelve rows.
      const S number = order == Order::rows ? rows[i / 3][(i % 3) * stride] : a[i];
      FASTBP_UNROLL for (int h = 0; h < H; ++h) sums[i][h] = Arithmetic::add(sums[i][h], number, b_lanes[h]);
    }
    if (order == Order::rows) {
      FASTBP_UNROLL for (int j = 0; j < kTriples; ++j) rows[j] += 1;
    }
    if (order == Order::columns) a += stride;
    b += b_stride;
  }
  const int64_t last = t.columns - (H - 1) * V::size;  // numbers in the last register
  FASTBP_UNROLL for (int h = 0; h < H; ++h) {
    const bool whole = h < H - 1 || last == V::size;
    const auto load = [&](const S* from) { return whole ? V::load(from) : V::load(from, last); };
    const V bias = t.bias ? load(t.bias + h * V::size) : V(S(0));
    FASTBP_UNROLL for (int i = 0; i < R; ++i) {
      S* to = t.c + i * t.c_stride + h * V::size;
      V sum = V(sums[i][h]) + bias;
      if (t.accumulate) sum = sum + load(to);
      if constexpr (Arithmetic::kToWords) {
        if (t.words) {
          auto* word = reinterpret_cast<BFloat16*>(t.words + i * t.words_stride + h * V::size);
          if (whole) {
            store(sum, word);
          } else {
            store(sum, word, last);
          }
          continue;
        }
      }
      if (whole) {
        sum.store(to);
      } else {
        sum.store(to, last);
      }
    }
  }
}

// The same for a number of rows that is known only now: a last tile of few rows costs no more than it must.
template <class S, class Arithmetic, Order order, int H, int R = kTileRows>
static void multiply_rows(int rows, const Tile<S>& t) {
  if constexpr (R > 1) {
    if (rows < R) return multiply_rows<S, Arithmetic, order, H, R - 1>(rows, t);
  }
  multiply_tile<S, Arithmetic, order, H, R>(t);
}

template <class S, class Arithmetic, Order order>
static void multiply_as(const Product<S>& p) {
  constexpr int64_t width = kTileColumns<S>;
  for (int64_t j = 0; j < p.columns; j += width) {  // a tile of columns of B stays in the cache for all rows of A
    const int64_t columns = p.columns - j < width ? p.columns - j : width;
    const S* b = p.b + j / width * p.b_tile;
    for (int64_t i = 0; i < p.rows; i += kTileRows) {
      const int rows = p.rows - i < kTileRows ? p.rows - i : kTileRows;
      const S* a = p.a + (order == Order::columns ? i / kTileRows * p.a_tile : i * p.a_stride);
      const Tile<S> tile{p.depth,
                         a,
                         p.a_stride,
                         b,
                         p.b_stride,
                         p.c ? p.c + i * p.c_stride + j : nullptr,
                         p.c_stride,
                         p.bias ? p.bias + j : nullptr,
                         p.accumulate,
                         columns,
                         p.words ? p.words + i * p.words_stride + j : nullptr,
                         p.words_stride};
      if (columns > Vec<S>::size) {
        multiply_rows<S, Arithmetic, order, 2>(rows, tile);
      } else {
        multiply_rows<S, Arithmetic, order, 1>(rows, tile);
      }
    }
  }
}

template <class S, class Arithmetic>
static void multiply(const Product<S>& p) {
  if (p.a_by_columns) {
    multiply_as<S, Arithmetic, Order::columns>(p);
  } else {
    multiply_as<S, Arithmetic, Order::rows>(p);
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
