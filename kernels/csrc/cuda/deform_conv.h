// deform_conv: what the bindings, the C++ twin and the CUDA kernels share. Needs no toolkit.

#pragma once

#include <cstdint>

#include "common/dispatch.h"

struct CUstream_st;
using cudaStream_t = CUstream_st*;  // the same declaration as CUDA's own

namespace accel_kernels {

// Sizes and the sampled map. x lies as [B, P, C] (channels_last with P = H*W), offset as
// [B, P, k*k, 2] with (dy, dx) innermost; stride 1, padding k/2, k odd.
//
// The convolution is a GEMM over columns [rows, k*k, C], a row being one pixel of one frame:
// column[row, q, c] = x~(c, i - k/2 + q/k + dy, j - k/2 + q%k + dx) where x~ interpolates
// bilinearly between pixels and is 0 unless -1 < y < H and -1 < x < W; pixels outside the map are 0.
// The bindings run the GEMMs, on a block of columns that stays in cache.
struct DeformConvShape {
  DType dtype;
  int batch;
  int channels;
  int height;
  int width;
  int kernel;
  const void* x;
  const void* offset;
};

// Columns of the frames [first_frame, first_frame + frames), in x's type.
struct DeformConvColumns : DeformConvShape {
  int first_frame;
  int frames;
  void* columns;
};

// Gradients of the same frames from those of their columns. A sample hands its gradient to the four
// pixels around it, in any order, so dx is summed in 64-bit integers, whose sum has no order: the
// unit is 2^-62 of a bound of the sum, rounded up to a power of two. With v the value at a corner
// and ly, lx the position between corners, per channel and summed over channels:
// doffset_y = dcolumn * ((1-lx) * (v10-v00) + lx * (v11-v01)), doffset_x likewise.
struct DeformConvGradient : DeformConvShape {
  int first_frame;
  int frames;
  const void* dcolumns;
  const double* sum_bound;  // one number on the device: no |sum| in dx is larger
  int64_t* dx_sums;         // [frames, P, C], zeros before; null: no dx
  int* not_finite;          // on the device, 0 before the first frame; set where dcolumns is not
  void* dx;                 // like x
  void* doffset;            // like offset, or null
};

// C++ twin, float and double only; rows count from first_frame on. It works on copies of whole
// frames with a border of zeros, so that no sample needs a case of its own: one pixel on each side
// and two rows more at the end, to which samples outside the map are sent.
inline int64_t deform_conv_padded_size(const DeformConvShape& shape) {
  return (int64_t{shape.height} + 3) * (shape.width + 2) * shape.channels;
}
void deform_conv_pad_cpp(const DeformConvShape& shape, int first_frame, int frames, void* padded);
void deform_conv_columns_cpp(const DeformConvShape& shape, const void* padded, int first_frame,
                             int64_t begin_row, int64_t end_row, void* columns);
// Adds to padded_dx (layout of `padded`, or null) and writes doffset (or null), rows in order.
void deform_conv_gradient_cpp(const DeformConvShape& shape, const void* padded, int first_frame,
                              int64_t begin_row, int64_t end_row, const void* dcolumns,
                              void* padded_dx, void* doffset);
void deform_conv_crop_cpp(const DeformConvShape& shape, const void* padded_dx, int first_frame,
                          int frames, void* dx);

}  // namespace accel_kernels

// CUDA launchers. Return the cudaError_t of the launch.
extern "C" int accel_deform_conv_columns(const accel_kernels::DeformConvColumns* params,
                                         cudaStream_t stream);
extern "C" int accel_deform_conv_gradient(const accel_kernels::DeformConvGradient* params,
                                          cudaStream_t stream);
