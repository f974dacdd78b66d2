// 16-bit floating-point storage types of the C++ twins, and rows of them to and from float.
// Branch-free, so that the compiler turns the loops into vector code without F16C or AVX-512.

#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "common/clones.h"

namespace accel_kernels {

struct Half {
  std::uint16_t bits;
};
struct BFloat16 {
  std::uint16_t bits;
};

ACCEL_INLINE float float_of_bits(std::uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}
ACCEL_INLINE std::uint32_t bits_of_float(float value) {
  std::uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}

ACCEL_INLINE float widen(float value) { return value; }
ACCEL_INLINE double widen(double value) { return value; }
ACCEL_INLINE float narrow(float value, float*) { return value; }
ACCEL_INLINE double narrow(double value, double*) { return value; }

ACCEL_INLINE float widen(BFloat16 value) {
  return float_of_bits(static_cast<std::uint32_t>(value.bits) << 16);
}

// Exponent and mantissa move to float's place; multiplying by 2^112 corrects the exponent bias
// (127 - 15), for subnormals too. What then reads 2^16 or more was infinity or NaN.
ACCEL_INLINE float widen(Half value) {
  const std::uint32_t sign = (value.bits & 0x8000u) << 16;
  const std::uint32_t shifted = (value.bits & 0x7fffu) << 13;
  const std::uint32_t scaled = bits_of_float(float_of_bits(shifted) * 0x1p112f);
  const std::uint32_t special = shifted >= 0x0f800000u ? 0x7f800000u : 0u;
  return float_of_bits(sign | scaled | special);
}

// These round to nearest, ties to even.
ACCEL_INLINE BFloat16 narrow(float value, BFloat16*) {
  const std::uint32_t bits = bits_of_float(value);
  const std::uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const bool is_nan = (bits & 0x7fffffffu) > 0x7f800000u;
  return {static_cast<std::uint16_t>(is_nan ? 0x7fc0u : rounded)};
}

// Below 2^-14 the result is subnormal: adding 0.5 makes float round at 2^-24, half's smallest step.
ACCEL_INLINE Half narrow(float value, Half*) {
  const std::uint32_t bits = bits_of_float(value);
  const std::uint32_t sign = (bits >> 16) & 0x8000u;
  const std::uint32_t magnitude = bits & 0x7fffffffu;
  const std::uint32_t normal =
      (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  const std::uint32_t subnormal = bits_of_float(float_of_bits(magnitude) + 0.5f) - 0x3f000000u;
  const std::uint32_t infinite = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
  std::uint32_t result = magnitude < 0x38800000u ? subnormal : normal;
  result = magnitude >= 0x477ff000u ? infinite : result;  // 65520 and more round to infinity
  return {static_cast<std::uint16_t>(sign | result)};
}

template <typename scalar_t>
ACCEL_INLINE void widen_row(const scalar_t* source, float* target, int count) {
  for (int i = 0; i < count; ++i) target[i] = widen(source[i]);
}
template <typename scalar_t>
ACCEL_INLINE void narrow_row(const float* source, scalar_t* target, int count) {
  for (int i = 0; i < count; ++i) target[i] = narrow(source[i], static_cast<scalar_t*>(nullptr));
}

// A row in the arithmetic type: `source` itself, or widened into `buffer`.
template <typename scalar_t, typename acc_t>
ACCEL_INLINE const acc_t* wide_row(const scalar_t* source, acc_t* buffer, int count) {
  if constexpr (std::is_same_v<scalar_t, acc_t>) {
    return source;
  } else {
    widen_row(source, buffer, count);
    return buffer;
  }
}

}  // namespace accel_kernels
