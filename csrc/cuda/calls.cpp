// A whole call each way: its layers in order, and the products that belong to PyTorch. The mathematics is that of
// fastbp/reference.py.
#include "calls.h"

#include "../aten.h"
#include "../cpu/checks.h"
#include "layers.h"
#include "shims.h"

namespace fastbp::cuda {

namespace {

// sum + a b, in place, rounded once.
void add_product(Tensor& sum, const Tensor& a, const Tensor& b) {
  check(aoti_torch_cuda_addmm_out(sum.get(), sum.get(), a.get(), b.get(), 1.0, 1.0) == 0,
        "PyTorch refuses a product that fits");
}

std::vector<Tensor> run_forward(const Call& call, const Tensor& x, const std::vector<Tensor>& weights) {
  const cpu::Settings& settings = call.settings;
  const Layers layers(call);
  std::vector<Tensor> results(1);
  Tensor h = x;
  for (int64_t layer = 0; layer < call.hidden(); ++layer) {
    const int64_t first = call.first(layer);
    const Layers::Forward found = layers.forward(h, &weights[first], &call.biases[first]);
    for (int part = 0; part < call.width(); ++part) {
      for (const Maybe& tensor : {found.kept[part], found.beside[part]}) {
        if (tensor) results.push_back(*tensor);
      }
    }
    h = found.y;
  }
  results[0] = settings.projected ? linear(h, weights.back(), call.biases.back()) : h;
  return results;
}

// The pre-activations again, as deep as backward looks at them.
void replay(Call& call, const Layers& layers, const Maybe& x, const std::vector<Maybe>& weights) {
  Maybe h = x;
  for (int64_t i = 0; i < call.hidden() * call.width(); ++i) {
    const bool replayed = call.replays(i);
    if (replayed && i > 0 && !call.settings.gated) h = layers.value(i - 1);
    call.keep(replayed ? Maybe(linear(*h, *weights[i], call.biases[i])) : Maybe());
  }
  call.settings.save = Save::preact;
  call.settings.overwrites = true;  // they are ours
}

std::vector<Maybe> run_backward(Call& call, const Tensor& dy, const Maybe& x, const std::vector<Maybe>& weights,
                                const std::vector<bool>& wanted) {
  const Needs needs(call, wanted);
  const Layers layers(call);
  const int64_t linears = call.linears();
  if (call.settings.save == Save::recompute) replay(call, layers, x, weights);
  const bool from_output = call.settings.from_output();  // what is kept is then not written over: make_call

  std::vector<Maybe> grads(wanted.size());
  Maybe dz[2] = {matrix(dy, call.rows), std::nullopt};
  Maybe db[2], h_below;
  // What is wanted of a hidden layer, beside dz: its output again, if dW of the layer above is wanted and it was not
  // kept.
  const auto wanted_of = [&](int64_t layer, bool h) {
    Layers::Wanted w{};
    for (int part = 0; part < call.width(); ++part) {
      const int64_t linear = call.first(layer) + part;
      w.dz[part] = needs.slope(linear);
      w.db[part] = needs.bias(linear);
    }
    w.h = h;
    return w;
  };
  const auto take = [&](const Slope& slope) {
    for (int part = 0; part < 2; ++part) dz[part] = slope.dz[part], db[part] = slope.db[part];
    h_below = slope.h;
  };

  const auto with_leading = [&](const Tensor& rows) {
    std::vector<int64_t> sizes = call.leading;
    sizes.push_back(rows.size(1));
    return torch::stable::view(rows, {sizes.data(), sizes.size()});
  };

  int64_t layer = call.layers() - 1;
  if (layer < call.hidden()) {
    take(layers.chain_rule(*dz[0], layer, wanted_of(layer, false), false));
  } else if (needs.bias(linears - 1)) {
    db[0] = column_sum(*dz[0]);
  }
  for (; layer >= 0; --layer) {
    const int64_t first = call.first(layer);
    const int parts = call.parts(layer);
    const Maybe own[2] = {dz[0], dz[1]}, own_db[2] = {db[0], db[1]};
    bool reads_input = false;
    for (int part = 0; part < parts; ++part) reads_input = reads_input || needs.weight(first + part);
    Maybe h;
    if (layer > 0) {
      const bool rebuild = reads_input && !from_output;
      if (needs.below(layer)) {
        take(layers.dgrad(*own[0], *weights[first], layer - 1, wanted_of(layer - 1, rebuild)));
        h = h_below;
      } else if (rebuild) {
        h = layers.value(layer - 1);
      }
      if (reads_input && from_output) h = call.kept[call.first(layer - 1)];
    } else if (reads_input) {
      h = *x;
    }
    for (int part = 0; part < parts; ++part) {
      if (!own[part]) continue;
      if (needs.weight(first + part)) {
        grads[call.weight_place(first + part)] = mm(torch::stable::transpose(*own[part], 0, 1), matrix(*h, call.rows));
      }
      if (needs.bias(first + part)) grads[call.bias_place(first + part)] = own_db[part];
    }
    if (layer == 0 && needs.below(0)) {
      Tensor dx = mm(*own[0], *weights[0]);
      if (parts == 2) add_product(dx, *own[1], *weights[1]);
      grads[0] = with_leading(dx);
    }
    for (int64_t i = 0; i < call.given() && layer == 0; ++i) {
      if (wanted[i]) grads[i] = with_leading(*own[i]);
    }
    if (!needs.below(layer)) break;
  }
  return grads;
}

}  // namespace

std::vector<Tensor> forward(const Tensor& x, std::vector<Tensor> tensors, int64_t settings,
                            std::vector<double> params) {
  const Call call = cpu::forward_call(x, tensors, settings, params);
  const OnDevice here(call.device.index);
  const auto results = run_forward(call, x, cpu::weights_of(call, tensors));
  check_launches();
  return results;
}

std::vector<Tensor> backward(const Tensor& dy, std::vector<Tensor> saved, int64_t settings, std::vector<double> params,
                             std::vector<bool> needs) {
  Maybe x;
  std::vector<Maybe> weights;
  Call call = cpu::backward_call(dy, saved, settings, params, needs, x, weights);
  const OnDevice here(call.device.index);
  const auto grads = run_backward(call, dy, x, weights, needs);
  check_launches();
  return cpu::only_needed(grads, needs);
}

}  // namespace fastbp::cuda
