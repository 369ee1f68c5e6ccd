// How sizes are cut into the parts that products work on.
#pragma once

#include <cstdint>

namespace fastbp::cpu {

constexpr int64_t kPanel = 96;  // rows; a multiple of every tile
constexpr int64_t kStep = 256;  // of a reduction; docs/decisions/ has the measurements

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return divide_up(a, b) * b; }
// n cut into the fewest equal parts of at most `most`, each a multiple of `unit`.
inline int64_t equal_part(int64_t n, int64_t most, int64_t unit) {
  return round_up(divide_up(n, divide_up(n, most)), unit);
}

}  // namespace fastbp::cpu
