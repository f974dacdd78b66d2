// Neighbouring channels in one vector register, for the C++ twins: loops over frames keep what they
// need of each channel there.

#pragma once

#include <cstring>

#include "common/clones.h"
#include "common/dispatch.h"
#include "common/host_types.h"

namespace accel_kernels {

// What one vector instruction of AVX2 processes; other instruction sets split or pair it.
template <typename acc_t>
struct Lanes {
  static constexpr int kCount = 32 / sizeof(acc_t);
  typedef acc_t type __attribute__((vector_size(32)));
};

// The first `count` lanes from `source`, the others zero; kFull: all of them.
template <bool kFull, typename scalar_t, typename Vector>
ACCEL_INLINE void load_lanes(const scalar_t* source, int count, Vector& target) {
  using acc_t = accumulate_t<scalar_t>;
  constexpr int kLanes = Lanes<acc_t>::kCount;
  if constexpr (kFull && sizeof(scalar_t) == sizeof(acc_t)) {
    std::memcpy(&target, source, sizeof(target));
  } else {
    acc_t values[kLanes] = {};
    const int loaded = kFull ? kLanes : count;
    for (int i = 0; i < loaded; ++i) values[i] = widen(source[i]);
    std::memcpy(&target, values, sizeof(target));
  }
}

// The first `count` lanes to `target`, rounded once; kFull: all of them.
template <bool kFull, typename scalar_t, typename Vector>
ACCEL_INLINE void store_lanes(const Vector& source, scalar_t* target, int count) {
  using acc_t = accumulate_t<scalar_t>;
  constexpr int kLanes = Lanes<acc_t>::kCount;
  if constexpr (kFull && sizeof(scalar_t) == sizeof(acc_t)) {
    std::memcpy(target, &source, sizeof(source));
  } else {
    acc_t values[kLanes];
    std::memcpy(values, &source, sizeof(source));
    const int stored = kFull ? kLanes : count;
    for (int i = 0; i < stored; ++i) target[i] = narrow(values[i], static_cast<scalar_t*>(nullptr));
  }
}

// The sum of the lanes at `source`, halves first: the order is that of every instruction set.
template <typename acc_t>
ACCEL_INLINE acc_t sum_lanes(const acc_t* source) {
  constexpr int kLanes = Lanes<acc_t>::kCount;
  acc_t values[kLanes];
  std::memcpy(values, source, sizeof(values));
  for (int width = kLanes / 2; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) values[i] += values[i + width];
  }
  return values[0];
}

}  // namespace accel_kernels
