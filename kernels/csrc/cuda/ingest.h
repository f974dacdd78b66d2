// ingest: what the bindings, the C++ twin and the CUDA kernel share. Needs no toolkit.

#pragma once

#include <cstdint>

#include "common/dispatch.h"
#include "common/partition.h"

struct CUstream_st;
using cudaStream_t = CUstream_st*;  // the same declaration as CUDA's own

namespace accel_kernels {

// out[b,p,3l+c] = offset[c] + scale[c] * frames[b,l,p,c], zero for further channels; or, with
// `differences`, scale[c] * (frames[b,l+1,p,c] - frames[b,l,p,c]), all of them.
struct IngestParams {
  DType dtype;             // of out; mean and std are double for kDouble, else float
  int batch;               // B
  int frames_per_segment;  // L
  int pixels;              // P
  int channels;            // of out
  int differences;
  const std::uint8_t* frames;  // [B, L, P, 3]
  const void* mean;            // [3], of values in 0..1; null with differences
  const void* std;             // [3]
  void* out;                   // [B, P, channels]
};

// C++ twin. Work units [begin, end) may run on any thread.
int64_t ingest_units_cpp(const IngestParams& params);
void ingest_cpp(const IngestParams& params, int64_t begin, int64_t end);

}  // namespace accel_kernels

// CUDA launcher. Returns the cudaError_t of the launch.
extern "C" int accel_ingest(const accel_kernels::IngestParams* params, cudaStream_t stream);
