#include "row.h"

#include <algorithm>

#include "needs.h"
#include "panels.h"
#include "results.h"

namespace fastbp::cpu {

namespace {

// Rows of a weight that a thread takes at a time; so many partial sums of dx there are, whoever makes them.
constexpr int64_t kLeastRows = 32, kMostParts = 16;

int64_t parts_of(const Weight& w) { return std::clamp<int64_t>(w.out / kLeastRows, 1, kMostParts); }

// f(part, first row, rows) over the rows of a weight.
template <class F>
void for_parts(const Weight& w, const F& f) {
  const int64_t parts = parts_of(w);
  for_each(parts, threads_for(2.0 * w.in * w.out), [&](int64_t part) {
    const int64_t r = w.out * part / parts;
    f(part, r, w.out * (part + 1) / parts - r);
  });
}

// y = W x + bias.
template <class S>
void multiply(const Weight& w, const S* bias, const S* x, S* y) {
  for_parts(w, [&](int64_t, int64_t r, int64_t rows) {
    kernels<S>().dots[static_cast<int>(w.dtype)](rows, w.in, w.row(r), w.out_stride, x, y + r);
    if (bias) kernels<S>().add(rows, bias + r, y + r);
  });
}

// sum += Wᵀ d.
template <class S>
void multiply_transposed(const Weight& w, const S* d, S* sum) {
  Scratch scratch;
  const int64_t parts = parts_of(w);
  S* sums = scratch.take<S>(parts * w.in);
  std::fill_n(sums, parts * w.in, S(0));
  for_parts(w, [&](int64_t part, int64_t r, int64_t rows) {
    kernels<S>().add_scaled[static_cast<int>(w.dtype)](rows, w.in, d + r, w.row(r), w.out_stride, sums + part * w.in);
  });
  for (int64_t part = 0; part < parts; ++part) kernels<S>().add(w.in, sums + part * w.in, sum);
}

// dW = d xᵀ.
template <class S>
Tensor outer(const Weight& w, Dtype dtype, const S* d, const S* x) {
  const Tensor dw = empty_matrix(w.out, w.in, dtype);
  const Out out(dw);
  for_parts(w, [&](int64_t, int64_t r, int64_t rows) {
    kernels<S>().outer[static_cast<int>(dtype)](rows, w.in, d + r, x, out.at(r, 0));
  });
  return dw;
}

// What the linears of a hidden layer keep, as vectors; null where nothing is there.
template <class S>
class Vectors {
 public:
  // As it was kept, or computed again.
  Vectors(const Call& call, const S* x, Scratch& scratch) : call_(call) {
    const bool replay = call.settings.save == Save::recompute;
    const S* h = x;
    for (int64_t i = 0; i < call.hidden() * call.width(); ++i) {
      const int64_t n = call.weights[i].out;
      vectors_.push_back(nullptr);
      if (replay ? !call.replays(i) : !call.residuals[i].any()) continue;
      S* vector = vectors_.back() = scratch.take<S>(n);
      if (!replay) {
        call.residuals[i].read(0, 1, 0, n, vector, n);
        continue;
      }
      if (i > 0 && !call.settings.gated) h = output(call.layer_of(i) - 1, scratch);
      multiply(call.weights[i], read_bias<S>(call.biases[i], scratch), h, vector);
      call.round(n, vector);
    }
  }

  const S* const* of(int64_t layer) const { return &vectors_[call_.first(layer)]; }

  // The output of a hidden layer.
  const S* output(int64_t layer, Scratch& scratch) const {
    if (call_.settings.from_output()) return of(layer)[0];
    const int64_t n = call_.weights[call_.first(layer)].out;
    S* h = scratch.take<S>(n);
    call_.output(1, n, of(layer), n, h, n);
    return h;
  }

