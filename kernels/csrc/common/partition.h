// How work is cut into pieces.

#pragma once

#include <cstdint>

namespace accel_kernels {

constexpr int divide_up(int64_t value, int64_t by) {
  return static_cast<int>((value + by - 1) / by);
}

}  // namespace accel_kernels
