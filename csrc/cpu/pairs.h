// Small networks in bfloat16 on a CPU that multiplies it: as panels.h, with rows of bfloat16 where that has panels of
// the compute type. Every product reads two steps of its reduction as one pair, so rows have an even length, filled up
// with a zero.
#pragma once

#include "panels.h"

namespace fastbp::cpu {

using Word = uint16_t;
using Words = Panel<Word>;

inline const Elementwise& loops() { return kernels<float>().of[static_cast<int>(Dtype::bfloat16)]; }

inline Word* word_at(const Out& out, int64_t row) { return static_cast<Word*>(out.at(row, 0)); }

inline bool is_pair_aligned(const void* address) { return reinterpret_cast<uintptr_t>(address) % sizeof(float) == 0; }

// The rows of a tensor where they lie, if they may be read in pairs; else copied.
inline Words words_of(const Rows& rows, int64_t r, int64_t count, Word* copy, int64_t stride) {
  const int64_t n = rows.size;
  if (rows.dense() && n % 2 == 0 && rows.row_stride() % 2 == 0 && is_pair_aligned(rows.at(0, 0))) {
    return {static_cast<const Word*>(rows.at(r, 0)), rows.row_stride()};
  }
  if (rows.coded()) rows.decode_own(r, count, copy, stride);
  for (int64_t i = 0; i < count; ++i) {
    Word* to = copy + i * stride;
    for (int64_t j = 0; j < n && !rows.coded(); ++j) to[j] = *static_cast<const Word*>(rows.at(r + i, j));
    to[n] = 0;
  }
  return {copy, stride};
}

// The weights of a call, in pairs along the reduction of the forward or of the backward product.
class PairedWeights {
 public:
  PairedWeights(const Call& call, bool transposed, Scratch& scratch) {
    const auto& k = kernels<float>();
    const auto pack = k.pack[static_cast<int>(Dtype::float32)];
    for (int64_t i = 0; i < call.linears(); ++i) {
      const Weight& w = call.weights[i];
      biases_.push_back(transposed ? read_bias<float>(call.biases[i], scratch) : nullptr);
      const int64_t columns = transposed ? w.out : w.in, depth = ((transposed ? w.in : w.out) + 1) / 2;
      weights_.push_back({nullptr, depth, columns});
      if (!w.any) continue;
      float* to = scratch.take<float>(depth * round_up(columns, k.tile_columns));
      weights_.back().data = to;
      // Rows of pairs: where they lie, or copied and filled up to an even length.
      Scratch here;
      const Word* rows = static_cast<const Word*>(w.data);
      int64_t length = w.out_stride;
      if (w.in_stride != 1 || w.in % 2 || length % 2 || !is_pair_aligned(w.data)) {
        length = round_up(w.in, 2);
        Word* copy = here.take<Word>(w.out * length);
        for (int64_t n = 0; n < w.out; ++n) {
          for (int64_t c = 0; c < w.in; ++c) copy[n * length + c] = rows[n * w.out_stride + c * w.in_stride];
          if (length > w.in) copy[n * length + w.in] = 0;
        }
        rows = copy;
      }
      if (transposed) {
        pack(depth, columns, rows, 1, length / 2, to);
      } else {
        float* pairs = here.take<float>(depth * columns);
        for (int64_t p = 0; p < depth; ++p) {
          const Word* even = rows + 2 * p * length;
          k.pair_rows(columns, even, 2 * p + 1 < w.out ? even + length : nullptr, pairs + p * columns);
        }
        pack(depth, columns, pairs, columns, 1, to);
      }
    }
  }

  // A W + bias as rows of words, filled up to an even length; plus `c` where there is one.
  void multiply(int64_t linear, int64_t rows, Words a, Word* to, int64_t to_stride, float* c = nullptr,
                int64_t c_stride = 0) const {
    const int64_t n = weights_[linear].columns;
    product(linear, rows, a, {c, c_stride, c != nullptr, to, to_stride});
    for (int64_t i = 0; i < rows && n % 2 && to_stride > n; ++i) to[i * to_stride + n] = 0;
  }
  // The same, to rows of floats.
  void multiply(int64_t linear, int64_t rows, Words a, float* c, int64_t c_stride) const {
    product(linear, rows, a, {c, c_stride, false, nullptr, 0});
  }

 private:
  struct Matrix {
    const float* data;
    int64_t depth, columns;
  };
  struct Target {
    float* c;
    int64_t c_stride;
    bool accumulate;
    Word* words;
    int64_t words_stride;
  };

  void product(int64_t linear, int64_t rows, Words a, Target t) const {
    const auto& k = kernels<float>();
    const auto& w = weights_[linear];
    k.multiply_pairs({rows, w.columns, w.depth, reinterpret_cast<const float*>(a.data), a.stride / 2, false, 0, w.data,
                      k.tile_columns, k.tile_columns * w.depth, t.c, t.c_stride, biases_[linear], t.accumulate, t.words,
                      t.words_stride});
  }

  std::vector<Matrix> weights_;
  std::vector<const float*> biases_;
};

// A panel's work space: rows of words and of floats, `room` numbers apart.
struct Space {
  Space(const Call& call, Scratch& scratch)
      : scratch(scratch), room(round_up(widest(call), kernels<float>().tile_columns) + 32) {}
  Word* words() { return scratch.take<Word>(kPanel * room); }
  float* floats() { return scratch.take<float>(kPanel * room); }
  Scratch& scratch;
  int64_t room;
};

// The output of a hidden layer from what its linears kept; and its bits, where the policy keeps them.
inline void output(const Call& call, int64_t rows, int64_t n, const Words* z, Word* to, int64_t to_stride,
                   uint8_t* bits = nullptr) {
  if (call.settings.from_side()) {
    const auto value = call.compressed().value[call.settings.activation];
    if (n % 2 == 0 && z[0].stride == n && to_stride == n) return value(rows * n, z[0].data, to, bits);
    for (int64_t i = 0; i < rows; ++i) {
      value(n, z[0].data + i * z[0].stride, to + i * to_stride, bits ? bits + i * bits_size(n) : nullptr);
      if (n % 2 && to_stride > n) to[i * to_stride + n] = 0;
    }
    return;
  }
  if (!call.settings.gated) {
    const auto value = loops().value[call.settings.activation];
    if (z[0].stride == n && to_stride == n) return value(rows * n, z[0].data, to, call.settings.params);
    for (int64_t i = 0; i < rows; ++i) {
      value(n, z[0].data + i * z[0].stride, to + i * to_stride, call.settings.params);
      if (n % 2 && to_stride > n) to[i * to_stride + n] = 0;
    }
    return;
  }
  const auto value = loops().gated_value[call.settings.activation];
  for (int64_t i = 0; i < rows; ++i) {
    value(n, z[0].data + i * z[0].stride, z[1].data + i * z[1].stride, to + i * to_stride, call.settings.params);
    if (n % 2 && to_stride > n) to[i * to_stride + n] = 0;
  }
}

}  // namespace fastbp::cpu
