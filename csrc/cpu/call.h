// One call, its tensors seen as rows of numbers. What all ways of computing it share.
#pragma once

#include "rows.h"
#include "scratch.h"

namespace fastbp::cpu {

struct Weight {
  bool any = false;  // false where backward does not read it
  const void* data = nullptr;
  Dtype dtype = Dtype::float32;
  int64_t out = 0, in = 0, out_stride = 0, in_stride = 0;

  // Kept as (in × out), as some models do.
  bool by_columns() const { return out_stride == 1 && in_stride != 1; }
  const void* row(int64_t n) const {
    return static_cast<const char*>(data) + n * out_stride * kItemSize[static_cast<int>(dtype)];
  }
  // A block of Wᵀ (in × out) or of W (out × in), in the layout that multiply reads.
  template <class S>
  void pack_transposed(int64_t k0, int64_t nk, int64_t c0, int64_t nc, S* to) const {
    pack(k0 * in_stride + c0 * out_stride, nk, nc, in_stride, out_stride, to);
  }
  template <class S>
  void pack_plain(int64_t k0, int64_t nk, int64_t c0, int64_t nc, S* to) const {
    pack(k0 * out_stride + c0 * in_stride, nk, nc, out_stride, in_stride, to);
  }

 private:
  template <class S>
  void pack(int64_t offset, int64_t depth, int64_t columns, int64_t depth_stride, int64_t column_stride, S* to) const {
    const int d = static_cast<int>(dtype);
    kernels<S>().pack[d](depth, columns, static_cast<const char*>(data) + offset * kItemSize[d], depth_stride,
                         column_stride, to);
  }
};

enum class Save : int { preact, output, recompute, output_bits, output_lsb, fp8 };  // in the order of saving.py
constexpr int kSaves = 6, kMostRoutes = 5;

struct Settings {
  bool gated, projected, given;  // given: what the one hidden layer's linears would make
  int activation;
  double params[2];
  Save save;
  bool overwrites = false;  // whether z is nobody else's, so that backward may write dz over it
  int route = 0;  // 0 for the written rule, or one more than the number of the way to compute that is asked for

  // Whether backward reads the outputs of the hidden layers; and whether the side of the minimum with them.
  bool from_output() const { return save == Save::output || from_side(); }
  bool from_side() const { return save == Save::output_bits || save == Save::output_lsb; }
  // What is kept besides y, in the order of saving.find_residuals: z of each hidden linear or the output of each hidden
  // layer (that of a layer alone is y), bits, or codes of fp8 and their scales.
  bool keeps_z() const { return save == Save::preact && !given; }
  bool keeps_h() const { return from_output() && projected; }
  bool keeps_bits() const { return save == Save::output_bits; }
  bool keeps_fp8() const { return save == Save::fp8; }
  bool compressed() const { return from_side() || keeps_fp8(); }
};

// Where tensors are: PyTorch's numbers of the device's type and of the device.
struct Device {
  int32_t type = 0, index = 0;
  bool operator==(const Device&) const = default;
};
Device device_of(const Tensor& tensor);

// A call: rows of x, the linears, and what is known of the hidden layers.
//
// Of a given form the hidden layer has the linears that it would have elsewhere, without a weight; what they would have
// made is there from the beginning, as if it had been kept.
struct Call {
  Settings settings;
  Dtype dtype;
  Device device;
  int64_t rows;
  std::vector<int64_t> leading;  // the sizes of x but the last
  Rows x;
  std::vector<Weight> weights;
  std::vector<Maybe> biases;
  // Of the hidden layers, by linear: z, or their outputs, as tensors and as rows; and what compressed policies have. Of
  // fp8 there are `codes` and `scales` for tensors; of output_bits there are `bits` beside the outputs.
  std::vector<Maybe> kept;
  std::vector<Rows> residuals;
  std::vector<Bytes> bits, codes, scales;

  int64_t linears() const { return static_cast<int64_t>(weights.size()); }
  int width() const { return settings.gated ? 2 : 1; }
  // How many of the linears, the first ones, the call does not have.
  int64_t given() const { return settings.given ? width() : 0; }
  // x, or what is given; and the places of gradients, which are those of the inputs, the weights, the biases.
  int64_t inputs() const { return settings.given ? width() : 1; }
  int64_t weight_place(int64_t linear) const { return inputs() + linear - given(); }
  int64_t bias_place(int64_t linear) const { return weight_place(linear) + linears() - given(); }
  int64_t hidden() const { return (linears() - settings.projected) / width(); }
  // The layers: the hidden ones, and the last plain linear as one of its own.
  int64_t layers() const { return hidden() + settings.projected; }
  int parts(int64_t layer) const { return layer < hidden() ? width() : 1; }
  int64_t layer_of(int64_t linear) const { return linear / width() < hidden() ? linear / width() : hidden(); }
  int64_t first(int64_t layer) const { return layer * width(); }

  // The call of rows [r, r + count) alone, as backward sees it.
  Call slice(int64_t r, int64_t count) const {
    Call part = *this;
    part.rows = count;
    part.leading = {count};
    if (x.any()) part.x = x.slice(r, count);
    for (Rows& residual : part.residuals) {
      if (residual.any()) residual = residual.slice(r, count);
    }
    for (auto* all : {&part.bits, &part.codes, &part.scales}) {
      for (Bytes& bytes : *all) bytes.row += r;
    }
    return part;
  }

