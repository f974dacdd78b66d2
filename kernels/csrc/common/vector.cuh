// Loads and stores of several neighbouring values at once, with conversion to the arithmetic type.

#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "common/dispatch.h"

namespace accel_kernels {

// kWidth values that one instruction moves: the alignment is what makes the compiler use it.
template <typename T, int kWidth>
struct alignas(sizeof(T) * kWidth) Vector {
  static_assert(sizeof(T) * kWidth <= 16, "a memory instruction moves at most 16 bytes");
  T value[kWidth];
};

template <int kWidth, typename T>
__device__ __forceinline__ Vector<T, kWidth> load_vector(const T* source) {
  return *reinterpret_cast<const Vector<T, kWidth>*>(source);
}

template <typename T, int kWidth>
__device__ __forceinline__ void store_vector(T* target, const Vector<T, kWidth>& vector) {
  *reinterpret_cast<Vector<T, kWidth>*>(target) = vector;
}

// kCount neighbouring values into registers, in 16-byte pieces when they divide into such pieces
// and `source` is aligned to them (kAligned).
template <int kCount, bool kAligned, typename T>
__device__ __forceinline__ void load_array(const T* source, T (&target)[kCount]) {
  constexpr int kPiece = 16 / sizeof(T);
  if constexpr (kAligned && kCount % kPiece == 0) {
#pragma unroll
    for (int i = 0; i < kCount; i += kPiece) {
      const Vector<T, kPiece> piece = load_vector<kPiece>(source + i);
#pragma unroll
      for (int j = 0; j < kPiece; ++j) target[i + j] = piece.value[j];
    }
  } else {
#pragma unroll
    for (int i = 0; i < kCount; ++i) target[i] = source[i];
  }
}

__device__ __forceinline__ float widen(float value) { return value; }
__device__ __forceinline__ double widen(double value) { return value; }
__device__ __forceinline__ float widen(__half value) { return __half2float(value); }
__device__ __forceinline__ float widen(__nv_bfloat16 value) { return __bfloat162float(value); }

// The one rounding of an output element (to nearest, ties to even).
template <typename scalar_t>
__device__ __forceinline__ scalar_t narrow(accumulate_t<scalar_t> value) {
  return value;
}
template <>
__device__ __forceinline__ __half narrow<__half>(float value) {
  return __float2half_rn(value);
}
template <>
__device__ __forceinline__ __nv_bfloat16 narrow<__nv_bfloat16>(float value) {
  return __float2bfloat16_rn(value);
}

// Whether pointer (null allowed) may be accessed `bytes` at a time.
__host__ __device__ inline bool is_aligned(const void* pointer, int bytes) {
  return reinterpret_cast<std::uintptr_t>(pointer) % static_cast<std::uintptr_t>(bytes) == 0;
}

}  // namespace accel_kernels
