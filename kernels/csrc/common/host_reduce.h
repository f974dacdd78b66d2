// Second stage of the C++ twins' two-stage reductions.

#pragma once

#include <algorithm>
#include <cstdint>

namespace accel_kernels {

// out[c] = sum over rows of partial[row, c], in the order of the rows.
template <typename acc_t>
void column_sum(const void* partial, void* out, int64_t rows, int64_t columns) {
  const auto* source = static_cast<const acc_t*>(partial);
  auto* sums = static_cast<acc_t*>(out);
  std::copy_n(source, columns, sums);
  for (int64_t row = 1; row < rows; ++row) {
    for (int64_t c = 0; c < columns; ++c) sums[c] += source[row * columns + c];
  }
}

}  // namespace accel_kernels
