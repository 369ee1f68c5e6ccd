// One hidden layer each way, by the route that serves: allocation, launches, and what PyTorch does itself.
#pragma once

#include "../cpu/call.h"
#include "../cpu/needs.h"
#include "device.h"
#include "hopper.h"
#include "route.h"

namespace fastbp::cuda {

using cpu::Call;
using cpu::Maybe;
using cpu::Needs;
using cpu::Rows;
using cpu::Save;
using torch::stable::Tensor;

// dz of a layer's linears, the layer's output again, and the bias gradients; absent where nobody asked.
struct Slope {
  Maybe dz[2], h, db[2];
};

class Layers {
 public:
  explicit Layers(const Call& call);

  // y = f(x Wᵀ + b), or f(g) · u; x (..., K), y (..., N); of a call that is given z, or g and u, from these. And what
  // the policy keeps of each linear: z or its codes, or y; and bits or scales beside it.
  struct Forward {
    Tensor y;
    Maybe kept[2], beside[2];
  };
  Forward forward(const Tensor& x, const Tensor* weights, const Maybe* biases) const;

  // f(z), or f(g) · u, (..., N) of what was kept of a hidden layer.
  Tensor value(int64_t layer) const;

  // What backward makes of a hidden layer, of rows of dh. Which of it is wanted:
  struct Wanted {
    bool dz[2], db[2], h;
    bool any() const { return dz[0] || dz[1]; }
  };
  Slope chain_rule(const Tensor& dh, int64_t layer, const Wanted& wanted, bool over_dh) const;
  // The same of dh = d W, W the linear above.
  Slope dgrad(const Tensor& d, const Tensor& weight, int64_t layer, const Wanted& wanted) const;

 private:
  bool forward_fused(const Tensor& x, const Tensor* weights, const Maybe* biases, Forward& found) const;
  // The tensors that forward keeps, but for z of PyTorch's making: y (..., N) of `sizes` is there.
  void make_kept(const std::vector<int64_t>& sizes, Forward& found) const;
  Tensor make(const std::vector<int64_t>& sizes, Dtype dtype) const;
  Tensor make_bytes(std::vector<int64_t> sizes, int64_t last) const;
  void launch_rows(CompressedValue& value, int64_t n) const;
  void poison(const Tensor& tensor, int64_t bytes) const;
  Tensor like(const Tensor& tensor) const;
  Maybe total(const Maybe& sums) const;
  // Whether the route has a kernel for this product; and its launch, false where it turns out that it has none.
  bool fuses(const Product& product) const;
  bool run(const Product& product) const;
  bool is_identity() const { return call_.settings.activation == 0; }
  Keeps keeps() const;
  // What was kept of a linear, as forward keeps it.
  const Maybe& kept(int64_t linear) const;
  Maybe dense_kept(int64_t linear) const;
  Maybe beside(int64_t linear) const;

  const Call& call_;
  const Properties& properties_;
  cudaStream_t stream_;
  Activation activation_;
  Route route_;
};

// Σ over the rows, by PyTorch.
Tensor column_sum(const Tensor& matrix);

}  // namespace fastbp::cuda
