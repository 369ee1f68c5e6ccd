#include "library.h"

#include "../aten.h"
#include "outputs.h"
#include "slopes.h"

namespace fastbp::cpu {

namespace {

// The output of a hidden layer as a tensor of its own, from what was kept.
template <class S>
Tensor rebuilt(const Call& call, int64_t layer) {
  const Rows* kept = &call.residuals[call.first(layer)];
  const Tensor h = call.make(kept[0].size);
  outputs<S>(call, kept, Out(h), nullptr);
  return h;
}

// dᵀ h, laid out as the weight is: else autograd copies it to add it to what is.
Tensor outer(const Tensor& d, const Tensor& h, bool by_columns) {
  if (!by_columns) return mm(torch::stable::transpose(d, 0, 1), h);
  return torch::stable::transpose(mm(torch::stable::transpose(h, 0, 1), d), 0, 1);
}

// The gradients of what is given; and h, where dW needs it and one pass over z gives both. dz goes over dh, which is
// ours.
template <class S>
Maybe backward_given(const Call& call, const Needs& needs, const Tensor& dh, bool wants_h, std::vector<Maybe>& grads) {
  const Rows rows(dh);
  Out over[2];
  const int first = needs.slope(0) ? 0 : 1;
  if (rows.contiguous()) over[first] = rows.over();
  Slopes<S> slopes(call, needs, 0, groups_of(rows), over);
  Maybe h;
  if (!wants_h || call.settings.from_output() || !slopes.gives_h(rows)) {
    slopes.all(rows);
  } else {
    h = call.make(rows.size);
    slopes.all(rows, Out(*h));
  }
  for (int part = 0; part < call.width(); ++part) grads[part] = slopes.dz[part];
  if (over[first]) {
    std::vector<int64_t> sizes = call.leading;
    sizes.push_back(rows.size);
    grads[first] = torch::stable::view(dh, {sizes.data(), sizes.size()});
  }
  return h;
}

}  // namespace

template <class S>
std::vector<Tensor> forward_library(Call& call, const Tensor& x, const std::vector<Tensor>& weights) {
  const Settings& settings = call.settings;
  std::vector<Tensor> results(1);
  const auto bytes = [&](int64_t size) {
    results.push_back(empty_bytes(call.leading.data(), static_cast<int64_t>(call.leading.size()), size));
    return Bytes(results.back());
  };
  Tensor h = x;
  for (int64_t layer = 0; layer < call.hidden(); ++layer) {
    const int64_t first = call.first(layer);
    std::vector<Tensor> z;
    Rows rows[2];
    for (int part = 0; part < call.width(); ++part) {
      if (settings.given) {
        rows[part] = call.residuals[part];
        continue;
      }
      z.push_back(linear(h, weights[first + part], call.biases[first + part]));
      rows[part] = Rows(z[part]);
    }
    // The output goes over z where that is not wanted any more.
    h = settings.keeps_z() || settings.given ? call.make(rows[0].size) : z[0];
    if (settings.keeps_z()) results.insert(results.end(), z.begin(), z.end());
    if (settings.keeps_h()) results.push_back(h);
    Kept kept[2];
    for (int part = 0; part < call.width(); ++part) {
      if (settings.keeps_bits()) kept[part].bits = bytes(bits_size(rows[part].size));
      if (!settings.keeps_fp8()) continue;
      kept[part].codes = bytes(rows[part].size);
      kept[part].scales = bytes(scales_size(rows[part].size));
    }
    outputs<S>(call, rows, Out(h), kept);
  }
  results[0] = settings.projected ? linear(h, weights.back(), call.biases.back()) : h;
  return results;
}

template <class S>
std::vector<Maybe> backward_library(Call& call, const Tensor& dy, const Maybe& x, const std::vector<Maybe>& weights,
                                    const std::vector<bool>& wanted) {
  const Needs needs(call, wanted);
  if (call.settings.save == Save::recompute) {
    Maybe h = x;
    for (int64_t i = 0; i < call.hidden() * call.width(); ++i) {
      const bool replayed = call.replays(i);
      if (replayed && i > 0 && !call.settings.gated) h = rebuilt<S>(call, i - 1);
      call.keep(replayed ? Maybe(linear(*h, *weights[i], call.biases[i])) : Maybe());
    }
    call.settings.save = Save::preact;
    call.settings.overwrites = true;  // they are ours
  }
  // The input of a layer as a matrix, rebuilt where it was not kept.
  const auto input = [&](int64_t layer) {
    if (layer == 0) return matrix(*x, call.rows);
    const bool is_kept = call.settings.from_output();
    return matrix(is_kept ? *call.kept[call.first(layer - 1)] : rebuilt<S>(call, layer - 1), call.rows);
  };

  std::vector<Maybe> grads(wanted.size()), keep;
  const auto bias_gradient = [&](int64_t linear, const auto& add) {
    if (!needs.bias(linear)) return;
    std::vector<double> total(call.weights[linear].out, 0.0);
    add(total.data());
    grads[call.bias_place(linear)] = call.make_bias_gradient<S>(total.data(), call.weights[linear].out);
  };
  Maybe dh = dy;
  for (int64_t layer = call.layers() - 1; layer >= 0; --layer) {
    const int64_t first = call.first(layer);
    if (layer < call.hidden()) {
      const Rows dh_rows(*dh);
      Slopes<S> slopes(call, needs, layer, groups_of(dh_rows));
      slopes.all(dh_rows);
      dh.reset();  // dz is in its place
      for (int part = 0; part < call.width(); ++part) {
        bias_gradient(first + part, [&](double* total) { slopes.add_to(part, total); });
      }
      keep.assign(std::begin(slopes.dz), std::end(slopes.dz));
    } else {
      keep = {dy};
      bias_gradient(first, [&](double* total) { add_columns<S>(call, Rows(dy), total); });
    }
    Maybe h, dx;  // dx first, while the weights are still warm
    for (int part = 0; part < call.parts(layer) && needs.below(layer); ++part) {
      const Tensor found = mm(matrix(*keep[part], call.rows), *weights[first + part]);
      dx = dx ? add(*dx, found) : found;
    }
    if (call.settings.given && dx) {
      h = backward_given<S>(call, needs, *dx, needs.weight(first), grads);
      if (h) h = matrix(*h, call.rows);
      dx.reset();
    }
    for (int part = 0; part < call.parts(layer); ++part) {
      if (!needs.weight(first + part)) continue;
      if (!h) h = input(layer);
      grads[call.weight_place(first + part)] =
          outer(matrix(*keep[part], call.rows), *h, call.weights[first + part].by_columns());
    }
    if (!dx) return grads;
    dh = std::move(dx);
  }
  std::vector<int64_t> sizes = call.leading;
  sizes.push_back(call.weights[0].in);
  grads[0] = torch::stable::view(*dh, {sizes.data(), sizes.size()});
  return grads;
}

#define FASTBP_INSTANTIATE(S)                                                                                    \
  template std::vector<Tensor> forward_library<S>(Call&, const Tensor&, const std::vector<Tensor>&);             \
  template std::vector<Maybe> backward_library<S>(Call&, const Tensor&, const Maybe&, const std::vector<Maybe>&, \
                                                  const std::vector<bool>&);
FASTBP_INSTANTIATE(float)
FASTBP_INSTANTIATE(double)

}  // namespace fastbp::cpu
