// The elementwise half of backward: dz = dh · f'(z) and the bias gradients.
#pragma once

#include <algorithm>

#include "needs.h"
#include "parallel.h"

namespace fastbp::cpu {

// How many rows the elementwise work takes at a time: about 128 KB of float.
inline int64_t elementwise_rows(int64_t size) { return std::max<int64_t>(1, std::min<int64_t>(128, 32768 / size)); }

inline int64_t elementwise_threads(const Rows& rows) { return threads_for(8.0 * rows.count * rows.size); }

inline int64_t groups_of(const Rows& rows) {
  const int64_t threads = elementwise_threads(rows);
  return threads > 1 ? 2 * threads : 1;
}

// f(group, first row, rows) over a few rows of a tensor at a time; a group's rows come one after another.
template <class F>
void for_row_groups(const Rows& rows, int64_t groups, const F& f) {
  for_each(groups, elementwise_threads(rows), [&](int64_t group) {
    const int64_t end = rows.count * (group + 1) / groups, step = elementwise_rows(std::max<int64_t>(1, rows.size));
    for (int64_t r = rows.count * group / groups; r < end; r += step) f(group, r, std::min(step, end - r));
  });
}

// The same with the rows' numbers in the compute type.
template <class S, class F>
void for_panels(const Rows& rows, int64_t groups, const F& f) {
  for_row_groups(rows, groups, [&](int64_t group, int64_t r, int64_t count) {
    Scratch scratch;
    S* panel = scratch.take<S>(count * rows.size);
    rows.read(r, count, 0, rows.size, panel, rows.size);
    f(group, r, count, panel);
  });
}

// dz of one layer's linears, and what its columns add up to.
template <class S>
class Slopes {
 public:
  // dz goes to `into`, where there is such a result, and to memory of its own elsewhere.
  Slopes(const Call& call, const Needs& needs, int64_t layer, int64_t groups, const Out* into = nullptr)
      : call_(call), layer_(layer), size_(call.weights[call.first(layer)].out), groups_(groups) {
    for (int part = 0; part < call.width(); ++part) {
      const int64_t linear = call.first(layer) + part;
      if (!needs.slope(linear)) continue;
      if (into && into[part]) {
        rows_[part] = Rows(into[part], call.rows);
        out_[part] = into[part];
      } else if (needs.slope_kept(linear)) {
        const Rows kept = linear < static_cast<int64_t>(call.residuals.size()) ? call.residuals[linear] : Rows();
        if (call.settings.overwrites && kept.any() && kept.contiguous()) {
          dz[part] = call.kept[linear];
          rows_[part] = kept;
          out_[part] = kept.over();
        } else {
          dz[part] = call.make(size_);
          rows_[part] = Rows(*dz[part]);
          out_[part] = Out(*dz[part]);
        }
      }
      wanted_[part] = true;
      if (needs.bias(linear)) sums_[part].assign(groups * size_, 0.0);
    }
  }

  // From columns [c, c + n) of rows of dh.
  void panel(int64_t group, int64_t r, int64_t rows, int64_t c, int64_t n, const S* dh, int64_t stride) {
    Scratch scratch;
    S* parts[2] = {nullptr, nullptr};
    const bool direct =
        (!wanted_[0] || out_[0].template direct<S>(r, c)) && (!wanted_[1] || out_[1].template direct<S>(r, c));
    const int64_t dz_stride = direct ? size_ : n;
    for (int part = 0; part < 2; ++part) {
      if (wanted_[part]) parts[part] = direct ? out_[part].template direct<S>(r, c) : scratch.take<S>(rows * n);
    }
    call_.read_slope(layer_, r, rows, c, n, dh, stride, parts, dz_stride);
    for (int part = 0; part < 2; ++part) {
      if (out_[part] && !direct) out_[part].write(r, rows, c, n, parts[part], n);
      if (!sums_[part].empty()) add(group, part, c, rows, n, kDtypeOf<S>, parts[part], dz_stride);
    }
  }

  // Whether `all` can give h too: all that is wanted is, in rows that lie in memory as the loops of their dtype take
  // them.
  bool gives_h(const Rows& dh) const {
    const bool all_wanted = wanted_[0] && (wanted_[1] || !call_.settings.gated);
    return all_wanted && call_.residuals[call_.first(layer_)].any() && direct(dh);
  }

  // Whether rows of dh, and all that goes with them, lie in memory as the loops of their dtype take them.
  bool direct(const Rows& dh) const {
    const Rows* kept = &call_.residuals[call_.first(layer_)];
    bool direct = dh.dense();
    for (int part = 0; part < call_.width(); ++part) {
      direct = direct && (kept[part].dense() || !kept[part].any()) && (out_[part] || !wanted_[part]);
    }
    return direct;
  }

