// The elementwise loops of one capability. Compiled once for each, see kernels.h.
//
// An activation is a long chain of dependent operations, so four registers go through it side by side: written here,
// and interleaved by the compiler's scheduler (setup.py turns it on; it halves the time of erf's gradient).
#include "convert.h"
#include "math.h"

namespace fastbp::cpu::FASTBP_CAPABILITY {

// f on the numbers of one to three rows of T, computed in S; the last ones by way of a whole register.
template <class T, class S, class F, class... Rows>
HD void map(int64_t n, T* to, F f, const Rows*... from) {
  constexpr int size = Vec<S>::size, side = 4;
  int64_t i = 0;
  for (; i + side * size <= n; i += side * size) {
    Vec<S> results[side];
    FASTBP_UNROLL for (int j = 0; j < side; ++j) results[j] = f(load<T, S>(from + i + j * size)...);
    FASTBP_UNROLL for (int j = 0; j < side; ++j) store<T, S>(results[j], to + i + j * size);
  }
  for (; i + size <= n; i += size) store<T, S>(f(load<T, S>(from + i)...), to + i);
  if (i < n) store<T, S>(f(load<T, S>(from + i, n - i)...), to + i, n - i);
}

// The same for an f with several results. All of a step is read before anything is written: a result may lie where an
// input does.
template <class T, class S, int results, class F, class... Rows>
HD void map_to(int64_t n, T* const (&to)[results], F f, const Rows*... from) {
  constexpr int size = Vec<S>::size, side = 2;
  int64_t i = 0;
  for (; i + side * size <= n; i += side * size) {
    Vec<S> found[side][results];
    FASTBP_UNROLL for (int j = 0; j < side; ++j) f(found[j], load<T, S>(from + i + j * size)...);
    FASTBP_UNROLL for (int j = 0; j < side; ++j) {
      FASTBP_UNROLL for (int k = 0; k < results; ++k) store<T, S>(found[j][k], to[k] + i + j * size);
    }
  }
  for (; i < n; i += size) {
    const int64_t count = n - i < size ? n - i : size;
    Vec<S> found[results];
    f(found, load<T, S>(from + i, count)...);
    FASTBP_UNROLL for (int k = 0; k < results; ++k) store<T, S>(found[k], to[k] + i, count);
  }
}

// An activation's form with its parameters, as many as the row has.
template <class A, class S, class F>
HD auto bound(F form, const double* params) {
  return [=](auto... inputs) {
    [[maybe_unused]] const auto number = [](double x) { return Vec<S>(static_cast<typename Vec<S>::Number>(x)); };
    if constexpr (A::num_params == 0) {
      return form(inputs...);
    } else if constexpr (A::num_params == 1) {
      return form(inputs..., number(params[0]));
    } else {
      return form(inputs..., number(params[0]), number(params[1]));
    }
  };
}

template <class A, class T, class S>
static void value(int64_t n, const void* z, void* y, const double* params) {
  map<T, S>(n, static_cast<T*>(y), bound<A, S>([](auto... a) { return A::value(a...); }, params),
            static_cast<const T*>(z));
}

template <class A, class T, class S>
static void grad(int64_t n, const void* dy, const void* z, void* dz, const double* params) {
  map<T, S>(n, static_cast<T*>(dz), bound<A, S>([](auto... a) { return A::grad(a...); }, params),
            static_cast<const T*>(dy), static_cast<const T*>(z));
}

template <class A, class T, class S>
static void value_and_grad(int64_t n, const void* dy, const void* z, void* y, void* dz, const double* params) {
  const auto value = bound<A, S>([](auto... a) { return A::value(a...); }, params);
  const auto grad = bound<A, S>([](auto... a) { return A::grad(a...); }, params);
  const auto both = [&](Vec<S>* found, Vec<S> dy, Vec<S> z) {
    found[0] = value(z);
    found[1] = grad(dy, z);
  };
  map_to<T, S>(n, {static_cast<T*>(y), static_cast<T*>(dz)}, both, static_cast<const T*>(dy), static_cast<const T*>(z));
}

template <class A, class T, class S>
static void grad_from_output(int64_t n, const void* dy, const void* y, void* dz, const double* params) {
  map<T, S>(n, static_cast<T*>(dz), bound<A, S>([](auto... a) { return A::grad_from_output(a...); }, params),
            static_cast<const T*>(dy), static_cast<const T*>(y));
}

template <class A, class T, class S>
static void gated_value(int64_t n, const void* g, const void* u, void* y, const double* params) {
  const auto value = bound<A, S>([](auto... a) { return A::value(a...); }, params);
  map<T, S>(
      n, static_cast<T*>(y), [&](auto gate, auto up) { return value(gate) * up; }, static_cast<const T*>(g),
      static_cast<const T*>(u));
}

template <class A, class T, class S>
static void gated_grad(int64_t n, const void* dh, const void* g, const void* u, void* dg, void* du,
                       const double* params) {
  const auto value = bound<A, S>([](auto... a) { return A::value(a...); }, params);
  const auto grad = bound<A, S>([](auto... a) { return A::grad(a...); }, params);
  const T *d = static_cast<const T*>(dh), *gates = static_cast<const T*>(g), *ups = static_cast<const T*>(u);
  if (dg && du) {
    const auto both = [&](Vec<S>* found, Vec<S> x, Vec<S> gate, Vec<S> up) {
      found[0] = grad(x * up, gate);
      found[1] = x * value(gate);
    };
    map_to<T, S>(n, {static_cast<T*>(dg), static_cast<T*>(du)}, both, d, gates, ups);
  } else if (dg) {
    map<T, S>(n, static_cast<T*>(dg), [&](auto x, auto gate, auto up) { return grad(x * up, gate); }, d, gates, ups);
  } else {
    map<T, S>(n, static_cast<T*>(du), [&](auto x, auto gate) { return x * value(gate); }, d, gates);
  }
}

template <class A, class T, class S>
static void gated_value_and_grad(int64_t n, const void* dh, const void* g, const void* u, void* h, void* dg, void* du,
                                 const double* params) {
  const auto value = bound<A, S>([](auto... a) { return A::value(a...); }, params);
  const auto grad = bound<A, S>([](auto... a) { return A::grad(a...); }, params);
  const auto all = [&](Vec<S>* found, Vec<S> x, Vec<S> gate, Vec<S> up) {
    const Vec<S> activated = value(gate);
    found[0] = activated * up;
    found[1] = grad(x * up, gate);
    found[2] = x * activated;
  };
  map_to<T, S>(n, {static_cast<T*>(h), static_cast<T*>(dg), static_cast<T*>(du)}, all, static_cast<const T*>(dh),
               static_cast<const T*>(g), static_cast<const T*>(u));
}

template <class A, class T, class S>
static Elementwise::Grad grad_from_output_if_any() {
  if constexpr (A::has_grad_from_output) {
    return grad_from_output<A, T, S>;
  } else {
    return nullptr;
  }
}

// Up to sixty-four rows are added in four sums side by side, and these to a double, so that the roundings of a long
// column stay few.
template <class T, class S>
static void add_rows(int64_t rows, int64_t n, const void* numbers, int64_t stride, double* sums) {
  constexpr int64_t size = Vec<S>::size, block = 64;
  for (int64_t j = 0; j < n; j += size) {
    const int64_t count = n - j < size ? n - j : size;
    const T* column = static_cast<const T*>(numbers) + j;
    const auto at = [&](int64_t i) {
      return count == size ? load<T, S>(column + i * stride) : load<T, S>(column + i * stride, count);
    };
    for (int64_t i = 0; i < rows;) {
      const int64_t end = rows - i < block ? rows : i + block;
      Vec<S> part[4] = {S(0), S(0), S(0), S(0)};
      for (; i + 4 <= end; i += 4) {
        FASTBP_UNROLL for (int s = 0; s < 4; ++s) part[s] = part[s] + at(i + s);
      }
      for (; i < end; ++i) part[i % 4] = part[i % 4] + at(i);
      S total[size];
      ((part[0] + part[1]) + (part[2] + part[3])).store(total);
      for (int64_t lane = 0; lane < count; ++lane) sums[j + lane] += static_cast<double>(total[lane]);
    }
  }
}

template <class S>
static void add(int64_t n, const S* a, S* sum) {
  map<S, S>(n, sum, [](auto x, auto y) { return x + y; }, sum, a);
}

// In S; sums are of the type Sum.
template <class T, class S, class Sum = S>
static Elementwise elementwise() {
  Elementwise t{};
  int i = 0;
#define FASTBP_ROW(A)                                              \
  t.value_and_grad[i] = value_and_grad<act::A, T, S>;              \
  t.gated_value_and_grad[i] = gated_value_and_grad<act::A, T, S>;  \
  t.value[i] = value<act::A, T, S>;                                \
  t.grad[i] = grad<act::A, T, S>;                                  \
  t.grad_from_output[i] = grad_from_output_if_any<act::A, T, S>(); \
  t.gated_value[i] = gated_value<act::A, T, S>;                    \
  t.gated_grad[i] = gated_grad<act::A, T, S>;                      \
  ++i;
  FASTBP_FOR_EACH_ACTIVATION(FASTBP_ROW)
#undef FASTBP_ROW
  t.add_rows = add_rows<T, Sum>;
  return t;
}

void fill_elementwise(Kernels<float>& t);
void fill_elementwise(Kernels<double>& t);
void fill_elementwise(Kernels<float>& t) {
  t.of[static_cast<int>(Dtype::float32)] = elementwise<float, float>();
  t.of[static_cast<int>(Dtype::bfloat16)] = elementwise<BFloat16, Coarse, float>();
  t.of[static_cast<int>(Dtype::float16)] = elementwise<Half, Coarse, float>();
  t.add = add<float>;
}
void fill_elementwise(Kernels<double>& t) {
  t.of[static_cast<int>(Dtype::float64)] = elementwise<double, double>();
  t.add = add<double>;
}

}  // namespace fastbp::cpu::FASTBP_CAPABILITY
