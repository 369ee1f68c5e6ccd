// The elementwise half of forward: h = f(z), or f(g) · u, and what compressed policies keep beside it.
#pragma once

#include "results.h"
#include "slopes.h"

namespace fastbp::cpu {

// f(z), or f(g) · u, in one pass; to `out`, which may be z itself. In forward with what the layer keeps in other forms.
// `panels`: computed in S and rounded then, as panels of a product are, and not by the loops of the dtype.
template <class S>
void outputs(const Call& call, const Rows* z, const Out& out, const Kept* kept, bool panels = false) {
  const Settings& settings = call.settings;
  const Rows &rows = z[0], &up_rows = z[call.width() - 1];
  const bool up = settings.gated, sides = settings.from_side();
  const int64_t size = rows.size, bytes = bits_size(size);
  const auto bits_at = [&](int64_t r) { return kept ? kept->bits.over(r, 0) : nullptr; };
  if (!panels && rows.dense() && (!up || up_rows.dense())) {
    const Elementwise& loops = call.loops<S>(call.dtype);
    const int activation = settings.activation;
    const bool contiguous =
        rows.row_stride() == size && (!up || up_rows.row_stride() == size) && !(settings.keeps_bits() && size % 2);
    for_row_groups(rows, groups_of(rows), [&](int64_t, int64_t r, int64_t count) {
      for (int part = 0; part < call.width() && kept; ++part) {
        for (int64_t i = r; i < r + count; ++i) encode(call.compressed(), kept[part], i, 0, size, z[part].at(i, 0));
      }
      const int64_t n = contiguous ? count * size : size;
      for (int64_t i = r; i < (contiguous ? r + 1 : r + count); ++i) {
        if (sides) {
          call.compressed().value[activation](n, rows.at(i, 0), out.at(i, 0), bits_at(i));
        } else if (up) {
          loops.gated_value[activation](n, rows.at(i, 0), up_rows.at(i, 0), out.at(i, 0), settings.params);
        } else {
          loops.value[activation](n, rows.at(i, 0), out.at(i, 0), settings.params);
        }
      }
    });
    return;
  }
  for_panels<S>(rows, groups_of(rows), [&](int64_t, int64_t r, int64_t count, S* panel) {
    Scratch scratch;
    S* const parts[2] = {panel, up ? scratch.take<S>(count * size) : nullptr};
    if (up) up_rows.read(r, count, 0, size, parts[1], size);
    for (int part = 0; part < call.width() && kept; ++part) {
      for (int64_t i = 0; i < count; ++i) {
        encode(call.rounded<S>(), kept[part], r + i, 0, size, parts[part] + i * size);
      }
    }
    call.output(count, size, parts, size, panel, size, bits_at(r), bytes);
    out.write(r, count, 0, size, panel, size);
  });
}

}  // namespace fastbp::cpu
