// nms, C++ twin of the CUDA kernel: raw pointers, free of torch; the bindings spread sets over
// threads.

#include "cuda/nms.h"

#include <algorithm>

#include "common/box.h"

namespace accel_kernels {
namespace {

template <typename T>
void suppress(const Nms& params, int64_t set) {
  const int count = params.boxes_per_set;
  const auto* boxes = static_cast<const Box<T>*>(params.boxes) + set * count;
  bool* keep = params.keep + set * count;
  const auto candidates = static_cast<int>(std::clamp<int64_t>(params.candidates[set], 0, count));
  const auto threshold = static_cast<T>(params.iou_threshold);
  std::fill_n(keep, candidates, true);
  std::fill_n(keep + candidates, count - candidates, false);
  for (int i = 0; i < candidates; ++i) {
    if (!keep[i]) continue;
    for (int j = i + 1; j < candidates; ++j) {
      if (keep[j]) keep[j] = overlap(boxes[i], boxes[j]) <= threshold;
    }
  }
}

}  // namespace

void nms_cpp(const Nms& params, int64_t begin, int64_t end) {
  for (int64_t set = begin; set < end; ++set) {
    if (params.dtype == DType::kDouble) {
      suppress<double>(params, set);
    } else {
      suppress<float>(params, set);
    }
  }
}

}  // namespace accel_kernels