 private:
  const Call& call_;
  std::vector<S*> vectors_;
};

}  // namespace

bool has_dense_rows(const Call& call) {
  return std::all_of(call.weights.begin(), call.weights.end(),
                     [](const Weight& w) { return !w.any || w.in_stride == 1; });
}

template <class S>
std::vector<Tensor> forward_row(const Call& call) {
  Results results(call);
  Scratch scratch;
  S* h = scratch.take<S>(call.x.size);
  if (call.x.any()) call.x.read(0, 1, 0, call.x.size, h, call.x.size);
  for (int64_t layer = 0; layer < call.layers(); ++layer) {
    const int64_t first = call.first(layer), n = call.weights[first].out;
    S* z[2] = {nullptr, nullptr};
    for (int part = 0; part < call.parts(layer); ++part) {
      z[part] = scratch.take<S>(n);
      if (first + part < call.given()) {
        call.residuals[part].read(0, 1, 0, n, z[part], n);
      } else {
        multiply(call.weights[first + part], read_bias<S>(call.biases[first + part], scratch), h, z[part]);
      }
      if (layer == call.hidden()) continue;
      call.round(n, z[part]);
      if (call.settings.keeps_z()) results[first + part].z.write(0, 1, 0, n, z[part], n);
      results.encode(call.rounded<S>(), first + part, 0, 1, 0, n, z[part], n);
    }
    h = z[0];
    if (layer < call.hidden()) {
      call.output(1, n, z, n, h, n, results[first].bits.over(0, 0), bits_size(n));
      if (results[first].h) results[first].h.write(0, 1, 0, n, h, n);
    }
    if (layer == call.layers() - 1) results.y.write(0, 1, 0, n, h, n);
  }
  return std::move(results.tensors);
}

template <class S>
std::vector<Maybe> backward_row(const Call& call, const Tensor& dy, const std::vector<bool>& wanted) {
  const Needs needs(call, wanted);
  std::vector<Maybe> grads(wanted.size());
  Scratch scratch;
  const auto vector = [&](const Rows& rows) {
    S* numbers = scratch.take<S>(rows.size);
    rows.read(0, 1, 0, rows.size, numbers, rows.size);
    return numbers;
  };
  const S* x = call.x.any() ? vector(call.x) : nullptr;
  const Vectors<S> kept(call, x, scratch);
  const S* d = vector(Rows(dy));
  for (int64_t layer = call.layers() - 1; layer >= 0; --layer) {
    const int64_t first = call.first(layer), n = call.weights[first].out, in = call.weights[first].in;
    S* dz[2] = {nullptr, nullptr};
    if (layer < call.hidden()) {
      for (int part = 0; part < call.width(); ++part)
        dz[part] = needs.slope(first + part) ? scratch.take<S>(n) : nullptr;
      call.slope(1, n, d, n, kept.of(layer), n, dz, n, call.bits_at(layer, 0, 0), bits_size(n));
    }
    const S* h = nullptr;
    for (int part = 0; part < call.parts(layer); ++part) {
      const int64_t i = first + part;
      if (i < call.given()) {
        if (dz[part]) kernels<S>().write(call.dtype, n, dz[part], (grads[i] = call.make(n))->mutable_data_ptr());
        continue;
      }
      const S* own = layer < call.hidden() ? dz[part] : d;
      if (needs.bias(i)) {
        Maybe& db = grads[call.bias_place(i)] = empty_row(n, call.dtype);
        kernels<S>().write(call.dtype, n, own, db->mutable_data_ptr());
      }
      if (!needs.weight(i)) continue;
      if (!h) h = layer == 0 ? x : kept.output(layer - 1, scratch);
      grads[call.weight_place(i)] = outer(call.weights[i], call.dtype, own, h);
    }
    if (!needs.below(layer)) return grads;
    S* dh = scratch.take<S>(in);
    std::fill_n(dh, in, S(0));
    for (int part = 0; part < call.parts(layer); ++part) {
      multiply_transposed(call.weights[first + part], layer < call.hidden() ? dz[part] : d, dh);
    }
    d = dh;
  }
  grads[0] = call.make(call.weights[0].in);
  kernels<S>().write(call.dtype, call.weights[0].in, d, grads[0]->mutable_data_ptr());
  return grads;
}

#define FASTBP_INSTANTIATE(S)                               \
  template std::vector<Tensor> forward_row<S>(const Call&); \
  template std::vector<Maybe> backward_row<S>(const Call&, const Tensor&, const std::vector<bool>&);
FASTBP_INSTANTIATE(float)
FASTBP_INSTANTIATE(double)

}  // namespace fastbp::cpu
