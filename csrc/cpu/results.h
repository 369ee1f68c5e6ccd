// What forward returns: y and the residuals of the policy, to be filled in.
#pragma once

#include "call.h"

namespace fastbp::cpu {

// Of a hidden linear; nothing where the policy keeps none. `h` and `bits` are the layer's.
struct Kept {
  Out z, h;
  Bytes bits, codes, scales;
};

// Columns [c, c + n) of a row of z in fp8, where that is kept; the numbers are those that the dtype has.
inline void encode(const Compressed& loops, const Kept& to, int64_t r, int64_t c, int64_t n, const void* z) {
  if (to.codes) loops.encode(n, z, to.codes.over(r, c), to.scales.over(r, c / kBlock));
}

class Results {
 public:
  explicit Results(const Call& call) {
    const Settings& settings = call.settings;
    tensors.reserve(1 + 2 * call.linears());
    kept_.resize(call.hidden() * call.width());
    y = numbers(call, call.weights.back().out);
    for (size_t i = 0; i < kept_.size(); ++i) {
      const int64_t n = call.weights[i].out;
      if (settings.keeps_z()) kept_[i].z = numbers(call, n);
      if (settings.keeps_h()) kept_[i].h = numbers(call, n);
      if (settings.keeps_bits()) kept_[i].bits = bytes(call, bits_size(n));
      if (!settings.keeps_fp8()) continue;
      kept_[i].codes = bytes(call, n);
      kept_[i].scales = bytes(call, scales_size(n));
    }
  }

  const Kept& operator[](int64_t linear) const { return kept_[linear]; }

  template <class S>
  void encode(const Compressed& loops, int64_t linear, int64_t r, int64_t rows, int64_t c, int64_t n, const S* z,
              int64_t stride) const {
    for (int64_t i = 0; i < rows; ++i) cpu::encode(loops, kept_[linear], r + i, c, n, z + i * stride);
  }

  std::vector<Tensor> tensors;  // y and the residuals, in the order of saving.find_residuals
  Out y;

 private:
  Out numbers(const Call& call, int64_t size) {
    tensors.push_back(call.make(size));
    return Out(tensors.back());
  }
  Bytes bytes(const Call& call, int64_t size) {
    tensors.push_back(empty_bytes(call.leading.data(), static_cast<int64_t>(call.leading.size()), size));
    return Bytes(tensors.back());
  }

  std::vector<Kept> kept_;
};

}  // namespace fastbp::cpu
