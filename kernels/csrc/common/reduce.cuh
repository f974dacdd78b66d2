// Second stage of the two-stage reductions: partial sums to sums, in a fixed order.

#pragma once

#include <cstdint>

#include "common/launch.cuh"

namespace accel_kernels {

constexpr int kColumnSumLanes = 32;
constexpr int kColumnSumWarps = 16;

// out[c] = sum over rows of partial[row, c].
// One block sums 32 columns: each warp takes every 16th row (32 neighbouring columns are one
// 128-byte line in fp32), the last step adds the 16 warps in order. Many warps and the unrolled
// loop hide the latency of what is a short, narrow read from L2. Bytes: 4 per partial element.
template <typename acc_t>
__global__ void __launch_bounds__(kColumnSumLanes* kColumnSumWarps)
    column_sum_kernel(const acc_t* __restrict__ partial, acc_t* __restrict__ out, int rows,
                      int64_t columns) {
  __shared__ acc_t sums[kColumnSumWarps][kColumnSumLanes];
  const int lane = threadIdx.x % kColumnSumLanes;
  const int warp = threadIdx.x / kColumnSumLanes;
  const int64_t column = static_cast<int64_t>(blockIdx.x) * kColumnSumLanes + lane;

  acc_t sum = 0;
  if (column < columns) {
#pragma unroll 8
    for (int row = warp; row < rows; row += kColumnSumWarps) {
      sum += partial[row * columns + column];
    }
  }
  sums[warp][lane] = sum;
  __syncthreads();
  if (warp == 0 && column < columns) {
    for (int other = 1; other < kColumnSumWarps; ++other) sum += sums[other][lane];
    out[column] = sum;
  }
}

template <typename acc_t>
void launch_column_sum(const void* partial, void* out, int rows, int64_t columns,
                       cudaStream_t stream) {
  const auto blocks =
      static_cast<unsigned>((columns + kColumnSumLanes - 1) / kColumnSumLanes);
  ACCEL_LAUNCH(column_sum_kernel<acc_t>, blocks, kColumnSumLanes * kColumnSumWarps, stream,
               static_cast<const acc_t*>(partial), static_cast<acc_t*>(out), rows, columns);
}

}  // namespace accel_kernels
