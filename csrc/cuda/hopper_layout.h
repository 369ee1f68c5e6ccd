// Where things lie in a product on Hopper: plain arithmetic, which the host can check (tests/test_cuda_math.py).
#pragma once

#include <stdint.h>

#include "../primitives.h"

namespace fastbp::cuda {

// A block works on 128 × 128 results; a step of the reduction is 64 numbers, 128 bytes, deep.
constexpr int kTile = 128, kDepth = 64;
constexpr int kGroupThreads = 128, kWarpRows = 16, kHalfRows = 64;

constexpr int kOperandBytes = kTile * kDepth * 2, kHalfBytes = kOperandBytes / 2, kStageBytes = 2 * kOperandBytes;

// Where an operand lies in shared memory, in rows of 128 bytes with their 16-byte parts exchanged by row (the 128-byte
// swizzle): `group` bytes from eight rows to the next eight, and for an operand whose rows are the steps of the
// reduction `atom` bytes from 64 columns to the next 64 (PTX ISA, "Matrix descriptor format").
HD uint64_t matrix_at(uint32_t address, uint32_t group, uint32_t atom) {
  return static_cast<uint64_t>((address & 0x3ffff) >> 4) | static_cast<uint64_t>(atom >> 4) << 16 |
         static_cast<uint64_t>(group >> 4) << 32 | uint64_t{1} << 62;
}

// A stage holds 128 rows of A, then B in two halves: of its 64 rows each, or where its rows are the steps of the
// reduction of its 64 columns each. Sixteen steps at a time: 32 bytes on in a row of steps, or sixteen rows on.
HD uint64_t a_at(uint32_t stage, int half, int sixteen) {
  return matrix_at(stage + half * kHalfBytes + sixteen * 32, 1024, 16);
}
HD uint64_t b_at(uint32_t stage, int sixteen, bool by_steps) {
  return by_steps ? matrix_at(stage + kOperandBytes + sixteen * 2048, 1024, kHalfBytes)
                  : matrix_at(stage + kOperandBytes + sixteen * 32, 1024, 16);
}

struct Place {
  int row, column;  // of the tile, in tiles
};

// The tiles in the order in which they are worked on, two rows of tiles at a time for a cluster's two blocks: down a
// few pairs of rows, then the next column, so that what is read again soon is still in the cache.
HD Place tile_at(int number, int row_pairs, int columns, int rank) {
  constexpr int kPairs = 4;
  const int each = kPairs * columns;
  const int first = number / each * kPairs;
  const int pairs = row_pairs - first < kPairs ? row_pairs - first : kPairs;
  const int inside = number % each;
  return {2 * (first + inside % pairs) + rank, inside / pairs};
}

// The tile of results in shared memory, numbers of 16 bits, rows of 256 bytes: the 16-byte parts of a row are exchanged
// by its number, so that neither eight rows of one column nor a row at a time meet in a bank.
HD int part_at(int row, int part) { return row * 256 + ((part ^ (row & 7)) << 4); }

// In a product of 64 rows, warp w of four has rows [16 w, 16 w + 16). A lane's registers 4 j to 4 j + 3 are two
// neighbours of row lane / 4 and two of the row eight below, of columns 8 j + 2 (lane % 4) and the next.
HD int register_row(int half, int warp, int lane, int number) {
  return half * kHalfRows + warp * kWarpRows + lane / 4 + 8 * (number % 4 / 2);
}
HD int register_column(int lane, int number) { return number / 4 * 8 + 2 * (lane % 4) + number % 2; }

// Sixteen columns of a warp's rows go to shared memory at a time, as four blocks of 8 × 8: a lane names the row of one
// of them. Block b is rows 8 (b % 2) and columns 8 (b / 2) of the sixteen.
HD int stored_row(int half, int warp, int lane) {
  return half * kHalfRows + warp * kWarpRows + lane % 8 + 8 * (lane / 8 % 2);
}
HD int stored_part(int sixteen, int lane) { return (2 * sixteen) ^ (lane / 16); }

// Then a warp goes through its rows with a pack in each lane, `parts` packs in a row.
HD int pass_row(int pass, int warp, int lane, int parts) {
  const int row = pass * (32 / parts) + lane / parts;  // of the warp's 32
  return row / kWarpRows * kHalfRows + warp * kWarpRows + row % kWarpRows;
}

}  // namespace fastbp::cuda
