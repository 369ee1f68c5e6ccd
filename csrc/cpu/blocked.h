// C = A B for matrices of any size, a block at a time, with whatever is to happen to A, B and C on the way.
//
// C is cut into items, `group` rows by `strip` columns, that threads take one after another. An item goes through the
// reduction in steps of `step`: a block of B is packed, then panels of A are read and multiplied into the item's part
// of C, which stays in this thread's scratch memory until `finish` sees it, panel by panel, while it is hot.
#pragma once

#include <functional>

#include "kernels.h"

namespace fastbp::cpu {

template <class S>
struct Blocked {
  int64_t rows = 0, columns = 0, depth = 0;
  int segments = 1;           // stretches of the reduction, each `depth` long, with an A and a B of its own
  int outputs = 1;            // products of one A with several B
  int64_t unit = 1;           // a power of two: strips of columns begin at multiples of it
  bool a_by_columns = false;  // A comes by columns: `read_a` writes tiles, see Product
  const S* bias[2] = {nullptr, nullptr};

  // Rows [r, r + rows) and steps [k, k + steps) of A: to rows `stride` apart, or to tiles.
  std::function<void(int segment, int64_t r, int64_t rows, int64_t k, int64_t steps, S* to, int64_t stride)> read_a;
  // Steps and columns of the B of this segment or output, packed.
  std::function<void(int which, int64_t k, int64_t steps, int64_t c, int64_t columns, S* to)> read_b;
  // What becomes of a panel of C, of each output; `group` numbers the groups of rows from 0.
  std::function<void(int64_t group, int64_t r, int64_t rows, int64_t c, int64_t columns, S* const* panel,
                     int64_t stride)>
      finish;

  void plan();  // decides on the items; needs the sizes
  void run() const;
  int64_t groups() const { return (rows + group_ - 1) / group_; }

 private:
  void run_item(int64_t group, int64_t strip) const;
  int64_t threads_ = 1, group_ = 1, strip_ = 1, step_ = 1, panel_ = 1;
};

}  // namespace fastbp::cpu
