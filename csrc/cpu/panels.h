// What the small networks' two directions share: panels of rows, and the weights of a call, packed once.
#pragma once

#include <algorithm>

#include "call.h"

namespace fastbp::cpu {

constexpr int64_t kPanel = 96;  // rows; a multiple of every tile

inline int64_t round_up(int64_t a, int64_t b) { return (a + b - 1) / b * b; }

// Rows of numbers in memory: a part of a tensor, or a copy of it in the compute type.
template <class S>
struct Panel {
  const S* data = nullptr;
  int64_t stride = 0;
};

// The rows of a tensor where they lie, or read into `copy`, which has room for rows `stride` apart.
template <class S>
Panel<S> panel_of(const Rows& rows, int64_t r, int64_t count, S* copy, int64_t stride) {
  const S* dense = rows.dense<S>();
  // Rows a multiple of 4 KiB apart share a place in the cache.
  if (dense && rows.row_stride() * sizeof(S) % 4096 != 0) return {dense + r * rows.row_stride(), rows.row_stride()};
  rows.read(r, count, 0, rows.size, copy, stride);
  return {copy, stride};
}

// The weights of a call in the layout that products read, and its biases.
template <class S>
class Packed {
 public:
  Packed(const Call& call, bool transposed, Scratch& scratch) {
    const int64_t tile = kernels<S>().tile_columns;
    for (int64_t i = 0; i < call.linears(); ++i) {
      const Weight& w = call.weights[i];
      const int64_t depth = transposed ? w.in : w.out, columns = transposed ? w.out : w.in;
      S* to = nullptr;
      if (w.any) {
        to = scratch.take<S>(depth * round_up(columns, tile));
        if (transposed) {
          w.pack_transposed(0, depth, 0, columns, to);
        } else {
          w.pack_plain(0, depth, 0, columns, to);
        }
      }
      weights_.push_back({to, depth, columns});
      biases_.push_back(transposed ? read_bias<S>(call.biases[i], scratch) : nullptr);
    }
  }

  // C = A W (+ C) + bias for the weight of a linear.
  void multiply(int64_t linear, int64_t rows, Panel<S> a, S* c, int64_t c_stride, bool accumulate = false) const {
    const auto& k = kernels<S>();
    const auto& w = weights_[linear];
    k.multiply({rows, w.columns, w.depth, a.data, a.stride, false, 0, w.data, k.tile_columns, k.tile_columns * w.depth,
                c, c_stride, biases_[linear], accumulate});
  }

 private:
  struct Matrix {
    const S* data;
    int64_t depth, columns;
  };
  std::vector<Matrix> weights_;
  std::vector<const S*> biases_;
};

inline int64_t widest(const Call& call) {
  int64_t most = 0;
  for (const Weight& w : call.weights) most = std::max({most, w.in, w.out});
  return most;
}

}  // namespace fastbp::cpu
