// Sums over the channels of one pixel, for the C++ twins.

#pragma once

#include <cstdint>
#include <cstring>

#include "common/clones.h"

namespace accel_kernels {

// sums[j] = sum over c of matrix[j, c] * row[c]. The sums are cut into 16 lanes whatever the machine's
// vectors are: a fixed order of additions that needs no -ffast-math.
template <int kRank, typename acc_t>
ACCEL_INLINE void project_row(const acc_t* row, const acc_t* matrix, int channels, acc_t* sums) {
  constexpr int kLanes = 16;
  typedef acc_t Vector __attribute__((vector_size(kLanes * sizeof(acc_t))));
  Vector lanes[kRank] = {};
  int c = 0;
  for (; c + kLanes <= channels; c += kLanes) {
    Vector values;
    std::memcpy(&values, row + c, sizeof(values));
    for (int j = 0; j < kRank; ++j) {
      Vector factors;
      std::memcpy(&factors, matrix + int64_t{j} * channels + c, sizeof(factors));
      lanes[j] += values * factors;
    }
  }
  for (int j = 0; j < kRank; ++j) {
    acc_t halves[kLanes];
    std::memcpy(halves, &lanes[j], sizeof(halves));
    for (int width = kLanes / 2; width > 0; width /= 2) {
      for (int i = 0; i < width; ++i) halves[i] += halves[i + width];
    }
    sums[j] = halves[0];
    const acc_t* factors = matrix + int64_t{j} * channels;
    for (int i = c; i < channels; ++i) sums[j] += row[i] * factors[i];
  }
}

}  // namespace accel_kernels
