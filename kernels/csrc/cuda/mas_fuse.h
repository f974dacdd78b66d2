// mas_fuse: what the bindings, the C++ twin and the CUDA kernels share. Needs no toolkit.

#pragma once

#include <cstdint>

#include "common/dispatch.h"
#include "common/partition.h"

struct CUstream_st;
using cudaStream_t = CUstream_st*;  // the same declaration as CUDA's own

namespace accel_kernels {

constexpr int kMasFuseMaxRank = 32;

// Activations lie as [N, T, P, channels] (channels_last with P = H*W), channels fastest; x, m, d
// and their gradients have `dtype`, b, w and theirs double for kDouble, else float.
struct MasFuseShape {
  DType dtype;
  int batch;     // N
  int frames;    // T
  int pixels;    // P
  int channels;  // C
  int rank;      // r, 1 to kMasFuseMaxRank
  const void* x;  // [N, T, P, C]
  const void* m;  // [N, T, P, r]
  const void* d;  // [N, P, 2, C]
  const void* b;  // [C, r]
  const void* w;  // [C, 3]
};

// out[t] = sum_k w[k] q[t+k-1], zero outside 0..T-1, with q = s0 y + s1 x, y = b m, and
// (s0, s1) = softmax(d) over its two halves, the same for all frames of a clip.
struct MasFuseForward : MasFuseShape {
  void* out;  // like x
};

// With h[t] = w[0] g[t+1] + w[1] g[t] + w[2] g[t-1], the gradient of q:
//   dx = s1 h,   dm[j] = sum_c b[c,j] s0 h,   dd = +-s0 s1 sum_t h (y - x),
//   dw[k] = sum q[t] g[t-k+1],   db[j] = sum m[j] s0 h   (both over n, t, p).
//
// One pass over grad and x computes all five. The sums over pixels are cut into work units of
// pixels_per_unit pixels of one clip; each writes one row of partial sums, then rows are added in
// order. The sum over channels in dm is cut likewise where one warp does not cover C (CUDA only).
struct MasFuseBackward : MasFuseShape {
  const void* grad;
  void* dx;          // like x, or null
  void* dm;          // like m, or null
  void* dd;          // like d, or null
  void* dw;          // [C, 3]
  void* db;          // [C, r]
  void* dw_partial;  // [units, C, 3]; dw itself if there is one unit
  void* db_partial;  // [units, C, r]; db itself if there is one unit
  void* dm_partial;  // [channel_blocks, N, T, P, r]; null if dm is or there is one channel block
  int pixels_per_unit;
};

// Pixels of one backward work unit: doubled from 32 while 512 blocks remain, which fill a large GPU
// twice. A function of the shape alone: the CPU twin and every GPU split the sums alike.
inline int mas_fuse_pixels_per_unit(const MasFuseShape& shape) {
  constexpr int64_t kBlocksWanted = 512;
  int pixels = 32;
  while (pixels < shape.pixels &&
         shape.batch * int64_t{divide_up(shape.pixels, 2 * pixels)} >= kBlocksWanted) {
    pixels *= 2;
  }
  return pixels;
}

inline int64_t mas_fuse_bwd_units(const MasFuseBackward& params) {
  return params.batch * int64_t{divide_up(params.pixels, params.pixels_per_unit)};
}

// C++ twin. Work units [begin, end) may run on any thread, then the finish sums the partials.
int64_t mas_fuse_fwd_units_cpp(const MasFuseForward& params);
void mas_fuse_fwd_cpp(const MasFuseForward& params, int64_t begin, int64_t end);
void mas_fuse_bwd_cpp(const MasFuseBackward& params, int64_t begin, int64_t end);
void mas_fuse_bwd_finish_cpp(const MasFuseBackward& params);

}  // namespace accel_kernels

// CUDA launchers. Return the cudaError_t of the launch.
extern "C" int accel_mas_fuse_fwd(const accel_kernels::MasFuseForward* params,
                                  cudaStream_t stream);
// Rows of dm_partial that the backward wants.
extern "C" int accel_mas_fuse_bwd_channel_blocks(const accel_kernels::MasFuseBackward* params);
extern "C" int accel_mas_fuse_bwd(const accel_kernels::MasFuseBackward* params,
                                  cudaStream_t stream);
