// mas_fuse: what its CUDA kernels share.

#pragma once

#include <type_traits>

#include "common/math.cuh"
#include "common/vector.cuh"
#include "cuda/mas_fuse.h"

namespace accel_kernels {

// Columns of b that a thread keeps in registers; further ones are read where they are used, which
// no published network needs (r = C / 64 is 1 to 8).
constexpr int kMasFuseRegisterRank = 8;

// Calls function with the smallest compile-time rank that holds `rank`, at most 8.
template <typename Function>
int dispatch_register_rank(int rank, const Function& function) {
  if (rank <= 1) return function(std::integral_constant<int, 1>{});
  if (rank <= 2) return function(std::integral_constant<int, 2>{});
  if (rank <= 4) return function(std::integral_constant<int, 4>{});
  return function(std::integral_constant<int, kMasFuseRegisterRank>{});
}

// (s0, s1) = softmax of d for kWidth channels of a pixel (n * P + p).
template <int kWidth, typename scalar_t>
__device__ __forceinline__ void load_shares(const MasFuseShape& params, int64_t pixel, int c,
                                            accumulate_t<scalar_t> (&s0)[kWidth],
                                            accumulate_t<scalar_t> (&s1)[kWidth]) {
  const auto* d = static_cast<const scalar_t*>(params.d) + pixel * 2 * params.channels + c;
  const auto first = load_vector<kWidth>(d);
  const auto second = load_vector<kWidth>(d + params.channels);
#pragma unroll
  for (int i = 0; i < kWidth; ++i) {
    const auto share = sigmoid(widen(first.value[i]) - widen(second.value[i]));
    s0[i] = share.value;
    s1[i] = share.complement;
  }
}

// Columns [first, first + kRank) of b for kWidth channels; zeros beyond the rank.
template <int kWidth, int kRank, typename acc_t>
__device__ __forceinline__ void load_columns(const MasFuseShape& params, int c, int first,
                                             acc_t (&b)[kWidth][kRank]) {
  const auto* rows = static_cast<const acc_t*>(params.b) + static_cast<int64_t>(c) * params.rank;
#pragma unroll
  for (int i = 0; i < kWidth; ++i) {
#pragma unroll
    for (int j = 0; j < kRank; ++j) {
      b[i][j] = first + j < params.rank ? rows[i * params.rank + first + j] : acc_t{0};
    }
  }
}

// y = b m for kWidth channels of one frame's pixel ((n * T + t) * P + p). `b` holds the columns
// [first, first + kRank).
template <int kWidth, int kRank, typename scalar_t>
__device__ __forceinline__ void motion(const MasFuseShape& params, int64_t pixel, int c, int first,
                                       const accumulate_t<scalar_t> (&b)[kWidth][kRank],
                                       accumulate_t<scalar_t> (&y)[kWidth]) {
  using acc_t = accumulate_t<scalar_t>;
  const auto* m = static_cast<const scalar_t*>(params.m) + pixel * params.rank;
#pragma unroll
  for (int i = 0; i < kWidth; ++i) y[i] = 0;
#pragma unroll
  for (int j = 0; j < kRank; ++j) {
    if (first + j < params.rank) {
      const acc_t value = widen(m[first + j]);
#pragma unroll
      for (int i = 0; i < kWidth; ++i) y[i] += b[i][j] * value;
    }
  }
  if (kRank < params.rank) {
    const auto* rows = static_cast<const acc_t*>(params.b) + static_cast<int64_t>(c) * params.rank;
    for (int j = 0; j < params.rank; ++j) {
      if (j >= first && j < first + kRank) continue;
      const acc_t value = widen(m[j]);
#pragma unroll
      for (int i = 0; i < kWidth; ++i) y[i] += rows[i * params.rank + j] * value;
    }
  }
}

}  // namespace accel_kernels
