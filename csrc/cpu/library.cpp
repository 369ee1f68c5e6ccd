#include "library.h"

#include "../aten.h"
#include "slopes.h"

namespace fastbp::cpu {

namespace {

// f(z), or f(g) · u, in one pass; over z itself where that is not wanted any more.
template <class S>
Tensor outputs(const Call& call, const Tensor& z, const Maybe& up, bool in_place) {
  const Rows rows(z), up_rows = up ? Rows(*up) : Rows();
  const Tensor result = in_place ? z : call.make(rows.size);
  const Out out(result);
  if (rows.dense() && (!up || up_rows.dense())) {
    const Elementwise& loops = call.loops<S>(call.dtype);
    const int activation = call.settings.activation;
    const bool contiguous = rows.row_stride() == rows.size && (!up || up_rows.row_stride() == rows.size);
    for_row_groups(rows, groups_of(rows), [&](int64_t, int64_t r, int64_t count) {
      const int64_t n = contiguous ? count * rows.size : rows.size;
      for (int64_t i = r; i < (contiguous ? r + 1 : r + count); ++i) {
        if (up) {
          loops.gated_value[activation](n, rows.at(i, 0), up_rows.at(i, 0), out.at(i, 0), call.settings.params);
        } else {
          loops.value[activation](n, rows.at(i, 0), out.at(i, 0), call.settings.params);
        }
      }
    });
    return result;
  }
  for_panels<S>(rows, groups_of(rows), [&](int64_t, int64_t r, int64_t count, S* panel) {
    Scratch scratch;
    S* const u = up ? scratch.take<S>(count * rows.size) : nullptr;
    if (u) up_rows.read(r, count, 0, rows.size, u, rows.size);
    const S* const parts[2] = {panel, u};
    call.output(count, rows.size, parts, rows.size, panel, rows.size);
    out.write(r, count, 0, rows.size, panel, rows.size);
  });
  return result;
}

}  // namespace

template <class S>
std::vector<Tensor> forward_library(Call& call, const Tensor& x, const std::vector<Tensor>& weights) {
  const Settings& settings = call.settings;
  const bool keeps_z = settings.save == Save::preact;
  std::vector<Tensor> results(1);
  Tensor h = x;
  for (int64_t layer = 0; layer < call.hidden(); ++layer) {
    const int64_t first = call.first(layer);
    const Tensor z = linear(h, weights[first], call.biases[first]);
    Maybe up;
    if (settings.gated) up = linear(h, weights[first + 1], call.biases[first + 1]);
    if (keeps_z) {
      results.push_back(z);
      if (up) results.push_back(*up);
    }
    h = outputs<S>(call, z, up, !keeps_z);
    if (settings.save == Save::output && settings.projected) results.push_back(h);
  }
  results[0] = settings.projected ? linear(h, weights.back(), call.biases.back()) : h;
  return results;
}

template <class S>
std::vector<Maybe> backward_library(Call& call, const Tensor& dy, const Maybe& x, const std::vector<Maybe>& weights,
                                    const std::vector<bool>& wanted) {
  const Needs needs(call, wanted);
  const int64_t linears = call.linears();
  if (call.settings.save == Save::recompute) {
    Maybe h = x;
    for (int64_t i = 0; i < call.hidden() * call.width(); ++i) {
      const bool replayed = call.replays(i);
      if (replayed && i > 0 && !call.settings.gated) h = outputs<S>(call, *call.kept[i - 1], std::nullopt, false);
      call.keep(replayed ? Maybe(linear(*h, *weights[i], call.biases[i])) : Maybe());
    }
    call.settings.save = Save::preact;
    call.settings.overwrites = true;  // they are ours
  }
  // The input of a layer as a matrix, rebuilt where it was not kept.
  const auto input = [&](int64_t layer) {
    if (layer == 0) return matrix(*x, call.rows);
    const int64_t below = call.first(layer - 1);
    if (call.settings.save == Save::output) return matrix(*call.kept[below], call.rows);
    Maybe up;
    if (call.settings.gated) up = *call.kept[below + 1];
    return matrix(outputs<S>(call, *call.kept[below], up, false), call.rows);
  };

  std::vector<Maybe> grads(wanted.size()), keep;
  const auto bias_gradient = [&](int64_t linear, const auto& add) {
    if (!needs.bias(linear)) return;
    std::vector<double> total(call.weights[linear].out, 0.0);
    add(total.data());
    grads[1 + linears + linear] = call.make_bias_gradient<S>(total.data(), call.weights[linear].out);
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
    for (int part = 0; part < call.parts(layer); ++part) {
      if (!needs.weight(first + part)) continue;
      if (!h) h = input(layer);
      grads[1 + first + part] = mm(torch::stable::transpose(matrix(*keep[part], call.rows), 0, 1), *h);
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