  // From all rows of dh. `h`: where f(z), or f(g) · u, goes in the same pass, if it `gives_h`.
  void all(const Rows& dh, const Out& h = {}) {
    const Rows* kept = &call_.residuals[call_.first(layer_)];
    const int width = call_.width();
    if (!direct(dh)) {
      for_panels<S>(dh, groups_, [&](int64_t group, int64_t r, int64_t count, const S* rows) {
        panel(group, r, count, 0, size_, rows, size_);
      });
      return;
    }
    // Rows that lie in memory as they are: one loop over each, in their own dtype.
    const Elementwise& loops = call_.template loops<S>(call_.dtype);
    const Settings& settings = call_.settings;
    const bool sides = settings.from_side();
    bool contiguous = dh.row_stride() == size_ && !(settings.keeps_bits() && size_ % 2);
    for (int part = 0; part < width; ++part) {
      contiguous = contiguous && (!kept[part].any() || kept[part].row_stride() == size_);
    }
    for_row_groups(dh, groups_, [&](int64_t group, int64_t r, int64_t count) {
      const int64_t n = contiguous ? count * size_ : size_;
      for (int64_t i = r; i < (contiguous ? r + 1 : r + count); ++i) {
        const void* z = kept[0].any() ? kept[0].at(i, 0) : dh.at(i, 0);
        if (h) {
          value_and_grad(loops, n, i, dh, h);
        } else if (sides) {
          call_.compressed().grad[settings.activation](n, dh.at(i, 0), z, call_.bits_at(layer_, i, 0),
                                                       out_[0].at(i, 0));
        } else if (!settings.gated) {
          call_.grad_of(loops)(n, dh.at(i, 0), z, out_[0].at(i, 0), settings.params);
        } else {
          loops.gated_grad[settings.activation](n, dh.at(i, 0), z, kept[1].any() ? kept[1].at(i, 0) : nullptr,
                                                wanted_[0] ? out_[0].at(i, 0) : nullptr,
                                                wanted_[1] ? out_[1].at(i, 0) : nullptr, settings.params);
        }
      }
      for (int part = 0; part < width; ++part) {
        if (!sums_[part].empty()) add(group, part, 0, count, size_, call_.dtype, out_[part].at(r, 0), size_);
      }
    });
  }

  // Adds the sums of the columns to others.
  void add_to(int part, double* total) const {
    for (size_t i = 0; i < sums_[part].size(); ++i) total[i % size_] += sums_[part][i];
  }

  Maybe dz[2];  // whole tensors, of those that have memory of their own
  // The rows of dz; they live as long as this object.
  std::vector<Rows> rows() const { return {rows_[0], rows_[1]}; }

 private:
  void value_and_grad(const Elementwise& loops, int64_t n, int64_t row, const Rows& dh, const Out& h) const {
    const Rows* kept = &call_.residuals[call_.first(layer_)];
    const Settings& settings = call_.settings;
    if (settings.gated) {
      loops.gated_value_and_grad[settings.activation](n, dh.at(row, 0), kept[0].at(row, 0), kept[1].at(row, 0),
                                                      h.at(row, 0), out_[0].at(row, 0), out_[1].at(row, 0),
                                                      settings.params);
    } else {
      loops.value_and_grad[settings.activation](n, dh.at(row, 0), kept[0].at(row, 0), h.at(row, 0), out_[0].at(row, 0),
                                                settings.params);
    }
  }

  void add(int64_t group, int part, int64_t c, int64_t rows, int64_t n, Dtype dtype, const void* dz, int64_t stride) {
    call_.template loops<S>(dtype).add_rows(rows, n, dz, stride, &sums_[part][group * size_ + c]);
  }

  const Call& call_;
  int64_t layer_, size_, groups_;
  Rows rows_[2];
  Out out_[2];
  bool wanted_[2] = {false, false};
  std::vector<double> sums_[2];
};

// Adds up the columns of d.
template <class S>
void add_columns(const Call& call, const Rows& d, double* total) {
  const int64_t groups = groups_of(d);
  std::vector<double> sums(groups * d.size, 0.0);
  if (d.dense()) {
    const auto add_rows = call.loops<S>(call.dtype).add_rows;
    for_each(groups, elementwise_threads(d), [&](int64_t group) {
      const int64_t r = d.count * group / groups, end = d.count * (group + 1) / groups;
      add_rows(end - r, d.size, d.at(r, 0), d.row_stride(), &sums[group * d.size]);
    });
  } else {
    for_panels<S>(d, groups, [&](int64_t group, int64_t, int64_t count, const S* panel) {
      call.loops<S>(kDtypeOf<S>).add_rows(count, d.size, panel, d.size, &sums[group * d.size]);
    });
  }
  for (size_t i = 0; i < sums.size(); ++i) total[i % d.size] += sums[i];
}

}  // namespace fastbp::cpu
