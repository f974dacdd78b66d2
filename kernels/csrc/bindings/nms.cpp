// nms: schema, argument checks, allocation.

#include <ATen/ops/empty.h>

#include "bindings/checks.h"
#include "cuda/nms.h"

namespace accel_kernels {
namespace {

Tensor nms(const Tensor& boxes, const Tensor& candidates, double iou_threshold) {
  const char* op = "nms";
  TORCH_CHECK_VALUE(boxes.dim() == 3 && boxes.size(2) == 4 && boxes.is_contiguous(), op,
                    ": boxes must be contiguous [S, K, 4], got ", boxes.sizes(), " with strides ",
                    boxes.strides(), ".");
  TORCH_CHECK_TYPE(boxes.scalar_type() == at::kFloat || boxes.scalar_type() == at::kDouble, op,
                   ": boxes must be float32 or float64, got ", boxes.scalar_type(), ".");
  const int64_t sets = boxes.size(0);
  TORCH_CHECK_VALUE(candidates.sizes().equals({sets}) && candidates.scalar_type() == at::kLong &&
                        candidates.is_contiguous() && candidates.device() == boxes.device(),
                    op, ": candidates must be contiguous int64 [S] = [", sets, "] on ",
                    boxes.device(), ", got ", candidates.sizes(), " ", candidates.options(), ".");
  const int64_t most = boxes.is_cpu() ? std::numeric_limits<int>::max() : kMostNmsBoxes;
  TORCH_CHECK_VALUE(boxes.size(1) <= most && sets <= std::numeric_limits<int>::max(), op,
                    ": at most ", most, " boxes in a set are possible on ", boxes.device(),
                    ", got boxes of ", boxes.sizes(), ".");
  Tensor keep = at::empty({sets, boxes.size(1)}, boxes.options().dtype(at::kBool));
  if (keep.numel() == 0) return keep;
  const Nms params{dtype_of(op, boxes),
                   sets,
                   static_cast<int>(boxes.size(1)),
                   boxes.const_data_ptr(),
                   candidates.const_data_ptr<int64_t>(),
                   iou_threshold,
                   keep.mutable_data_ptr<bool>()};
  run_on_device(
      op, boxes,
      [&] {
        for_units(sets, keep.numel() * boxes.size(1), [&](int64_t begin, int64_t end) {
          nms_cpp(params, begin, end);
        });
      },
      [&](cudaStream_t stream) { return accel_nms(&params, stream); });
  return keep;
}

}  // namespace
}  // namespace accel_kernels

TORCH_LIBRARY_FRAGMENT(accel_kernels, m) {
  const auto tags = accel_kernels::operator_tags();
  m.def("nms(Tensor boxes, Tensor candidates, float iou_threshold) -> Tensor", tags);
}

TORCH_LIBRARY_IMPL(accel_kernels, CPU, m) { m.impl("nms", &accel_kernels::nms); }

#ifdef ACCEL_WITH_CUDA
TORCH_LIBRARY_IMPL(accel_kernels, CUDA, m) { m.impl("nms", &accel_kernels::nms); }
#endif
