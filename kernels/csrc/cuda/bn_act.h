// bn_act: what the bindings, the C++ twin and the CUDA kernels share. Needs no toolkit.

#pragma once

#include <cstdint>

#include "common/dispatch.h"
#include "common/partition.h"

struct CUstream_st;
using cudaStream_t = CUstream_st*;  // the same declaration as CUDA's own

namespace accel_kernels {

// Activations lie as [B, P, C] (channels_last with P = H*W), C fastest: rows = B*P rows of C values.
// Everything per channel is double for kDouble, else float.
struct BnActShape {
  DType dtype;   // of activations
  int frames;    // B
  int pixels;    // P
  int channels;  // C

  int64_t rows() const { return static_cast<int64_t>(frames) * pixels; }
};

// Mean and variance (divided by the rows) of each channel, and the running statistics' step.
struct BnActStatistics : BnActShape {
  const void* x;
  void* mean;          // [C]
  void* var;           // [C]
  void* running_mean;  // [C], or null
  void* running_var;   // [C], or null
  double momentum;
  void* partial;  // [units, 2, C]: each unit's mean and its sum of squared distances from it
  int rows_per_unit;
};

// n = weight * (x - mean) * rstd + bias with rstd = 1 / sqrt(var + eps).
struct BnActNorm : BnActShape {
  const void* weight;  // [C], as the next three
  const void* bias;
  const void* mean;
  const void* var;
  double eps;
  int relu;
};

// y = relu(n + shortcut); pooled = mean of the rounded y over the pixels.
struct BnActForward : BnActNorm {
  const void* x;
  const void* shortcut;  // like x, or null
  void* y;
  void* mask;            // [rows, mask_bytes(C)] bits, least significant first: y > 0; or null
  void* pooled;          // [B, C], or null
  void* pooled_partial;  // [pixel_units, B, C]; pooled itself if there is one pixel unit
  int pixels_per_unit;
};

// With g1 = (grad + grad_pooled / P) where y > 0:
//   dbias = sum g1,  dweight = rstd * sum g1 * (x - mean),  dshortcut = g1,
//   dx = weight * rstd * (g1 - dbias / count - (x - mean) * rstd * dweight / count),
// or weight * rstd * g1 if mean and var do not depend on x. y > 0 comes from the mask, or from x.
struct BnActBackward : BnActNorm {
  const void* grad;
  const void* grad_pooled;  // [B, C], or null
  const void* x;            // null if neither sums nor dx nor the sign of y need it
  const void* mask;         // as in the forward, or null (no shortcut): the sign of n
  // The sums:
  void* dweight;  // [C]; read by the second pass, null there if statistics do not depend on x
  void* dbias;    // [C], likewise
  void* partial;  // [units, 2, C]: sums of g1 and of g1 * (x - mean)
  int rows_per_unit;
  // The second pass:
  const void* count;  // [1]: rows of all processes; or null: rows
  void* dx;           // like x, or null
  void* dshortcut;    // like x, or null
};

constexpr int mask_bytes(int channels) { return divide_up(channels, 8); }

constexpr int kChannelsPerBlock = 64;

// How many of `count` items a work unit of a reduction takes: doubled from 64 to 512 while 512
// blocks remain, which fill a large GPU. A function of the shape alone: the C++ twin and every GPU
// split the sums alike. 512 bounds what a sum loses to an unlucky shift (see the statistics).
inline int bn_act_unit_size(int64_t count, int64_t others, int channels) {
  constexpr int64_t kBlocksWanted = 512;
  const int64_t columns = others * divide_up(channels, kChannelsPerBlock);
  int size = 64;
  while (size < 512 && columns * divide_up(count, 2 * size) >= kBlocksWanted) size *= 2;
  return size;
}
inline int bn_act_rows_per_unit(const BnActShape& shape) {
  return bn_act_unit_size(shape.rows(), 1, shape.channels);
}
inline int bn_act_pixels_per_unit(const BnActShape& shape) {
  return bn_act_unit_size(shape.pixels, shape.frames, shape.channels);
}

// C++ twin. Work units [begin, end) may run on any thread, then the finish combines the partials.
int64_t bn_act_statistics_units_cpp(const BnActStatistics& params);
void bn_act_statistics_cpp(const BnActStatistics& params, int64_t begin, int64_t end);
void bn_act_statistics_finish_cpp(const BnActStatistics& params);

int64_t bn_act_fwd_units_cpp(const BnActForward& params);
void bn_act_fwd_cpp(const BnActForward& params, int64_t begin, int64_t end);
void bn_act_fwd_finish_cpp(const BnActForward& params);

int64_t bn_act_bwd_sums_units_cpp(const BnActBackward& params);
void bn_act_bwd_sums_cpp(const BnActBackward& params, int64_t begin, int64_t end);
void bn_act_bwd_sums_finish_cpp(const BnActBackward& params);

int64_t bn_act_bwd_units_cpp(const BnActBackward& params);
void bn_act_bwd_cpp(const BnActBackward& params, int64_t begin, int64_t end);

}  // namespace accel_kernels

// CUDA launchers. Return the cudaError_t of the launch.
extern "C" int accel_bn_act_statistics(const accel_kernels::BnActStatistics* params,
                                       cudaStream_t stream);
extern "C" int accel_bn_act_fwd(const accel_kernels::BnActForward* params, cudaStream_t stream);
extern "C" int accel_bn_act_bwd_sums(const accel_kernels::BnActBackward* params,
                                     cudaStream_t stream);
extern "C" int accel_bn_act_bwd(const accel_kernels::BnActBackward* params, cudaStream_t stream);
