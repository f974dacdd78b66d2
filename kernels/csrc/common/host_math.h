// exp and sigmoid of the C++ twins, written so that loops over them become vector code: the
// library's functions are calls, one value at a time.

#pragma once

#include <cmath>

#include "common/clones.h"
#include "common/host_types.h"

namespace accel_kernels {

// exp(x) for x <= 0, to 2^-23 of the result (about one unit in the last place); 0 where float would
// be subnormal (x < -87.3); NaN stays NaN. x = n ln(2) + r with |r| <= ln(2)/2, exp(r) by the
// polynomial of the Cephes library.
ACCEL_INLINE float exp_nonpositive(float x) {
  constexpr float kSmallest = -87.3365448f;  // ln(2^-126)
  constexpr float kRound = 0x1.8p23f;        // adding it rounds to an integer, kept in the low bits
  const float clamped = x < kSmallest ? kSmallest : x;
  const float shifted = clamped * 1.44269504f + kRound;
  const float n = shifted - kRound;
  const float r = (clamped - n * 0.693359375f) + n * 2.12194440e-4f;  // ln(2) in two parts
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = (p * r * r + r) + 1.0f;
  const float power = float_of_bits((bits_of_float(shifted) + 127u) << 23);  // 2^n
  return x < kSmallest ? 0.0f : p * power;
}
inline double exp_nonpositive(double x) { return std::exp(x); }

// 1 / (1 + exp(-x)) and what is missing to 1, both to a few roundings.
template <typename acc_t>
struct Sigmoid {
  acc_t value;
  acc_t complement;
};

template <typename acc_t>
ACCEL_INLINE Sigmoid<acc_t> sigmoid(acc_t x) {
  const acc_t e = exp_nonpositive(-std::abs(x));
  const acc_t larger = acc_t{1} / (acc_t{1} + e);
  const acc_t smaller = e * larger;
  const bool positive = x >= acc_t{0};
  return {positive ? larger : smaller, positive ? smaller : larger};
}

}  // namespace accel_kernels
