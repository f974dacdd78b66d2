// What the kernels of bn_act share: who computes what, rows of eight channels, sums of a block.

#pragma once

#include <cmath>

#include "common/launch.cuh"
#include "common/vector.cuh"
#include "cuda/bn_act.h"

namespace accel_kernels {

// A thread works on 8 neighbouring channels (16 bytes in fp16, one byte of the mask) of every 32nd
// row; a block on 64 channels of one work unit of rows. 8 threads read 128 bytes of a row in fp16,
// and blocks of the same rows follow each other, so whole rows are read at about the same time.
template <typename scalar_, bool kVector_>
struct BnActTraits {
  using scalar_t = scalar_;
  using acc_t = accumulate_t<scalar_t>;
  static constexpr bool kVector = kVector_;  // 16-byte accesses; else element by element, any C
  // Two blocks of 256 threads leave 128 registers a thread; with a few rows of 16 bytes requested
  // at once they keep 32 KB or more in flight on an SM, more than latency x bandwidth needs.
  static constexpr int kBlocksPerSm = sizeof(scalar_t) == 8 ? 1 : 2;
  static constexpr int kRowsOfOne = !kVector ? 1 : (sizeof(scalar_t) == 2 ? 4 : 2);
  static constexpr int kRowsOfTwo = kVector ? 2 : 1;  // where two inputs are always read
};

constexpr int kWidth = 8;
constexpr int kLanes = kChannelsPerBlock / kWidth;
constexpr int kThreads = 256;
constexpr int kRowLanes = kThreads / kLanes;
constexpr int kWarps = kThreads / 32;
static_assert(32 % kLanes == 0, "whole rows of threads in a warp");

struct Place {
  __device__ explicit Place(int channels) {
    const int columns = (channels + kChannelsPerBlock - 1) / kChannelsPerBlock;
    unit = static_cast<int>(blockIdx.x) / columns;
    first_channel = static_cast<int>(blockIdx.x) % columns * kChannelsPerBlock;
    lane = static_cast<int>(threadIdx.x) % kLanes;
    row_lane = static_cast<int>(threadIdx.x) / kLanes;
    c = first_channel + lane * kWidth;
    const int left = channels - c;
    count = left < 0 ? 0 : (left < kWidth ? left : kWidth);
  }
  int unit;           // of rows
  int first_channel;  // of the block
  int lane;
  int row_lane;
  int c;      // first channel of the thread
  int count;  // its channels, 0..8
};

inline unsigned blocks_of(int64_t units, int channels) {
  return static_cast<unsigned>(units * divide_up(channels, kChannelsPerBlock));
}

// The thread's channels of one row, as stored. Those past the last are zeros.
template <bool kVector, typename T>
__device__ __forceinline__ void load_row(const T* source, int count, T (&target)[kWidth]) {
  if constexpr (kVector) {
    load_array<kWidth, true>(source, target);
  } else {
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      if (i < count) target[i] = source[i];
    }
  }
}

template <bool kVector, typename T>
__device__ __forceinline__ void store_row(T* target, int count, const T (&source)[kWidth]) {
  if constexpr (kVector) {
    constexpr int kPiece = 16 / sizeof(T);
#pragma unroll
    for (int i = 0; i < kWidth; i += kPiece) {
      Vector<T, kPiece> piece;
#pragma unroll
      for (int j = 0; j < kPiece; ++j) piece.value[j] = source[i + j];
      store_vector(target + i, piece);
    }
  } else {
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      if (i < count) target[i] = source[i];
    }
  }
}

// Values per channel; those past the last are `rest`.
template <typename acc_t>
__device__ __forceinline__ void load_channels(const void* source, const Place& place, acc_t rest,
                                              acc_t (&target)[kWidth]) {
#pragma unroll
  for (int i = 0; i < kWidth; ++i) {
    target[i] = i < place.count ? static_cast<const acc_t*>(source)[place.c + i] : rest;
  }
}

__device__ __forceinline__ float multiply_add(float a, float b, float c) { return fmaf(a, b, c); }
__device__ __forceinline__ double multiply_add(double a, double b, double c) { return fma(a, b, c); }

template <typename acc_t>
__device__ __forceinline__ acc_t reciprocal_deviation(acc_t var, double eps) {
  return acc_t{1} / std::sqrt(var + static_cast<acc_t>(eps));
}

// n = scale * x + offset as one fused operation: both passes find the same sign.
template <typename acc_t>
struct Affine {
  __device__ Affine(const BnActNorm& params, const Place& place) {
    acc_t mean[kWidth];
    load_channels(params.var, place, acc_t{1}, scale);
    load_channels(params.mean, place, acc_t{0}, mean);
    load_channels(params.bias, place, acc_t{0}, offset);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      const acc_t weight =
          i < place.count ? static_cast<const acc_t*>(params.weight)[place.c + i] : acc_t{0};
      scale[i] = weight * reciprocal_deviation(scale[i], params.eps);
      offset[i] = multiply_add(-mean[i], scale[i], offset[i]);
    }
  }
  acc_t scale[kWidth];
  acc_t offset[kWidth];
};

// Sums over the rows of threads of a block, in a fixed order: the rows of a warp, then the warps.
// Afterwards thread t < 64 calls total(k) for the sums of the block's channel t.
template <int kSums, typename acc_t>
struct BlockSums {
  using Shared = acc_t[kWarps][kSums][kChannelsPerBlock];

  __device__ BlockSums(acc_t (&values)[kSums][kWidth], const Place& place, Shared& shared_)
      : shared(shared_) {
#pragma unroll
    for (int k = 0; k < kSums; ++k) {
#pragma unroll
      for (int i = 0; i < kWidth; ++i) {
        for (int step = kLanes; step < 32; step *= 2) {
          values[k][i] += __shfl_xor_sync(0xffffffffu, values[k][i], step);
        }
        if (place.row_lane % (32 / kLanes) == 0) {
          shared[threadIdx.x / 32][k][place.lane * kWidth + i] = values[k][i];
        }
      }
    }
    __syncthreads();
  }
  __device__ acc_t total(int k) const {
    acc_t sum = 0;
    for (int warp = 0; warp < kWarps; ++warp) sum += shared[warp][k][threadIdx.x];
    return sum;
  }
  Shared& shared;
};

constexpr int kFinishLanes = 32;
constexpr int kFinishWarps = 16;
constexpr int kFinishThreads = kFinishLanes * kFinishWarps;

// Sum of value(unit) over the units, for each of a block's 32 columns; every thread of a column
// gets it. Each warp takes every 16th unit, then the 16 warps are added in order.
template <typename acc_t, typename Value>
__device__ __forceinline__ acc_t column_total(int units, acc_t (&shared)[kFinishWarps][kFinishLanes],
                                              const Value& value) {
  const int lane = static_cast<int>(threadIdx.x) % kFinishLanes;
  const int warp = static_cast<int>(threadIdx.x) / kFinishLanes;
  acc_t sum = 0;
#pragma unroll 2
  for (int unit = warp; unit < units; unit += kFinishWarps) sum += value(unit);
  __syncthreads();  // of the previous call
  shared[warp][lane] = sum;
  __syncthreads();
  sum = 0;
  for (int other = 0; other < kFinishWarps; ++other) sum += shared[other][lane];
  return sum;
}

}  // namespace accel_kernels
