// branch_fuse: what the bindings, the C++ twin and the CUDA kernels share. Needs no toolkit.

#pragma once

#include <cstdint>

#include "common/dispatch.h"
#include "common/partition.h"

struct CUstream_st;
using cudaStream_t = CUstream_st*;  // the same declaration as CUDA's own

namespace accel_kernels {

constexpr int kBranches = 3;

// Activations lie as [N, R, C] with R = T*H*W rows of a clip, channels fastest; s is [N, 3, C] in
// double for kDouble, else float.
struct BranchFuseShape {
  DType dtype;
  int batch;     // N
  int rows;      // R
  int channels;  // C
  const void* s;
};

// out = sum_i s_i f_i.
struct BranchFuseForward : BranchFuseShape {
  const void* f[kBranches];
  void* out;
};

// df_i = s_i g,   ds_i = sum over rows of g f_i.
//
// One pass over grad and f computes both. The sums are cut into work units of rows_per_unit rows of
// one clip; each writes one row of partial sums, then those are added in order.
struct BranchFuseBackward : BranchFuseShape {
  const void* f[kBranches];  // null if ds is
  const void* grad;
  void* df[kBranches];  // each like f, or null
  void* ds;             // like s, or null
  void* ds_partial;     // [row_units, N, 3, C]; ds itself if row_units is 1
  int rows_per_unit;
};

// Rows of one work unit: doubled from 64 while 512 blocks remain, which fill a large GPU twice.
// A function of the shape alone: the CPU twin and every GPU split the sums alike.
inline int branch_fuse_rows_per_unit(const BranchFuseShape& shape) {
  constexpr int64_t kBlocksWanted = 512;
  int rows = 64;
  while (rows < shape.rows &&
         shape.batch * int64_t{divide_up(shape.rows, 2 * rows)} >= kBlocksWanted) {
    rows *= 2;
  }
  return rows;
}

inline int branch_fuse_row_units(const BranchFuseBackward& params) {
  return divide_up(params.rows, params.rows_per_unit);
}

// C++ twin. Work units [begin, end) may run on any thread, then the finish sums the partials.
int64_t branch_fuse_fwd_units_cpp(const BranchFuseForward& params);
void branch_fuse_fwd_cpp(const BranchFuseForward& params, int64_t begin, int64_t end);
int64_t branch_fuse_bwd_units_cpp(const BranchFuseBackward& params);
void branch_fuse_bwd_cpp(const BranchFuseBackward& params, int64_t begin, int64_t end);
void branch_fuse_bwd_finish_cpp(const BranchFuseBackward& params);

}  // namespace accel_kernels

// CUDA launchers. Return the cudaError_t of the launch.
extern "C" int accel_branch_fuse_fwd(const accel_kernels::BranchFuseForward* params,
                                     cudaStream_t stream);
extern "C" int accel_branch_fuse_bwd(const accel_kernels::BranchFuseBackward* params,
                                     cudaStream_t stream);