  // A residual, as a tensor and as rows; nothing where backward does not read it.
  void keep(const Maybe& tensor) {
    kept.push_back(tensor);
    residuals.push_back(tensor ? Rows(*tensor) : Rows());
  }

  // Whether backward computes z of a linear again: nothing was kept of it, and what it takes is there.
  bool replays(int64_t linear) const { return settings.save == Save::recompute && x.any() && weights[linear].any; }

  // Operations of one product with every weight.
  double work() const {
    double sum = 0;
    for (const Weight& w : weights) sum += 2.0 * w.in * w.out;
    return sum * rows;
  }

  // The sums of a bias's gradient as the tensor it is.
  template <class S>
  Tensor make_bias_gradient(const double* sums, int64_t size) const;

  Tensor make(int64_t features) const;  // (..., features), of the call's dtype

  // The loops over numbers of a dtype, and the gradient that goes with what is kept.
  template <class S>
  const Elementwise& loops(Dtype of) const {
    return kernels<S>().of[static_cast<int>(of)];
  }
  Elementwise::Grad grad_of(const Elementwise& loops) const {
    return (settings.save == Save::output ? loops.grad_from_output : loops.grad)[settings.activation];
  }

  // Whether the call's dtype has fewer digits than the compute type.
  template <class S>
  bool rounds() const {
    return kItemSize[static_cast<int>(dtype)] < static_cast<int64_t>(sizeof(S));
  }

  // A row as a tensor of the call's dtype would keep it. Whatever eager PyTorch keeps between two operations, z, h, dh
  // and dz, is rounded where it is: then what overflows there overflows here, and backward sees the z of forward.
  template <class S>
  void round(int64_t n, S* row) const {
    if (!rounds<S>()) return;
    const auto& k = kernels<S>();
    Scratch scratch;
    S* rounded = scratch.take<S>(n);
    k.write(dtype, n, row, rounded);
    k.read(dtype, n, rounded, 1, row);
  }

  // The loops of a compressed policy, over rows of the call's dtype, and over rows of S.
  const Compressed& compressed() const { return kernels<float>().compressed[static_cast<int>(dtype)]; }
  template <class S>
  const Compressed& rounded() const {
    return kernels<S>().rounded[static_cast<int>(dtype)];
  }

  // Rows of a hidden layer's output from its pre-activations (or of what was kept of it), g and u of a gated layer; and
  // where a policy keeps them, its bits, in rows `bits_stride` apart.
  template <class S>
  void output(int64_t rows, int64_t n, const S* const* kept, int64_t kept_stride, S* to, int64_t to_stride,
              uint8_t* bits = nullptr, int64_t bits_stride = 0) const;

  // dz of a hidden layer's linears from rows of dh: dz[0], and dz[1] of a gated layer; either may be null. `kept` is
  // what the layer kept, and null where nothing of it is looked at. `bits` are those of a layer that has some.
  template <class S>
  void slope(int64_t rows, int64_t n, const S* dh, int64_t stride, const S* const* kept, int64_t kept_stride,
             S* const* dz, int64_t dz_stride, const uint8_t* bits = nullptr, int64_t bits_stride = 0) const;
  // The bits of a layer from a place on, or null.
  const uint8_t* bits_at(int64_t layer, int64_t r, int64_t c) const {
    return settings.keeps_bits() ? bits[layer].at(r, c / 2) : nullptr;
  }
  // Columns of what is kept may be written and read apart from multiples of this on.
  int64_t column_unit() const { return settings.keeps_fp8() ? kBlock : settings.keeps_bits() ? 2 : 1; }

  // The input of a layer: x, or the output of the hidden layer beneath it, rebuilt from what was kept.
  template <class S>
  void read_input(int64_t layer, int64_t r, int64_t rows, int64_t c, int64_t n, S* to, int64_t to_stride) const;
  // `slope` with what was kept of columns [c, c + n) of rows from r on.
  template <class S>
  void read_slope(int64_t layer, int64_t r, int64_t rows, int64_t c, int64_t n, const S* dh, int64_t stride,
                  S* const* dz, int64_t dz_stride) const;
};

Dtype dtype_of(const Tensor& tensor);
// A contiguous tensor (*leading, last) to be filled in, of numbers or of bytes, on the CPU if nothing else is said; and
// the two usual cases.
Tensor empty(const int64_t* leading, int64_t count, int64_t last, Dtype dtype, Device device = {});
Tensor empty_bytes(const int64_t* leading, int64_t count, int64_t last, Device device = {});
inline Tensor empty_row(int64_t size, Dtype dtype) { return empty(nullptr, 0, size, dtype); }
inline Tensor empty_matrix(int64_t rows, int64_t columns, Dtype dtype) { return empty(&rows, 1, columns, dtype); }
// A bias as a row of S, or null; the memory lasts as long as the scratch.
template <class S>
const S* read_bias(const Maybe& bias, Scratch& scratch);

}  // namespace fastbp::cpu
