// diff_gate_shift: what the bindings, the C++ twin and the CUDA kernels share. Needs no toolkit.

#pragma once

#include <algorithm>
#include <cstdint>

#include "common/dispatch.h"
#include "common/partition.h"

struct CUstream_st;
using cudaStream_t = CUstream_st*;  // the same declaration as CUDA's own

namespace accel_kernels {

// Sizes and coefficients. x, y and their gradients lie as [N, T, P, C], z, v and theirs as
// [N, T, P, r] (channels_last with P = H*W), channels fastest.
struct DiffGateShiftShape {
  DType dtype;   // of activations; m, c, w and their gradients: double for kDouble, else float
  int batch;     // N
  int frames;    // T
  int pixels;    // P
  int channels;  // C
  int rank;      // r, 1..kMaxRank
  const void* x;
  const void* z;
  const void* v;
  const void* m;  // [2, C, r]
  const void* c;  // [2, C]
  const void* w;  // [C, 3]
};

constexpr int kDiffGateShiftMaxRank = 64;

// With s0 = sigmoid(m0 z + c0), s1 = sigmoid(m1 v + c1) and q = x * (0.5 + 0.5 * (s0 + s1)):
// y[t] = sum_k w[k] * q[t+k-1], zero outside 0..T-1.
struct DiffGateShiftForward : DiffGateShiftShape {
  void* y;
};

// With h[s] = w[0] g[s+1] + w[1] g[s] + w[2] g[s-1] and d_i = 0.5 * h * x * s_i * (1 - s_i):
// dx = h * (0.5 + 0.5 * (s0 + s1)),   dz = m0^T d_0,   dv = m1^T d_1,
// dm_0 = sum d_0 z^T,   dm_1 = sum d_1 v^T,   dc_i = sum d_i,   dw[k] = sum q[s] g[s-k+1].
//
// One pass over x and g computes all of them. The items of the sums over N, T and P are pixels of
// kFramesPerUnit frames, in the order [N, frame units, P]; a work unit is a run of items_per_unit
// items and writes one row of partial sums; the rows are then added in order.
struct DiffGateShiftBackward : DiffGateShiftShape {
  const void* grad;
  void* dx;
  void* dz;
  void* dv;
  void* dm;
  void* dc;
  void* dw;
  void* dm_partial;  // [units, 2, C, r]; dm itself when there is one unit, dc and dw alike
  void* dc_partial;  // [units, 2, C]
  void* dw_partial;  // [units, C, 3]
  void* dz_partial;  // CUDA: [2, channel tiles, N, T, P, r], or null where there is one tile
  int items_per_unit;
};

// The split of the sums of one backward call.
struct DiffGateShiftUnits {
  static constexpr int kFramesPerUnit = 8;

  DiffGateShiftUnits(const DiffGateShiftShape& shape, int items_per_unit)
      : frame_units(divide_up(shape.frames, kFramesPerUnit)),
        items(static_cast<int64_t>(shape.batch) * frame_units * shape.pixels),
        count(divide_up(items, items_per_unit)) {}

  int frame_units;
  int64_t items;
  int count;
};

// Items of one backward unit: `at_least`, doubled while `units_wanted` units remain. A function of
// the shape alone.
inline int diff_gate_shift_items_per_unit(const DiffGateShiftShape& shape, int at_least,
                                          int units_wanted) {
  int items = at_least;
  while (DiffGateShiftUnits(shape, 2 * items).count >= units_wanted) items *= 2;
  return items;
}

// Channels of one lane of the CUDA backward pass, a block takes 32 times as many: 8 bytes of x if
// that divides C and the pointers, else one. More would not leave registers for the sums.
inline int diff_gate_shift_bwd_width(const DiffGateShiftBackward& params, int element_size) {
  const auto addresses = reinterpret_cast<std::uintptr_t>(params.x) |
                         reinterpret_cast<std::uintptr_t>(params.grad) |
                         reinterpret_cast<std::uintptr_t>(params.dx);
  const int width = 8 / element_size;
  return params.channels % width == 0 && addresses % 8 == 0 ? width : 1;
}

// C++ twin. Work units [begin, end) may run on any thread, then the finish sums the partials.
int64_t diff_gate_shift_fwd_units_cpp(const DiffGateShiftForward& params);
void diff_gate_shift_fwd_cpp(const DiffGateShiftForward& params, int64_t begin, int64_t end);
void diff_gate_shift_bwd_cpp(const DiffGateShiftBackward& params, int64_t begin, int64_t end);
void diff_gate_shift_bwd_finish_cpp(const DiffGateShiftBackward& params);

}  // namespace accel_kernels

// CUDA launchers. Return the cudaError_t of the launch.
extern "C" int accel_diff_gate_shift_fwd(const accel_kernels::DiffGateShiftForward* params,
                                         cudaStream_t stream);
extern "C" int accel_diff_gate_shift_bwd(const accel_kernels::DiffGateShiftBackward* params,
                                         cudaStream_t stream);
