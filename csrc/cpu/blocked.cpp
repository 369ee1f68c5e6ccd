#include "blocked.h"

#include <algorithm>

#include "parallel.h"
#include "parts.h"
#include "scratch.h"

namespace fastbp::cpu {

namespace {

// The largest sizes of a block; docs/decisions/ has the measurements.
constexpr int64_t kStrip = 768, kGroup = 512;
constexpr int64_t kLeastGroup = 192, kLeastStrip = 64, kItemsPerThread = 2;

}  // namespace

template <class S>
void Blocked<S>::plan() {
  const auto& k = kernels<S>();
  threads_ = threads_for(2.0 * rows * columns * depth * segments * outputs);
  const int64_t r = std::max<int64_t>(rows, 1), c = std::max<int64_t>(columns, 1);
  int64_t most_group = kGroup, most_strip = kStrip / outputs;
  const int64_t wanted = threads_ > 1 ? threads_ * kItemsPerThread : 1;
  const auto items = [&] { return divide_up(r, most_group) * divide_up(c, most_strip); };
  // A strip that is packed anew for each group costs more than rows that are read anew for each strip.
  while (items() < wanted && most_strip > kStrip / 2) most_strip /= 2;
  while (items() < wanted && most_group > kLeastGroup && r > kLeastGroup) most_group /= 2;
  while (items() < wanted && most_strip > kLeastStrip) most_strip /= 2;
  group_ = equal_part(r, most_group, k.tile_rows);
  strip_ = equal_part(c, most_strip, std::max<int64_t>(k.tile_columns, unit));
  step_ = equal_part(std::max<int64_t>(depth, 1), kStep, 1);
  panel_ = equal_part(group_, kPanel, k.tile_rows);
}

template <class S>
void Blocked<S>::run() const {
  const int64_t strips = divide_up(columns, strip_);
  for_each(groups() * strips, threads_, [&](int64_t item) { run_item(item / strips, item % strips); });
}

template <class S>
void Blocked<S>::run_item(int64_t group, int64_t strip) const {
  const auto& k = kernels<S>();
  const int64_t r0 = group * group_, nr = std::min(group_, rows - r0);
  const int64_t c0 = strip * strip_, nc = std::min(strip_, columns - c0);
  const int64_t width = round_up(nc, k.tile_columns), stride = width + 16;  // 16: rows not a power of two apart
  const int64_t a_stride = step_ + 16;
  Scratch scratch;
  S* b[2] = {scratch.take<S>(step_ * width), outputs == 2 ? scratch.take<S>(step_ * width) : nullptr};
  S* a = scratch.take<S>(a_by_columns ? round_up(panel_, k.tile_rows) * step_ : panel_ * a_stride);
  // With one step the panels of C follow each other in the same place.
  const bool once = segments == 1 && depth <= step_;
  S* c[2];
  for (int o = 0; o < outputs; ++o) c[o] = scratch.take<S>((once ? std::min(panel_, nr) : nr) * stride);
  for (int segment = 0; segment < segments; ++segment) {
    int64_t k0 = 0;
    do {  // once even where the depth is 0: C is then the bias
      const int64_t steps = std::min(step_, depth - k0);
      const bool first = segment == 0 && k0 == 0, last = segment == segments - 1 && k0 + steps == depth;
      for (int o = 0; o < outputs; ++o) read_b(segments > 1 ? segment : o, k0, steps, c0, nc, b[o]);
      for (int64_t p = 0; p < nr; p += panel_) {
        const int64_t np = std::min(panel_, nr - p);
        read_a(segment, r0 + p, np, k0, steps, a, a_stride);
        S* panel[2] = {nullptr, nullptr};
        for (int o = 0; o < outputs; ++o) {
          panel[o] = c[o] + (once ? 0 : p * stride);
          k.multiply({np, nc, steps, a, a_by_columns ? k.tile_rows : a_stride, a_by_columns, k.tile_rows * steps, b[o],
                      k.tile_columns, k.tile_columns * steps, panel[o], stride,
                      last && bias[o] ? bias[o] + c0 : nullptr, !first});
        }
        if (last) finish(group, r0 + p, np, c0, nc, panel, stride);
      }
      k0 += steps;
    } while (k0 < depth);
  }
}

template struct Blocked<float>;
template struct Blocked<double>;

}  // namespace fastbp::cpu
