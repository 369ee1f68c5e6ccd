#include "wide.h"

#include <algorithm>
#include <optional>

#include "blocked.h"
#include "outputs.h"
#include "slopes.h"

namespace fastbp::cpu {

template <class S>
std::vector<Tensor> forward_wide(Call& call) {
  const Settings& settings = call.settings;
  const bool keeps_z = settings.keeps_z(), projected = settings.projected;
  const int64_t hidden = call.hidden(), linears = call.linears();
  Results results(call);
  // What the next layer reads: z, of which it makes f(z) in passing, or else f(z) itself.
  Call chain = call;
  if (!keeps_z) chain.settings.save = Save::output;
  std::vector<Tensor> between;
  if (settings.given) {
    chain.settings.save = Save::preact;
    if (settings.save != Save::preact) {  // in the pass that writes what is kept
      if (!settings.keeps_h()) between.push_back(call.make(call.weights[0].out));
      const Out h = settings.keeps_h() ? results[0].h : Out(between.back());
      outputs<S>(call, call.residuals.data(), h, &results[0], call.rounds<S>());
      chain.settings.save = Save::output;
      chain.residuals = {Rows(h, call.rows)};
    }
  }

  for (int64_t layer = settings.given ? hidden : 0; layer < hidden + projected; ++layer) {
    const bool plain = layer == hidden, top = layer == hidden + projected - 1;
    const int outputs = plain ? 1 : call.width();
    const int64_t first = call.first(layer);
    const Weight* weights = &call.weights[plain ? linears - 1 : first];
    Out z[2], h;
    for (int o = 0; o < outputs && keeps_z && !plain; ++o) {
      z[o] = results[first + o].z;
      chain.residuals.emplace_back(z[o], call.rows);
    }
    if (top) {
      h = results.y;
    } else if (!keeps_z) {
      if (!settings.keeps_h()) between.push_back(call.make(weights[0].out));
      h = settings.keeps_h() ? results[first].h : Out(between.back());
      chain.residuals.resize(first);  // a gated layer's output stands in the place of its first residual
      chain.residuals.emplace_back(h, call.rows);
    }
    Scratch scratch;
    Blocked<S> product;
    product.rows = call.rows;
    product.columns = weights[0].out;
    product.depth = weights[0].in;
    product.outputs = outputs;
    for (int o = 0; o < outputs; ++o) {
      product.bias[o] = read_bias<S>(call.biases[(plain ? linears - 1 : first) + o], scratch);
    }
    product.read_a = [&](int, int64_t r, int64_t rows, int64_t c, int64_t n, S* to, int64_t stride) {
      chain.read_input(layer, r, rows, c, n, to, stride);
    };
    product.read_b = [&](int o, int64_t c, int64_t n, int64_t column, int64_t columns, S* to) {
      weights[o].pack_transposed(c, n, column, columns, to);
    };
    product.finish = [&](int64_t, int64_t r, int64_t rows, int64_t c, int64_t n, S* const* panel, int64_t stride) {
      for (int o = 0; o < outputs; ++o) {
        if (z[o]) z[o].write(r, rows, c, n, panel[o], stride);
      }
      if (!h) return;
      if (!plain) {
        for (int o = 0; o < outputs; ++o) {
          for (int64_t i = 0; i < rows; ++i) call.round(n, panel[o] + i * stride);
          results.encode(call.rounded<S>(), first + o, r, rows, c, n, panel[o], stride);
        }
        S* const direct = h.direct<S>(r, c);
        call.output(rows, n, panel, stride, direct ? direct : panel[0], direct ? h.size : stride,
                    results[first].bits.over(r, c / 2), bits_size(h.size));
        if (direct) return;
      }
      h.write(r, rows, c, n, panel[0], stride);
    };
    product.unit = plain ? 1 : call.column_unit();
    product.plan();
    product.run();
  }
  return std::move(results.tensors);
}

namespace {

// dW = dzᵀ h, or for a further block of rows dW += dzᵀ h.
template <class S>
void weight_gradient(const Call& call, int64_t linear, const Rows& dz, const Out& dw, bool accumulate) {
  const auto& k = kernels<S>();
  const int64_t layer = call.layer_of(linear);
  Blocked<S> product;
  product.rows = call.weights[linear].out;
  product.columns = call.weights[linear].in;
  product.depth = call.rows;
  product.a_by_columns = true;
  product.read_a = [&](int, int64_t n0, int64_t n, int64_t m0, int64_t steps, S* to, int64_t) {
    Scratch scratch;
    S* copy = scratch.take<S>(n);
    const S* dense = dz.dense_as<S>();
    for (int64_t m = 0; m < steps; ++m) {
      const S* row = dense ? dense + (m0 + m) * dz.row_stride() + n0 : copy;
      if (!dense) dz.read(m0 + m, 1, n0, n, copy, n);
      for (int64_t i = 0; i < n; i += k.tile_rows) {
        S* tile = to + i * steps + m * k.tile_rows;
        for (int64_t j = 0; j < std::min<int64_t>(k.tile_rows, n - i); ++j) tile[j] = row[i + j];
      }
    }
  };
  product.read_b = [&](int, int64_t m0, int64_t steps, int64_t c0, int64_t n, S* to) {
    Scratch scratch;
    S* row = scratch.take<S>(n);
    for (int64_t m = 0; m < steps; ++m) {
      call.read_input(layer, m0 + m, 1, c0, n, row, n);
      for (int64_t i = 0; i < n; i += k.tile_columns) {
        S* tile = to + i * steps + m * k.tile_columns;
        const int64_t count = std::min<int64_t>(k.tile_columns, n - i);
        for (int64_t j = 0; j < count; ++j) tile[j] = row[i + j];
        for (int64_t j = count; j < k.tile_columns; ++j) tile[j] = S(0);
      }
    }
  };
  product.finish = [&](int64_t, int64_t r, int64_t rows, int64_t c, int64_t n, S* const* panel, int64_t stride) {
    for (int64_t i = 0; i < rows && accumulate; ++i) k.add(n, dw.direct<S>(r + i, c), panel[0] + i * stride);
    dw.write(r, rows, c, n, panel[0], stride);
  };
  product.unit = call.column_unit();  // columns of a layer's input, which is read from what was kept
  product.plan();
  product.run();
}

// z of every hidden layer again, for a backward to which nothing was left.
template <class S>
void replay(Call& call) {
  for (int64_t linear = 0; linear < call.hidden() * call.width(); ++linear) {
    const Weight& weight = call.weights[linear];
    if (!call.replays(linear)) {
      call.keep(std::nullopt);
      continue;
    }
    Tensor z = call.make(weight.out);
    const Out out(z);
    Scratch scratch;
    Blocked<S> product;
    product.rows = call.rows;
    product.columns = weight.out;
    product.depth = weight.in;
    product.bias[0] = read_bias<S>(call.biases[linear], scratch);
    product.read_a = [&](int, int64_t r, int64_t rows, int64_t c, int64_t n, S* to, int64_t stride) {
      call.read_input(call.layer_of(linear), r, rows, c, n, to, stride);
    };
    product.read_b = [&](int, int64_t c, int64_t n, int64_t column, int64_t columns, S* to) {
      weight.pack_transposed(c, n, column, columns, to);
    };
    product.finish = [&](int64_t, int64_t r, int64_t rows, int64_t c, int64_t n, S* const* panel, int64_t stride) {
      out.write(r, rows, c, n, panel[0], stride);
    };
    product.plan();
    product.run();
    call.keep(z);
  }
  call.settings.save = Save::preact;
  call.settings.overwrites = true;  // they are ours
}

// Backward goes through a call in blocks of rows, so that dz of all layers exists for one block at a time.
constexpr int64_t kBlockRows = 512;

// The gradients that all blocks share.
template <class S>
struct Gradients {
  Gradients(const Call& call, const Needs& needs) : inputs(call.inputs()), biases(call.linears()) {
    if (needs.below(0)) inputs[0] = call.make(call.weights[0].in);
    for (int64_t i = 0; i < call.given(); ++i) {
      if (needs.slope(i)) inputs[i] = call.make(call.weights[i].out);
    }
    for (int64_t i = 0; i < call.linears(); ++i) {
      const Weight& w = call.weights[i];
      weights.push_back(needs.weight(i) ? Maybe(empty_matrix(w.out, w.in, kDtypeOf<S>)) : Maybe());
      if (needs.bias(i)) biases[i].assign(w.out, 0.0);
    }
  }

