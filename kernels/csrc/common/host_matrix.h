// Small dense products of the C++ twins.

#pragma once

#include <cstdint>
#include <cstring>

#include "common/clones.h"
#include "common/lanes.h"

namespace accel_kernels {

constexpr int round_up(int value, int multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

// A matrix: element (i, k) is at data[i * row + k * column].
template <typename acc_t>
struct Strided {
  const acc_t* data;
  int64_t row;
  int64_t column = 1;

  ACCEL_INLINE Strided from(int64_t i, int64_t k) const {
    return {data + i * row + k * column, row, column};
  }
};

// kRows x kPieces vectors of out = start + a b, summed in registers.
template <int kRows, int kPieces, typename acc_t>
ACCEL_INLINE void multiply_block(Strided<acc_t> a, Strided<acc_t> b, Strided<acc_t> start,
                                 acc_t* out, int64_t out_row, int depth) {
  using Vector = typename Lanes<acc_t>::type;
  constexpr int kLanes = Lanes<acc_t>::kCount;
  Vector sums[kRows][kPieces];
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 2
    for (int j = 0; j < kPieces; ++j) {
      std::memcpy(&sums[i][j], start.data + i * start.row + j * kLanes, sizeof(Vector));
    }
  }
  for (int k = 0; k < depth; ++k) {
    Vector right[kPieces];
#pragma GCC unroll 2
    for (int j = 0; j < kPieces; ++j) {
      std::memcpy(&right[j], b.data + k * b.row + j * kLanes, sizeof(Vector));
    }
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
      const acc_t left = a.data[i * a.row + k * a.column];
#pragma GCC unroll 2
      for (int j = 0; j < kPieces; ++j) sums[i][j] += left * right[j];
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 2
    for (int j = 0; j < kPieces; ++j) {
      std::memcpy(out + i * out_row + j * kLanes, &sums[i][j], sizeof(Vector));
    }
  }
}

// out = start + a b for [rows, depth] times [depth, width], in the order of depth. The columns of
// all but a adjoin; start may be out. rows is a multiple of 4, width of Lanes<acc_t>.
// Blocks of 8 vectors: as many sums as hide the latency of two FMA units, in 16 registers.
template <typename acc_t>
ACCEL_INLINE void multiply_add(Strided<acc_t> a, Strided<acc_t> b, Strided<acc_t> start,
                               acc_t* out, int64_t out_row, int rows, int depth, int width) {
  constexpr int kLanes = Lanes<acc_t>::kCount;
  int column = 0;
  for (; column + 2 * kLanes <= width; column += 2 * kLanes) {
    for (int i = 0; i < rows; i += 4) {
      multiply_block<4, 2>(a.from(i, 0), b.from(0, column), start.from(i, column),
                           out + i * out_row + column, out_row, depth);
    }
  }
  if (column == width) return;
  int i = 0;
  for (; i + 8 <= rows; i += 8) {
    multiply_block<8, 1>(a.from(i, 0), b.from(0, column), start.from(i, column),
                         out + i * out_row + column, out_row, depth);
  }
  if (i < rows) {
    multiply_block<4, 1>(a.from(i, 0), b.from(0, column), start.from(i, column),
                         out + i * out_row + column, out_row, depth);
  }
}

}  // namespace accel_kernels
