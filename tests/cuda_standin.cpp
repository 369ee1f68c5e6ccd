// A GPU's part in a call, played by the host: the launches of csrc/cuda as plain loops over the same device functions,
// on tensors of the CPU. What is under test is everything around them, csrc/cuda/calls.cpp and layers.cpp.
#include "cuda_standin.h"

#include <torch/csrc/stable/library.h>

#include <cstring>
#include <stdexcept>
#include <vector>

#include "cpu/call.h"
#include "cpu/checks.h"
#include "cuda/calls.h"
#include "cuda/cublaslt.h"
#include "cuda/device.h"
#include "cuda/hopper.h"
#include "cuda/numbers.h"
#include "cuda/route.h"

using torch::stable::Tensor;

extern "C" cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t) {
  memset(to, value, bytes);
  return cudaSuccess;
}

namespace fastbp::cuda {

void check(bool fine, const char* what) {
  if (!fine) throw std::runtime_error(what);
}
void check_cuda(cudaError_t) {}
void check_launches() {}
OnDevice::OnDevice(int32_t) {}
const Properties& properties_of(int32_t) {
  static const Properties properties{90, 4};
  return properties;
}
cudaStream_t current_stream(int32_t) { return nullptr; }

namespace {

int64_t fused = 0;  // products so far

template <class A, Dtype D>
void launch_as(const Activation& activation, const Value& v) {
  const Bound<A, Compute<D>> f(activation.params[0], activation.params[1]);
  for (int64_t i = 0; i < v.size; ++i) {
    put(v.y, i, v.up ? gated_value(f, one<D>(v.gate, i), one<D>(v.up, i)) : value(f, one<D>(v.gate, i)));
  }
}

template <class A, Dtype D>
void launch_as(const Activation& activation, const CompressedValue& v) {
  if constexpr (D != Dtype::float64) {
    const Bound<A, Compute<D>> f(activation.params[0], activation.params[1]);
    const Keeps given = v.scales[0] ? Keeps::fp8 : Keeps::z;
    for (int64_t i = 0; i < v.m; ++i) {
      std::vector<Memory<D>> gate, up;
      for (int64_t j = 0; j < v.n; ++j) {
        gate.push_back(numbers_of<D, Reads::z>(kept_one<D>(v.gate, v.scales[0], given, i, j, v.n, v.n), given).at[0]);
        if (!v.up) continue;
        up.push_back(numbers_of<D, Reads::z>(kept_one<D>(v.up, v.scales[1], given, i, j, v.n, v.n), given).at[0]);
      }
      value_of_row<A, D>(f, i, gate, up, v.keeps, v.y, v.kept, v.beside);
    }
  }
}

template <class A, Dtype D>
void launch_as(const Activation& activation, const ChainRule& rule) {
  const Bound<A, Compute<D>> f(activation.params[0], activation.params[1]);
  if (rule.sums) memset(rule.sums, 0, sizeof(Sum<D>) * rule.strips.strips * rule.n);
  for (int64_t i = 0; i < rule.m; ++i) {
    for (int64_t j = 0; j < rule.n; ++j) {
      const auto d = one<D>(rule.dh, i * rule.dh_stride + j * rule.dh_column_stride);
      const auto r = kept_one<D>(rule.kept, rule.beside, rule.keeps, i, j, rule.n, rule.stride);
      Sum<D> sums[Pack<D>::size] = {};
      if (rule.h) put(rule.h, i * rule.n + j, value(f, numbers_of<D, Reads::z>(r, rule.keeps)));
      put(rule.dz, i * rule.n + j, grad_one(f, d, r, rule.keeps, sums));
      add_to<D>(rule.sums, i / rule.strips.rows * rule.n + j, sums[0]);
    }
  }
}

template <class A, Dtype D>
void launch_as(const Activation& activation, const GatedChainRule& rule) {
  const Bound<A, Compute<D>> f(activation.params[0], activation.params[1]);
  for (void* sums : {rule.gate_sums, rule.up_sums}) {
    if (sums) memset(sums, 0, sizeof(Sum<D>) * rule.strips.strips * rule.n);
  }
  for (int64_t i = 0; i < rule.m; ++i) {
    for (int64_t j = 0; j < rule.n; ++j) {
      const auto d = one<D>(rule.dh, i * rule.dh_stride + j * rule.dh_column_stride);
      const int64_t to = i * rule.n + j, sum = i / rule.strips.rows * rule.n + j;
      const auto part = [&](const void* kept, const void* scales) {
        return kept ? numbers_of<D, Reads::z>(kept_one<D>(kept, scales, rule.keeps, i, j, rule.n, rule.stride),
                                              rule.keeps)
                    : Pack<D>{};
      };
      const auto g = part(rule.gate, rule.gate_scales), u = part(rule.up, rule.up_scales);
      Sum<D> gate_sums[Pack<D>::size] = {}, up_sums[Pack<D>::size] = {};
      if (rule.h) put(rule.h, to, gated_value(f, g, u));
      const auto both = gated_grad(f, d, g, u, gate_sums, up_sums);
      put(rule.dgate, to, both.gate);
      put(rule.dup, to, both.up);
      add_to<D>(rule.gate_sums, sum, gate_sums[0]);
      add_to<D>(rule.up_sums, sum, up_sums[0]);
    }
  }
}

// One number of A B, A by rows; B by rows of the reduction's steps, or by steps.
template <Dtype D>
Pack<D> product_at(const Product& p, const Operand& b, bool by_steps, int64_t i, int64_t j, const void* bias) {
  float sum = 0;
  for (int64_t k = 0; k < p.k; ++k) {
    sum += plain(wide(one<D>(p.a.data, i * p.a.stride + k).at[0])) *
           plain(wide(one<D>(b.data, by_steps ? k * b.stride + j : j * b.stride + k).at[0]));
  }
  if (bias) sum += plain(wide(one<D>(bias, j).at[0]));
  Pack<D> pack{};
  pack.at[0] = rounded<D>(Compute<D>(sum));
  return pack;
}

template <class A, Dtype D>
void launch_as(const Activation& activation, const Product& p) {
  if constexpr (sizeof(Memory<D>) == 2) {
    const Bound<A, Compute<D>> f(activation.params[0], activation.params[1]);
    for (float* sums : {p.sums, p.sums2}) {
      if (sums) memset(sums, 0, sizeof(float) * ((p.m + kTileRows - 1) / kTileRows) * p.n);
    }
    const bool backward = p.kind == Product::dgrad || p.kind == Product::gated_dgrad;
    for (int64_t i = 0; i < p.m; ++i) {
      std::vector<Memory<D>> gate, up;
      for (int64_t j = 0; j < p.n; ++j) {
        const int64_t at = i * p.n + j, sum = i / kTileRows * p.n + j;
        const auto z = product_at<D>(p, p.b, backward, i, j, p.bias);
        float sums[8] = {}, sums2[8] = {};
        if (!backward) {
          gate.push_back(z.at[0]);
          if (p.keeps == Keeps::z) put(p.first, at, z);
          if (p.kind == Product::forward) continue;
          const auto u = product_at<D>(p, p.b2, false, i, j, p.bias2);
          up.push_back(u.at[0]);
          if (p.keeps == Keeps::z) put(p.second, at, u);
          continue;
        }
        const auto r = kept_one<D>(p.gate, p.gate_beside, p.keeps, i, j, p.n, p.n);
        const auto g = numbers_of<D, Reads::z>(r, p.keeps);
        if (p.kind == Product::dgrad) {
          if (p.y) put(p.y, at, value(f, g));
          put(p.first, at, grad_one(f, z, r, p.keeps, sums));
        } else {
          const auto u = numbers_of<D, Reads::z>(kept_one<D>(p.up, p.up_beside, p.keeps, i, j, p.n, p.n), p.keeps);
          if (p.y) put(p.y, at, gated_value(f, g, u));
          const auto both = gated_grad(f, z, g, u, sums, sums2);
          put(p.first, at, both.gate);
          put(p.second, at, both.up);
        }
        add_to<D>(p.sums, sum, sums[0]);
        add_to<D>(p.sums2, sum, sums2[0]);
      }
      void *kept[] = {p.first, p.second}, *beside[] = {p.first_beside, p.second_beside};
      if (!backward) value_of_row<A, D>(f, i, gate, up, p.keeps, p.y, kept, beside);
    }
    ++fused;
  }
}

template <class Pass, Dtype D>
void launch_of(const Activation& activation, const Pass& pass) {
  using Launcher = void (*)(const Activation&, const Pass&);
#define FASTBP_LAUNCHER(A) launch_as<act::A, D>,
  static constexpr Launcher launchers[] = {FASTBP_FOR_EACH_ACTIVATION(FASTBP_LAUNCHER)};
  launchers[activation.number](activation, pass);
}

template <class Pass>
void launch_for(const Activation& activation, const Pass& pass) {
  constexpr void (*of[])(const Activation&, const Pass&) = {
      launch_of<Pass, Dtype::float64>, launch_of<Pass, Dtype::float32>, launch_of<Pass, Dtype::bfloat16>,
      launch_of<Pass, Dtype::float16>};
  of[static_cast<int>(activation.dtype)](activation, pass);
}

template <Dtype D>
void column_sum_of(const void* sums, void* out, int64_t strips, int64_t n) {
  for (int64_t j = 0; j < n; ++j) {
    Sum<D> total = 0;
    for (int64_t i = 0; i < strips; ++i) total += static_cast<const Sum<D>*>(sums)[i * n + j];
    static_cast<Memory<D>*>(out)[j] = rounded<D>(static_cast<Compute<D>>(total));
  }
}

}  // namespace

void launch(const Activation& activation, const Value& value, cudaStream_t) { launch_for(activation, value); }
void launch(const Activation& activation, const CompressedValue& value, cudaStream_t) { launch_for(activation, value); }
void launch(const Activation& activation, const ChainRule& rule, cudaStream_t) { launch_for(activation, rule); }
void launch(const Activation& activation, const GatedChainRule& rule, cudaStream_t) { launch_for(activation, rule); }
void launch_product(const Activation& activation, const Product& product, int, cudaStream_t) {
  launch_for(activation, product);
}
void launch_column_sum(Dtype dtype, const void* sums, void* out, int64_t strips, int64_t n, cudaStream_t) {
  constexpr void (*of[])(const void*, void*, int64_t, int64_t) = {
      column_sum_of<Dtype::float64>, column_sum_of<Dtype::float32>, column_sum_of<Dtype::bfloat16>,
      column_sum_of<Dtype::float16>};
  of[static_cast<int>(dtype)](sums, out, strips, n);
}

Strips strips_of(int64_t m, int64_t, Dtype, int) { return {3, std::max<int64_t>(1, (m + 2) / 3)}; }

// Any sizes but no strange strides.
const char* product_refusal(const Product& product, Dtype dtype, int) {
  const bool sixteen = dtype == Dtype::bfloat16 || dtype == Dtype::float16;
  const bool dense = product.a.stride > 0 && product.b.stride > 0 && (!product.b2.data || product.b2.stride > 0);
  return sixteen && dense && product.m * product.n * product.k > 0 ? nullptr : "not in the stand-in";
}

const char* library_refusal(const Activation& activation, const Product& product) {
  const bool one = product.kind == Product::forward || product.kind == Product::dgrad;
  if (activation.number != number_of_gelu_tanh || !one || product.keeps != Keeps::z) return "not cuBLASLt's";
  return product_refusal(product, activation.dtype, 90);
}

// Every third product is one that cuBLASLt turns out not to know.
bool launch_library_product(const Activation& activation, const Product& given, int32_t, void*, cudaStream_t) {
  static int calls = 0;
  if (++calls % 3 == 0) return false;
  Product product = given;
  std::vector<float> sums((product.m + kTileRows - 1) / kTileRows * product.n);
  if (product.bias_gradient) product.sums = sums.data();
  launch_for(activation, product);
  if (product.bias_gradient) {
    launch_column_sum(activation.dtype, sums.data(), product.bias_gradient, (product.m + kTileRows - 1) / kTileRows,
                      product.n, nullptr);
  }
  return true;
}

int64_t fused_products() { return fused; }

}  // namespace fastbp::cuda

