// The primitives of fastbp/formulas.py for C++ and CUDA, on float or double.
#pragma once

#include <cmath>

#ifdef __CUDACC__
#define HD __host__ __device__ __forceinline__
#else
#define HD inline __attribute__((always_inline))
#endif

// A namespace of their own keeps them apart from the C library's functions and from the activations of the same names.
namespace fastbp::prim {

template <class T>
HD T absolute(T x) {
  return std::abs(x);
}

template <class T>
HD T exp(T x) {
  return std::exp(x);
}

template <class T>
HD T expm1(T x) {
  return std::expm1(x);
}

template <class T>
HD T log1p(T x) {
  return std::log1p(x);
}

// max(a, b) with b a number: written so that a NaN in a stays.
template <class T>
HD T maximum(T a, T b) {
  return a < b ? b : a;
}

// min(a, b) with b a number: written so that a NaN in a stays.
template <class T>
HD T minimum(T a, T b) {
  return a > b ? b : a;
}

// Φ(x), as PyTorch's GELU has it.
template <class T>
HD T normal_cdf(T x) {
  return T(0.5) * (T(1) + std::erf(x * T(0.7071067811865476)));
}

// Φ'(x).
template <class T>
HD T normal_pdf(T x) {
  return T(0.3989422804014327) * std::exp(T(-0.5) * x * x);
}

template <class T>
HD T select(bool condition, T a, T b) {
  return condition ? a : b;
}

template <class T>
HD T sigmoid(T x) {
  return T(1) / (T(1) + std::exp(-x));
}

template <class T>
HD T sqrt(T x) {
  return std::sqrt(x);
}

template <class T>
HD T tanh(T x) {
  return std::tanh(x);
}

// (1 + tanh x) / 2.
template <class T>
HD T tanh_cdf(T x) {
  return T(0.5) * (T(1) + std::tanh(x));
}

// Its derivative.
template <class T>
HD T tanh_pdf(T x) {
  const T t = std::tanh(x);
  return T(0.5) * (T(1) - t * t);
}

}  // namespace fastbp::prim
