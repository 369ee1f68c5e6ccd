// Products of a matrix with a vector, the matrix read once and where it lies.
#pragma once

#include "convert.h"

namespace fastbp::cpu::FASTBP_CAPABILITY {

// f(first column, columns) register by register, the last one perhaps in part.
template <class S, class F>
HD void for_registers(int64_t n, F f) {
  constexpr int64_t size = Vec<S>::size;
  int64_t k = 0;
  for (; k + size <= n; k += size) f(k, size);
  if (k < n) f(k, n - k);
}

template <class T, class S>
HD Vec<S> load_some(const T* from, int64_t n) {
  return n == Vec<S>::size ? load<T, S>(from) : load<T, S>(from, n);
}

// R rows side by side.
template <int R, class T, class S>
HD void dot(int64_t n, const T* rows, int64_t stride, const S* x, S* y) {
  Vec<S> sums[R];
  FASTBP_UNROLL for (int r = 0; r < R; ++r) sums[r] = Vec<S>(S(0));
  for_registers<S>(n, [&](int64_t k, int64_t count) {
    const Vec<S> numbers = load_some<S, S>(x + k, count);
    FASTBP_UNROLL for (int r = 0; r < R; ++r) {
      sums[r] = sums[r] + load_some<T, S>(rows + r * stride + k, count) * numbers;
    }
  });
  for (int r = 0; r < R; ++r) {
    S lanes[Vec<S>::size];
    sums[r].store(lanes);
    for (int half = Vec<S>::size / 2; half; half /= 2) {
      for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
    }
    y[r] = lanes[0];
  }
}

template <class T, class S>
static void dots(int64_t rows, int64_t n, const void* matrix, int64_t stride, const S* x, S* y) {
  const T* from = static_cast<const T*>(matrix);
  int64_t i = 0;
  for (; i + 8 <= rows; i += 8) dot<8>(n, from + i * stride, stride, x, y + i);
  for (; i < rows; ++i) dot<1>(n, from + i * stride, stride, x, y + i);
}

template <int R, class T, class S>
HD void add_scaled_rows(int64_t n, const S* d, const T* rows, int64_t stride, S* sum) {
  for_registers<S>(n, [&](int64_t k, int64_t count) {
    Vec<S> total = load_some<S, S>(sum + k, count);
    FASTBP_UNROLL for (int r = 0; r < R; ++r) total =
        total + load_some<T, S>(rows + r * stride + k, count) * Vec<S>(d[r]);
    total.store(sum + k, count);
  });
}

template <class T, class S>
static void add_scaled(int64_t rows, int64_t n, const S* d, const void* matrix, int64_t stride, S* sum) {
  const T* from = static_cast<const T*>(matrix);
  int64_t i = 0;
  for (; i + 8 <= rows; i += 8) add_scaled_rows<8>(n, d + i, from + i * stride, stride, sum);
  for (; i < rows; ++i) add_scaled_rows<1>(n, d + i, from + i * stride, stride, sum);
}

template <class T, class S>
static void outer(int64_t rows, int64_t n, const S* d, const S* x, void* matrix) {
  T* to = static_cast<T*>(matrix);
  for (int64_t i = 0; i < rows; ++i, to += n) {
    for_registers<S>(n, [&](int64_t k, int64_t count) {
      const Vec<S> product = load_some<S, S>(x + k, count) * Vec<S>(d[i]);
      if (count == Vec<S>::size) {
        store<T, S>(product, to + k);
      } else {
        store<T, S>(product, to + k, count);
      }
    });
  }
}

}  // namespace fastbp::cpu::FASTBP_CAPABILITY
