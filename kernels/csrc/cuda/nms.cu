// nms: greedy suppression, one block for each set of boxes.

#include "common/box.h"
#include "common/launch.cuh"
#include "cuda/nms.h"

namespace accel_kernels {
namespace {

constexpr int kThreads = 256;
using Mask = unsigned long long;

// The block writes, for each box, a mask of the later boxes that it would suppress (pairs spread
// over all threads); then one warp walks through the boxes: lane w holds word w of those suppressed
// so far. A set of 200 boxes is 20000 overlaps and 200 short steps, and an image has one set for
// each class, so that nothing has to cross blocks. Bytes: boxes once, one per box of result.
template <typename T, int kWords>
__global__ void __launch_bounds__(kThreads) nms_kernel(const Nms params) {
  constexpr int kBoxes = 64 * kWords;
  static_assert(kBoxes * (sizeof(Box<T>) + kWords * sizeof(Mask)) <= 48 * 1024,
                "boxes and masks must fit in static shared memory");
  __shared__ Box<T> boxes[kBoxes];
  __shared__ Mask masks[kBoxes][kWords];

  const int count = params.boxes_per_set;
  const int64_t set = blockIdx.x;
  const int64_t given = params.candidates[set];
  const int candidates = given < 0 ? 0 : given < count ? static_cast<int>(given) : count;
  const auto* source = static_cast<const Box<T>*>(params.boxes) + set * count;
  const auto threshold = static_cast<T>(params.iou_threshold);
  bool* keep = params.keep + set * count;

  for (int i = threadIdx.x; i < candidates; i += kThreads) boxes[i] = source[i];
  __syncthreads();
  for (int item = threadIdx.x; item < candidates * kWords; item += kThreads) {
    const int i = item / kWords;
    const int first = item % kWords * 64;
    const Box<T> box = boxes[i];
    Mask mask = 0;
    for (int j = max(first, i + 1); j < min(first + 64, candidates); ++j) {
      if (!(overlap(box, boxes[j]) <= threshold)) mask |= Mask{1} << (j - first);
    }
    masks[i][item % kWords] = mask;
  }
  __syncthreads();
  if (threadIdx.x >= 32) return;

  const int word = min(static_cast<int>(threadIdx.x), kWords - 1);
  Mask suppressed = 0;
  for (int i = 0; i < candidates; ++i) {
    const bool kept = (__shfl_sync(~0u, suppressed, i / 64) >> (i % 64) & 1) == 0;
    if (kept) suppressed |= masks[i][word];
    if (threadIdx.x == 0) keep[i] = kept;
  }
  for (int i = candidates + threadIdx.x; i < count; i += 32) keep[i] = false;
}

template <typename T>
int launch(const Nms& params, cudaStream_t stream) {
  const auto blocks = static_cast<unsigned>(params.sets);
  if (params.boxes_per_set <= 256) {
    ACCEL_LAUNCH((nms_kernel<T, 4>), blocks, kThreads, stream, params);
  } else {
    ACCEL_LAUNCH((nms_kernel<T, 8>), blocks, kThreads, stream, params);
  }
  return static_cast<int>(cudaGetLastError());
}

}  // namespace
}  // namespace accel_kernels

extern "C" int accel_nms(const accel_kernels::Nms* params, cudaStream_t stream) {
  using namespace accel_kernels;
  return params->dtype == DType::kDouble ? launch<double>(*params, stream)
                                         : launch<float>(*params, stream);
}
