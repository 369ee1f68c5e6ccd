// The elementwise half of backward: dz = dh · f'(z) and the bias gradients.
#pragma once

#include <algorithm>

#include "needs.h"
#include "parallel.h"

namespace fastbp::cpu {

// How many groups of rows are added up apart, and how many rows the elementwise work takes at a time.
constexpr int64_t kElementwisePanel = 16;

inline int64_t elementwise_threads(const Rows& rows) { return threads_for(8.0 * rows.count * rows.size); }

inline int64_t groups_of(const Rows& rows) {
  const int64_t threads = elementwise_threads(rows);
  return threads > 1 ? 4 * threads : 1;
}

// f(group, first row, rows, numbers) over panels of the rows of a tensor; a group's rows come one after another.
template <class S, class F>
void for_panels(const Rows& rows, int64_t groups, const F& f) {
  for_each(groups, elementwise_threads(rows), [&](int64_t group) {
    const int64_t end = rows.count * (group + 1) / groups;
    for (int64_t r = rows.count * group / groups; r < end; r += kElementwisePanel) {
      const int64_t count = std::min(kElementwisePanel, end - r);
      Scratch scratch;
      S* panel = scratch.take<S>(count * rows.size);
      rows.read(r, count, 0, rows.size, panel, rows.size);
      f(group, r, count, panel);
    }
  });
}

// dz of one layer's linears, and what its columns add up to.
template <class S>
class Slopes {
 public:
  Slopes(const Call& call, const Needs& needs, int64_t layer, int64_t groups)
      : call_(call), layer_(layer), size_(call.weights[call.first(layer)].out), groups_(groups) {
    for (int part = 0; part < call.width(); ++part) {
      const int64_t linear = call.first(layer) + part;
      if (!needs.slope(linear)) continue;
      if (needs.weight(linear) || needs.below(layer)) {
        dz[part] = call.make(size_);
        out_[part] = Out(*dz[part]);
      }
      wanted_[part] = true;
      if (needs.bias(linear)) sums_[part].assign(groups * size_, S(0));
    }
  }

  // From columns [c, c + n) of rows of dh.
  void panel(int64_t group, int64_t r, int64_t rows, int64_t c, int64_t n, const S* dh, int64_t stride) {
    Scratch scratch;
    S* parts[2] = {nullptr, nullptr};
    for (int part = 0; part < 2; ++part) {
      if (wanted_[part]) parts[part] = scratch.take<S>(rows * n);
    }
    call_.read_slope(layer_, r, rows, c, n, dh, stride, parts);
    for (int part = 0; part < 2; ++part) {
      if (out_[part]) out_[part].write(r, rows, c, n, parts[part], n);
      if (!sums_[part].empty()) kernels<S>().add_rows(rows, n, parts[part], n, &sums_[part][group * size_ + c]);
    }
  }

  // From all rows of dh.
  void all(const Rows& dh) {
    for_panels<S>(dh, groups_, [&](int64_t group, int64_t r, int64_t count, const S* rows) {
      panel(group, r, count, 0, size_, rows, size_);
    });
  }

  Tensor sum(int part) const { return add_up(sums_[part], size_, call_.dtype); }

  static Tensor add_up(const std::vector<S>& sums, int64_t size, Dtype dtype) {
    std::vector<S> total(size, S(0));
    const int64_t groups = size ? static_cast<int64_t>(sums.size()) / size : 0;
    kernels<S>().add_rows(groups, size, sums.data(), size, total.data());
    Tensor result = empty({size}, dtype);
    Out(result).write(0, 1, 0, size, total.data(), size);
    return result;
  }

  Maybe dz[2];

 private:
  const Call& call_;
  int64_t layer_, size_, groups_;
  Out out_[2];
  bool wanted_[2] = {false, false};
  std::vector<S> sums_[2];
};

template <class S>
Tensor column_sums(const Call& call, const Rows& d) {
  const int64_t groups = groups_of(d);
  std::vector<S> sums(groups * d.size, S(0));
  for_panels<S>(d, groups, [&](int64_t group, int64_t, int64_t count, const S* panel) {
    kernels<S>().add_rows(count, d.size, panel, d.size, &sums[group * d.size]);
  });
  return Slopes<S>::add_up(sums, d.size, call.dtype);
}

// What the slopes of a layer leave: gradients of its biases, and dz as rows that live in `keep`.
template <class S>
void collect(const Call& call, const Needs& needs, int64_t layer, const Slopes<S>& slopes, std::vector<Maybe>& grads,
             std::vector<Maybe>& keep, std::vector<Rows>& d) {
  keep.clear();
  d.clear();
  for (int part = 0; part < call.width(); ++part) {
    const int64_t linear = call.first(layer) + part;
    if (needs.bias(linear)) grads[1 + call.linears() + linear] = slopes.sum(part);
    keep.push_back(slopes.dz[part]);
    d.push_back(slopes.dz[part] ? Rows(*slopes.dz[part]) : Rows());
  }
}

}  // namespace fastbp::cpu
