// temporal_taps: what the bindings, the C++ twin and the CUDA kernels share. Needs no toolkit.

#pragma once

#include <cstdint>

#include "common/dispatch.h"
#include "common/partition.h"

struct CUstream_st;
using cudaStream_t = CUstream_st*;  // the same declaration as CUDA's own

namespace accel_kernels {

// Sizes and coefficients. Activations lie as [N, T, P, C] (channels_last with P = H*W), C fastest.
struct TemporalTapsShape {
  DType dtype;       // of activations; w, a and their gradients: double for kDouble, else float
  int batch;         // N
  int frames;        // T
  int pixels;        // P
  int channels;      // C
  int w_per_sample;  // 1: w is [N, C, 3], 0: w is [C, 3]
  const void* w;
  const void* a;  // [N, T, C], or null for ones
};

// y[t] = sum_k w[k] * a[t+k-1] * x[t+k-1], zero outside 0..T-1; transposed (the gradient of x):
// y[t] = a[t] * sum_k w[2-k] * x[t+k-1].
struct TemporalTapsForward : TemporalTapsShape {
  const void* x;
  void* y;
  int transposed;
};

// dx[s] = a[s] * h[s] with h[s] = w[0] g[s+1] + w[1] g[s] + w[2] g[s-1],
// da[s] = sum_p x[s] h[s],   dw[k] = sum_{s,p} a[s] x[s] g[s-k+1]   (over n too if w is shared).
//
// All three need the same reads, so one pass computes them. The sums over pixels are cut into
// work units of kFramesPerUnit frames and pixels_per_unit pixels, each of which writes one row of
// partial sums; the rows are then added in order.
struct TemporalTapsBackward : TemporalTapsShape {
  const void* x;
  const void* grad;
  void* dx;          // like x, or null
  void* dw;          // like w
  void* da;          // like a, or null
  void* dw_partial;  // [frame_units * pixel_units, N, C, 3]; dw itself when dw_rows is 1
  void* da_partial;  // [pixel_units, N, T, C], or null; da itself when pixel_units is 1
  int pixels_per_unit;
};

constexpr int kFramesPerUnit = 8;

// Pixels of one backward work unit: doubled from 32 (partial sums are then 4/32 of one fp16 tensor
// at most) while 512 blocks remain, which fill a large GPU twice. A function of the shape alone:
// the CPU twin and every GPU split the sums alike.
inline int temporal_taps_pixels_per_unit(const TemporalTapsShape& shape) {
  constexpr int64_t kChannelsPerBlock = 64;
  constexpr int64_t kBlocksWanted = 512;
  const int64_t columns = static_cast<int64_t>(shape.batch) *
                          divide_up(shape.frames, kFramesPerUnit) *
                          divide_up(shape.channels, kChannelsPerBlock);
  int pixels = 32;
  while (pixels < shape.pixels && columns * divide_up(shape.pixels, 2 * pixels) >= kBlocksWanted) {
    pixels *= 2;
  }
  return pixels;
}

// The split of the sums of one backward call.
struct TemporalTapsUnits {
  explicit TemporalTapsUnits(const TemporalTapsBackward& params)
      : frame_units(divide_up(params.frames, kFramesPerUnit)),
        pixel_units(divide_up(params.pixels, params.pixels_per_unit)),
        count(static_cast<int64_t>(params.batch) * frame_units * pixel_units),
        dw_rows(frame_units * pixel_units * (params.w_per_sample ? 1 : params.batch)),
        dw_columns(int64_t{3} * params.channels * (params.w_per_sample ? params.batch : 1)),
        da_columns(static_cast<int64_t>(params.batch) * params.frames * params.channels) {}

  int frame_units;
  int pixel_units;
  int64_t count;
  int dw_rows;
  int64_t dw_columns;
  int64_t da_columns;
};

// C++ twin. Work units [begin, end) may run on any thread, then the finish sums the partials.
int64_t temporal_taps_fwd_units_cpp(const TemporalTapsForward& params);
void temporal_taps_fwd_cpp(const TemporalTapsForward& params, int64_t begin, int64_t end);
void temporal_taps_bwd_cpp(const TemporalTapsBackward& params, int64_t begin, int64_t end);
void temporal_taps_bwd_finish_cpp(const TemporalTapsBackward& params);

}  // namespace accel_kernels

// CUDA launchers. Return the cudaError_t of the launch.
extern "C" int accel_temporal_taps_fwd(const accel_kernels::TemporalTapsForward* params,
                                       cudaStream_t stream);
extern "C" int accel_temporal_taps_bwd(const accel_kernels::TemporalTapsBackward* params,
                                       cudaStream_t stream);
