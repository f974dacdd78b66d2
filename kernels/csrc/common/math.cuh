// sigmoid of the CUDA kernels.

#pragma once

#include <cmath>

#include "common/dispatch.h"

namespace accel_kernels {

// 1 / (1 + exp(-x)) and what is missing to 1, both to a few roundings; exp never overflows.
template <typename acc_t>
struct Sigmoid {
  acc_t value;
  acc_t complement;
};

template <typename acc_t>
__device__ __forceinline__ Sigmoid<acc_t> sigmoid(acc_t x) {
  const acc_t e = exp(-fabs(x));
  const acc_t larger = acc_t{1} / (acc_t{1} + e);
  const acc_t smaller = e * larger;
  const bool positive = x >= acc_t{0};
  return {positive ? larger : smaller, positive ? smaller : larger};
}

}  // namespace accel_kernels
