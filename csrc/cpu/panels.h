// What the small networks' two directions share: panels of rows, and the weights of a call, packed once.
#pragma once

#include <algorithm>

#include "call.h"
#include "parallel.h"
#include "parts.h"

namespace fastbp::cpu {

constexpr int64_t kLargeSums = 128 << 10;  // bytes

// Rows of numbers in memory: a part of a tensor, or a copy of it in the compute type.
template <class S>
struct Panel {
  const S* data = nullptr;
  int64_t stride = 0;
};

// The rows of a tensor where they lie, or read into `copy`, which has room for rows `stride` apart.
template <class S>
Panel<S> panel_of(const Rows& rows, int64_t r, int64_t count, S* copy, int64_t stride) {
  const S* dense = rows.dense_as<S>();
  // Rows a multiple of 4 KiB apart share a place in the cache.
  if (dense && rows.row_stride() * sizeof(S) % 4096 != 0) return {dense + r * rows.row_stride(), rows.row_stride()};
  rows.read(r, count, 0, rows.size, copy, stride);
  return {copy, stride};
}

// dx, to be filled in where it is wanted.
inline Out make_dx(const Call& call, const std::vector<bool>& wanted, std::vector<Maybe>& grads) {
  if (!wanted[0]) return Out();
  grads[0] = call.make(call.weights[0].in);
  return Out(*grads[0]);
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

  // C = A W (+ C) + bias for the weight of a linear. One sum over a long reduction would have twice the error of sums
  // of its parts.
  void multiply(int64_t linear, int64_t rows, Panel<S> a, S* c, int64_t c_stride, bool accumulate = false) const {
    const auto& k = kernels<S>();
    const auto& w = weights_[linear];
    const int64_t step = equal_part(std::max<int64_t>(w.depth, 1), kStep, 1);
    int64_t p = 0;
    do {  // once even where the depth is 0: C is then the bias
      const int64_t steps = std::min(step, w.depth - p);
      const bool last = p + steps == w.depth;
      k.multiply({rows, w.columns, steps, a.data + p, a.stride, false, 0, w.data + p * k.tile_columns, k.tile_columns,
                  k.tile_columns * w.depth, c, c_stride, last ? biases_[linear] : nullptr, accumulate || p > 0});
      p += steps;
    } while (p < w.depth);
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

// Sums of the weights' and biases' gradients: a set for each chunk of rows, which do not depend on who takes them.
template <class S>
class Sums {
 public:
  struct Set {
    S* weights;
    double* biases;
  };

  Sums(const Call& call, const std::vector<bool>& wanted, double work, Scratch& scratch)
      : call_(call), wanted_(wanted), places_(wanted.size()) {
    for (size_t i = 1; i < wanted.size(); ++i) {
      int64_t& total = is_weight(i) ? weights_ : biases_;
      places_[i] = total;
      if (wanted[i]) total += size(i);
    }
    threads_ = threads_for(work);
    panels_ = (call.rows + kPanel - 1) / kPanel;
    // More chunks than threads even out what else the machine does, where their sums are small beside the rest.
    const int64_t per_thread = weights_ * static_cast<int64_t>(sizeof(S)) > kLargeSums ? 1 : 4;
    chunks_ = std::max<int64_t>(1, std::min(panels_, threads_ > 1 ? per_thread * threads_ : 1));
    sums_ = {scratch.take<S>(chunks_ * weights_), scratch.take<double>(chunks_ * biases_)};
  }

  // f(set of sums, first row, rows) over all panels.
  template <class F>
  void for_panels(const F& f) const {
    for_each(chunks_, threads_, [&](int64_t chunk) {
      const Set own = of(chunk);
      std::fill_n(own.weights, weights_, S(0));
      std::fill_n(own.biases, biases_, 0.0);
      for (int64_t p = panels_ * chunk / chunks_; p < panels_ * (chunk + 1) / chunks_; ++p) {
        f(own, p * kPanel, std::min(kPanel, call_.rows - p * kPanel));
      }
    });
  }

  S* weight(const Set& own, int64_t linear) const { return own.weights + places_[1 + linear]; }
  double* bias(const Set& own, int64_t linear) const { return own.biases + places_[1 + call_.linears() + linear]; }

  // The sums of all chunks, as the gradients they are.
  void finish(std::vector<Maybe>& grads) const {
    const auto& k = kernels<S>();
    for (int64_t chunk = 1; chunk < chunks_; ++chunk) {
      k.add(weights_, of(chunk).weights, sums_.weights);
      for (int64_t i = 0; i < biases_; ++i) sums_.biases[i] += of(chunk).biases[i];
    }
    for (size_t i = 1; i < wanted_.size(); ++i) {
      if (!wanted_[i]) continue;
      if (is_weight(i)) {
        const Weight& w = weight_of(i);
        grads[i] = empty_matrix(w.out, w.in, call_.dtype);
        k.write(call_.dtype, size(i), sums_.weights + places_[i], grads[i]->mutable_data_ptr());
      } else {
        grads[i] = call_.template make_bias_gradient<S>(sums_.biases + places_[i], size(i));
      }
    }
  }

 private:
  Set of(int64_t chunk) const { return {sums_.weights + chunk * weights_, sums_.biases + chunk * biases_}; }
  bool is_weight(size_t i) const { return static_cast<int64_t>(i) <= call_.linears(); }
  const Weight& weight_of(size_t i) const { return call_.weights[(i - 1) % call_.linears()]; }
  int64_t size(size_t i) const { return is_weight(i) ? weight_of(i).out * weight_of(i).in : weight_of(i).out; }

  const Call& call_;
  const std::vector<bool>& wanted_;
  std::vector<int64_t> places_;
  int64_t weights_ = 0, biases_ = 0, threads_, panels_, chunks_;
  Set sums_;
};

}  // namespace fastbp::cpu
