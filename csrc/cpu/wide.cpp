#include "wide.h"

#include <algorithm>

#include "blocked.h"
#include "slopes.h"

namespace fastbp::cpu {

template <class S>
std::vector<Tensor> forward_wide(Call& call) {
  const Settings& settings = call.settings;
  const bool keeps_z = settings.save == Save::preact, projected = settings.projected;
  const int64_t hidden = call.hidden(), linears = call.linears();
  Tensor y = call.make(call.weights.back().out);
  const Out y_rows(y);
  std::vector<Tensor> kept;
  // What the next layer reads: z, of which it makes f(z) in passing, or else f(z) itself.
  Call chain = call;
  if (!keeps_z) chain.settings.save = Save::output;
  std::vector<Tensor> between;

  for (int64_t layer = 0; layer < hidden + projected; ++layer) {
    const bool plain = layer == hidden, top = layer == hidden + projected - 1;
    const int outputs = plain ? 1 : call.width();
    const int64_t first = call.first(layer);
    const Weight* weights = &call.weights[plain ? linears - 1 : first];
    Out z[2], h;
    for (int o = 0; o < outputs && !plain && keeps_z; ++o) {
      kept.push_back(call.make(weights[o].out));
      z[o] = Out(kept.back());
      chain.residuals.emplace_back(kept.back());
    }
    if (top) {
      h = y_rows;
    } else if (!keeps_z) {
      std::vector<Tensor>& into = settings.save == Save::output ? kept : between;
      into.push_back(call.make(weights[0].out));
      h = Out(into.back());
      chain.residuals.resize(first);  // a gated layer's output stands in the place of its first residual
      chain.residuals.emplace_back(into.back());
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
        }
        S* const direct = h.direct<S>(r, c);
        call.output(rows, n, panel, stride, direct ? direct : panel[0], direct ? h.size : stride);
        if (direct) return;
      }
      h.write(r, rows, c, n, panel[0], stride);
    };
    product.plan();
    product.run();
  }
  call.residuals = chain.residuals;
  kept.insert(kept.begin(), y);
  return kept;
}

namespace {

// dW = dzᵀ h
template <class S>
Tensor weight_gradient(const Call& call, int64_t linear, const Rows& dz) {
  const auto& k = kernels<S>();
  const int64_t layer = call.layer_of(linear);
  Tensor dw = empty({call.weights[linear].out, call.weights[linear].in}, call.dtype);
  const Out out(dw);
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
    out.write(r, rows, c, n, panel[0], stride);
  };
  product.plan();
  product.run();
  return dw;
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
}

}  // namespace

template <class S>
std::vector<Maybe> backward_wide(Call& call, const Tensor& dy, const std::vector<bool>& wanted) {
  if (call.settings.save == Save::recompute) replay<S>(call);
  const Needs needs(call, wanted);
  const int64_t hidden = call.hidden(), linears = call.linears();
  std::vector<Maybe> grads(wanted.size());
  std::vector<Maybe> keep;  // dz of the layer above, while its rows are read
  std::vector<Rows> d;
  int64_t layer = hidden + call.settings.projected - 1;
  if (call.settings.projected) {
    d.emplace_back(dy);
    if (needs.bias(linears - 1)) grads[2 * linears] = column_sums<S>(call, d[0]);
  } else {
    const Rows rows(dy);
    Slopes<S> slopes(call, needs, layer, groups_of(rows));
    slopes.all(rows);
    collect(call, needs, layer, slopes, grads, keep, d);
  }
  for (;; --layer) {
    const bool plain = layer == hidden;
    const int64_t first = plain ? linears - 1 : call.first(layer);
    const int parts = plain ? 1 : call.width();
    for (int part = 0; part < parts; ++part) {
      if (needs.weight(first + part)) grads[1 + first + part] = weight_gradient<S>(call, first + part, d[part]);
    }
    if (!needs.below(layer)) return grads;

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
    product.plan();
    if (layer == 0) {
      Tensor dx = call.make(product.columns);
      const Out out(dx);
      product.finish = [&](int64_t, int64_t r, int64_t rows, int64_t c, int64_t n, S* const* panel, int64_t stride) {
        out.write(r, rows, c, n, panel[0], stride);
      };
      product.run();
      grads[0] = dx;
      return grads;
    }
    // The delta rule: dz of the layer beneath, while dh = dz W is hot.
    Slopes<S> slopes(call, needs, layer - 1, product.groups());
    product.finish = [&](int64_t group, int64_t r, int64_t rows, int64_t c, int64_t n, S* const* panel,
                         int64_t stride) { slopes.panel(group, r, rows, c, n, panel[0], stride); };
    product.run();
    collect(call, needs, layer - 1, slopes, grads, keep, d);
  }
}

#define FASTBP_INSTANTIATE(S)                          \
  template std::vector<Tensor> forward_wide<S>(Call&); \
  template std::vector<Maybe> backward_wide<S>(Call&, const Tensor&, const std::vector<bool>&);
FASTBP_INSTANTIATE(float)
FASTBP_INSTANTIATE(double)

}  // namespace fastbp::cpu
