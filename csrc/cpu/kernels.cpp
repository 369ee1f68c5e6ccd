// The kernels of one capability: this file is compiled once for each, with FASTBP_CAPABILITY naming it and the
// compiler's flags for its instruction set.
#include "kernels.h"

#include "convert.h"
#include "gemm.h"
#include "math.h"

namespace fastbp::cpu::FASTBP_CAPABILITY {

// f on the numbers of one to three rows, the last ones by way of a whole register.
template <class S, class F, class... Rows>
HD void map(int64_t n, S* to, F f, const Rows*... from) {
  constexpr int size = Vec<S>::size;
  int64_t i = 0;
  for (; i + size <= n; i += size) f(Vec<S>::load(from + i)...).store(to + i);
  if (i < n) f(Vec<S>::load(from + i, n - i)...).store(to + i, n - i);
}

// An activation's form with its parameters, as many as the row has.
template <class A, class S, class F>
HD auto bound(F form, const double* params) {
  return [=](auto... inputs) {
    if constexpr (A::num_params == 0) {
      return form(inputs...);
    } else if constexpr (A::num_params == 1) {
      return form(inputs..., Vec<S>(S(params[0])));
    } else {
      return form(inputs..., Vec<S>(S(params[0])), Vec<S>(S(params[1])));
    }
  };
}

template <class A, class S>
static void value(int64_t n, const S* z, S* y, const double* params) {
  map(n, y, bound<A, S>([](auto... a) { return A::value(a...); }, params), z);
}

template <class A, class S>
static void grad(int64_t n, const S* dy, const S* z, S* dz, const double* params) {
  map(n, dz, bound<A, S>([](auto... a) { return A::grad(a...); }, params), dy, z);
}

template <class A, class S>
static void grad_from_output(int64_t n, const S* dy, const S* y, S* dz, const double* params) {
  map(n, dz, bound<A, S>([](auto... a) { return A::grad_from_output(a...); }, params), dy, y);
}

template <class A, class S>
static typename Kernels<S>::Grad grad_from_output_if_any() {
  if constexpr (A::has_grad_from_output) {
    return grad_from_output<A, S>;
  } else {
    return nullptr;
  }
}

template <class S>
static void times(int64_t n, const S* a, const S* b, S* product) {
  map(n, product, [](auto x, auto y) { return x * y; }, a, b);
}

// Four sums side by side, which also keeps the roundings of a long column few.
template <class S>
static void add_rows(int64_t rows, int64_t n, const S* a, int64_t stride, S* sum) {
  constexpr int size = Vec<S>::size;
  for (int64_t j = 0; j < n; j += size) {
    const int64_t count = n - j < size ? n - j : size;
    const auto at = [&](int64_t i) {
      return count == size ? Vec<S>::load(a + i * stride + j) : Vec<S>::load(a + i * stride + j, count);
    };
    Vec<S> sums[4] = {S(0), S(0), S(0), S(0)};
    int64_t i = 0;
    for (; i + 4 <= rows; i += 4) {
      FASTBP_UNROLL for (int s = 0; s < 4; ++s) sums[s] = sums[s] + at(i + s);
    }
    for (; i < rows; ++i) sums[i % 4] = sums[i % 4] + at(i);
    const Vec<S> total = (sums[0] + sums[1]) + (sums[2] + sums[3]);
    if (count == size) {
      (Vec<S>::load(sum + j) + total).store(sum + j);
    } else {
      (Vec<S>::load(sum + j, count) + total).store(sum + j, count);
    }
  }
}

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

template <class S>
static Kernels<S> table() {
  Kernels<S> t{};
  t.tile_rows = kTileRows;
  t.tile_columns = kTileColumns<S>;
  t.multiply = multiply<S>;
  if constexpr (sizeof(S) == 8) {
    t.pack[static_cast<int>(Dtype::float64)] = pack<double, double>;
  } else {
    t.pack[static_cast<int>(Dtype::float32)] = pack<float, float>;
    t.pack[static_cast<int>(Dtype::bfloat16)] = pack<BFloat16, float>;
    t.pack[static_cast<int>(Dtype::float16)] = pack<Half, float>;
  }
  t.read = read<S>;
  t.write = write<S>;
  int i = 0;
#define FASTBP_ROW(A)                                           \
  t.value[i] = value<act::A, S>;                                \
  t.grad[i] = grad<act::A, S>;                                  \
  t.grad_from_output[i] = grad_from_output_if_any<act::A, S>(); \
  ++i;
  FASTBP_FOR_EACH_ACTIVATION(FASTBP_ROW)
#undef FASTBP_ROW
  t.times = times<S>;
  t.add_rows = add_rows<S>;
  return t;
}

// Built on the first call, never while the library is loaded: a CPU without these instructions must not run this.
const Kernels<float>* in_float();
const Kernels<double>* in_double();
const Kernels<float>* in_float() {
  static const Kernels<float> kernels = table<float>();
  return &kernels;
}
const Kernels<double>* in_double() {
  static const Kernels<double> kernels = table<double>();
  return &kernels;
}

}  // namespace fastbp::cpu::FASTBP_CAPABILITY
