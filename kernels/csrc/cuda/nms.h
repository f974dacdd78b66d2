// nms: what the bindings, the C++ twin and the CUDA kernel share. Needs no toolkit.

#pragma once

#include <cstdint>

#include "common/dispatch.h"

struct CUstream_st;
using cudaStream_t = CUstream_st*;  // the same declaration as CUDA's own

namespace accel_kernels {

// Greedy suppression in independent sets. The boxes (left, top, right, bottom) of a set come best
// first; keep[i] says whether no kept box before i overlaps it by more than iou_threshold. An
// undefined overlap (two boxes without area) suppresses too.
struct Nms {
  DType dtype;  // of boxes: kFloat or kDouble
  int64_t sets;
  int boxes_per_set;          // K
  const void* boxes;          // [sets, K, 4]
  const int64_t* candidates;  // [sets]: the first so many boxes take part, the others are not kept
  double iou_threshold;
  bool* keep;  // [sets, K]
};

constexpr int kMostNmsBoxes = 512;  // per set, of the CUDA kernel

// C++ twin: sets [begin, end), on any thread.
void nms_cpp(const Nms& params, int64_t begin, int64_t end);

}  // namespace accel_kernels

// CUDA launcher. Returns the cudaError_t of the launch.
extern "C" int accel_nms(const accel_kernels::Nms* params, cudaStream_t stream);
