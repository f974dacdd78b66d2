// Scalar types as the operators see them, and the switch from a run-time type to a template one.

#pragma once

#include <type_traits>

namespace accel_kernels {

enum class DType : int { kFloat = 0, kDouble = 1, kHalf = 2, kBFloat16 = 3 };

// Arithmetic type: fp64 for fp64, fp32 for everything else. Taps, gates, partial sums and parameter
// gradients are stored in it as well.
template <typename scalar_t>
struct Accumulate {
  using type = float;
};
template <>
struct Accumulate<double> {
  using type = double;
};
template <typename scalar_t>
using accumulate_t = typename Accumulate<scalar_t>::type;

template <typename T>
struct Tag {
  using type = T;
};

// Calls function(Tag<scalar_t>{}) for the type that `dtype` names. The 16-bit types are parameters
// because the host and the device spell them differently:
//
//   dispatch_dtype<Half, BFloat16>(params.dtype, [&](auto tag) {
//     using scalar_t = typename decltype(tag)::type;
//     return run<scalar_t>(params);
//   });
template <typename half_t, typename bfloat16_t, typename Function>
auto dispatch_dtype(DType dtype, const Function& function) {
  switch (dtype) {
    case DType::kDouble:
      return function(Tag<double>{});
    case DType::kHalf:
      return function(Tag<half_t>{});
    case DType::kBFloat16:
      return function(Tag<bfloat16_t>{});
    case DType::kFloat:
      break;
  }
  return function(Tag<float>{});
}

// Calls function(std::integral_constant<int, kRank>{}) with the first of the ascending kRank, kMore
// that `rank` fits in, else the last: matrices of `rank` columns are padded to that with zeros.
template <int kRank, int... kMore, typename Function>
auto dispatch_rank(int rank, const Function& function) {
  if constexpr (sizeof...(kMore) > 0) {
    if (rank > kRank) return dispatch_rank<kMore...>(rank, function);
  }
  return function(std::integral_constant<int, kRank>{});
}

}  // namespace accel_kernels