STABLE_TORCH_LIBRARY(fastbp_standin, m) {
  m.def("absent() -> Tensor");
  m.def("set_debug(bool poison) -> ()");
  m.def("set_cuda_route(str route) -> ()");
  m.def("fused_products() -> int");
  m.def("forward(Tensor x, Tensor[] tensors, int settings, float[] params) -> Tensor[]");
  m.def("backward(Tensor dy, Tensor[] saved, int settings, float[] params, bool[] needs) -> Tensor[]");
}

void set_debug(bool poison) { fastbp::cpu::poison = poison; }

STABLE_TORCH_LIBRARY_IMPL(fastbp_standin, CompositeExplicitAutograd, m) {
  m.impl("absent", TORCH_BOX(&fastbp::cpu::absent));
  m.impl("set_debug", TORCH_BOX(&set_debug));
  m.impl("set_cuda_route", TORCH_BOX(&fastbp::cuda::force_route));
  m.impl("fused_products", TORCH_BOX(&fastbp::cuda::fused_products));
}

STABLE_TORCH_LIBRARY_IMPL(fastbp_standin, CPU, m) {
  m.impl("forward", TORCH_BOX(&fastbp::cuda::forward));
  m.impl("backward", TORCH_BOX(&fastbp::cuda::backward));
}