  std::vector<Maybe> finish(const Call& call, const Needs& needs) const {
    std::vector<Maybe> grads = inputs;
    for (int64_t i = call.given(); i < call.linears(); ++i) {
      const Maybe& sum = weights[i];
      if (!sum || call.dtype == kDtypeOf<S>) {
        grads.push_back(sum);
        continue;
      }
      const Rows rows(*sum);
      grads.push_back(empty_matrix(rows.count, rows.size, call.dtype));
      const Out out(*grads.back());
      for (int64_t r = 0; r < rows.count; ++r) {
        out.write(r, 1, 0, rows.size, static_cast<const S*>(rows.at(r, 0)), rows.size);
      }
    }
    for (int64_t i = call.given(); i < call.linears(); ++i) {
      grads.push_back(needs.bias(i) ? call.make_bias_gradient<S>(biases[i].data(), biases[i].size()) : Maybe());
    }
    return grads;
  }

  // Those of the inputs from a row on.
  std::vector<Out> inputs_from(int64_t r) const {
    std::vector<Out> found;
    for (const Maybe& input : inputs) found.push_back(input ? Out(*input).from(r) : Out());
    return found;
  }

  std::vector<Maybe> inputs, weights;  // weights in the compute type
  std::vector<std::vector<double>> biases;
};

template <class S>
void backward_block(Call call, const Rows& dy, const Needs& needs, Gradients<S>& grads, const std::vector<Out>& dinputs,
                    bool first_block) {
  if (call.settings.save == Save::recompute) replay<S>(call);
  std::optional<Slopes<S>> slopes;  // dz of the layer at hand
  std::vector<Rows> d;
  const auto take = [&](int64_t layer) {
    d = slopes->rows();
    for (int part = 0; part < call.width(); ++part) {
      const int64_t linear = call.first(layer) + part;
      if (needs.bias(linear)) slopes->add_to(part, grads.biases[linear].data());
    }
  };
  int64_t layer = call.layers() - 1;
  if (call.settings.projected) {
    d = {dy};
    if (needs.bias(call.linears() - 1)) add_columns<S>(call, dy, grads.biases.back().data());
  } else {
    slopes.emplace(call, needs, layer, groups_of(dy));
    slopes->all(dy);
    take(layer);
  }
  for (;; --layer) {
    const int64_t first = call.first(layer);
    const int parts = call.parts(layer);
    for (int part = 0; part < parts; ++part) {
      if (!needs.weight(first + part)) continue;
      weight_gradient<S>(call, first + part, d[part], Out(*grads.weights[first + part]), !first_block);
    }
    if (!needs.below(layer)) return;

    Blocked<S> product;
    product.rows = call.rows;
    product.columns = call.weights[first].in;
    product.depth = call.weights[first].out;
    product.segments = parts;
    product.read_a = [&](int part, int64_t r, int64_t rows, int64_t c, int64_t n, S* to, int64_t stride) {
      d[part].read(r, rows, c, n, to, stride);
    };
    product.read_b = [&](int part, int64_t c, int64_t n, int64_t column, int64_t columns, S* to) {
      call.weights[first + part].pack_plain(c, n, column, columns, to);
    };
    product.unit = call.column_unit();
    product.plan();
    if (layer == 0) {
      product.finish = [&](int64_t, int64_t r, int64_t rows, int64_t c, int64_t n, S* const* panel, int64_t stride) {
        dinputs[0].write(r, rows, c, n, panel[0], stride);
      };
      return product.run();
    }
    // The delta rule: dz of the layer beneath, while dh = dz W is hot.
    Slopes<S> beneath(call, needs, layer - 1, product.groups(), call.settings.given ? dinputs.data() : nullptr);
    product.finish = [&](int64_t group, int64_t r, int64_t rows, int64_t c, int64_t n, S* const* panel,
                         int64_t stride) { beneath.panel(group, r, rows, c, n, panel[0], stride); };
    product.run();
    if (call.settings.given) return;
    slopes.emplace(std::move(beneath));
    take(layer - 1);
  }
}

}  // namespace

template <class S>
std::vector<Maybe> backward_wide(const Call& call, const Tensor& dy, const std::vector<bool>& wanted) {
  const Needs needs(call, wanted);
  Gradients<S> grads(call, needs);
  const Rows rows(dy);
  const int64_t blocks = std::max<int64_t>(1, call.rows / kBlockRows);
  for (int64_t block = 0; block < blocks; ++block) {
    const int64_t r = call.rows * block / blocks, count = call.rows * (block + 1) / blocks - r;
    const Call part = blocks > 1 ? call.slice(r, count) : call;
    const Rows dy_part = blocks > 1 ? rows.slice(r, count) : rows;
    backward_block<S>(part, dy_part, needs, grads, grads.inputs_from(r), block == 0);
  }
  return grads.finish(call, needs);
}

#define FASTBP_INSTANTIATE(S)                          \
  template std::vector<Tensor> forward_wide<S>(Call&); \
  template std::vector<Maybe> backward_wide<S>(const Call&, const Tensor&, const std::vector<bool>&);
FASTBP_INSTANTIATE(float)
FASTBP_INSTANTIATE(double)

}  // namespace fastbp::cpu
