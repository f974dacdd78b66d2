// deform_conv: where a tap samples, for both kernels.

#pragma once

#include <math.h>

#include "common/vector.cuh"
#include "cuda/deform_conv.h"

namespace accel_kernels {

// A warp or thread takes the k taps of one kernel row of one pixel.
struct TapRow {
  int64_t row;   // pixel, counted through the frames of the block
  int kernel_row;
  int p;         // pixel in its frame
  int64_t base;  // frame's first pixel in x

  __device__ __forceinline__ TapRow(const DeformConvShape& shape, int first_frame, unsigned index) {
    const int pixels = shape.height * shape.width;
    row = index / shape.kernel;
    kernel_row = static_cast<int>(index - row * shape.kernel);
    const int frame = static_cast<int>(row) / pixels;
    p = static_cast<int>(row) - frame * pixels;
    base = static_cast<int64_t>(first_frame + frame) * pixels;
  }
  // Of its first tap among all samples of the block, and of x.
  __device__ __forceinline__ int64_t sample(const DeformConvShape& shape) const {
    return (row * shape.kernel + kernel_row) * shape.kernel;
  }
  __device__ __forceinline__ int64_t sample_in_x(const DeformConvShape& shape) const {
    return ((base + p) * shape.kernel + kernel_row) * shape.kernel;
  }
};

// The four pixels around a sample, and its position between them.
template <typename acc_t>
struct Corners {
  acc_t y, x;        // distance to the upper left pixel, 0 to 1
  int64_t upper;     // pixel in its frame; lower is one line on, right one pixel
  bool exists[2][2];  // in the map (none if the sample is outside); [lower][right]

  __device__ __forceinline__ Corners(const DeformConvShape& shape, acc_t row, acc_t column) {
    const bool inside = row > -1 && row < static_cast<acc_t>(shape.height) && column > -1 &&
                        column < static_cast<acc_t>(shape.width);  // also false for NaN
    row = inside ? row : 0;
    column = inside ? column : 0;
    const int top = static_cast<int>(floor(row));
    const int left = static_cast<int>(floor(column));
    y = row - static_cast<acc_t>(top);
    x = column - static_cast<acc_t>(left);
    upper = static_cast<int64_t>(top) * shape.width + left;
    const bool has_top = inside && top >= 0;
    const bool has_bottom = inside && top + 1 < shape.height;
    const bool has_left = left >= 0;
    const bool has_right = left + 1 < shape.width;
    exists[0][0] = has_top && has_left;
    exists[0][1] = has_top && has_right;
    exists[1][0] = has_bottom && has_left;
    exists[1][1] = has_bottom && has_right;
  }
};

template <typename scalar_t>
__device__ __forceinline__ Corners<accumulate_t<scalar_t>> place(const DeformConvShape& shape,
                                                                 const TapRow& taps, int tap) {
  using acc_t = accumulate_t<scalar_t>;
  const auto* offset =
      static_cast<const scalar_t*>(shape.offset) + 2 * (taps.sample_in_x(shape) + tap);
  const int half = shape.kernel / 2;
  const acc_t row = static_cast<acc_t>(taps.p / shape.width - half + taps.kernel_row);
  const acc_t column = static_cast<acc_t>(taps.p % shape.width - half + tap);
  return {shape, row + widen(offset[0]), column + widen(offset[1])};
}

}  // namespace accel_kernels
