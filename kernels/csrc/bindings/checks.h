// What the bindings of all operators share: argument checks, the dtype switch, threads, the device.
// Only files of bindings/ include torch.

#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#ifdef ACCEL_WITH_CUDA
// From c10 only: ATen/cuda needs headers that a bare CUDA toolkit lacks.
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#endif

#include <algorithm>
#include <limits>
#include <vector>

#include "common/dispatch.h"

struct CUstream_st;
using cudaStream_t = CUstream_st*;  // the same declaration as CUDA's own

namespace accel_kernels {

using at::Tensor;

// Tags of every operator. Compilers must pass the strides that eager mode would: the layout checks
// accept no others.
inline std::vector<at::Tag> operator_tags() {
  return {at::Tag::pt2_compliant_tag, at::Tag::needs_exact_strides};
}

inline DType dtype_of(const char* op, const Tensor& x) {
  switch (x.scalar_type()) {
    case at::kFloat:
      return DType::kFloat;
    case at::kDouble:
      return DType::kDouble;
    case at::kHalf:
      return DType::kHalf;
    case at::kBFloat16:
      return DType::kBFloat16;
    default:
      TORCH_CHECK_TYPE(false, op, ": x must be float32, float64, float16 or bfloat16, got ",
                       x.scalar_type(), ".");
  }
}

inline void check_activation(const char* op, const char* name, const Tensor& tensor) {
  TORCH_CHECK_VALUE(tensor.dim() == 4, op, ": ", name, " must be [N*T, C, H, W], got ",
                    tensor.sizes(), ".");
  TORCH_CHECK_VALUE(tensor.is_contiguous(at::MemoryFormat::ChannelsLast), op, ": ", name,
                    " must be contiguous in channels_last, got strides ", tensor.strides(),
                    " for shape ", tensor.sizes(),
                    "; use .contiguous(memory_format=torch.channels_last).");
}

// An activation of the dtype and device of another one.
inline void check_companion(const char* op, const char* name, const Tensor& tensor,
                            const char* x_name, const Tensor& x) {
  check_activation(op, name, tensor);
  TORCH_CHECK_TYPE(tensor.scalar_type() == x.scalar_type(), op, ": ", name, " must be ",
                   x.scalar_type(), " like ", x_name, ", got ", tensor.scalar_type(), ".");
  TORCH_CHECK_VALUE(tensor.device() == x.device(), op, ": ", name, " is on ", tensor.device(), ", ",
                    x_name, " is on ", x.device(), ".");
}

// Coefficients are stored in the arithmetic type of x and lie densely.
inline void check_coefficient(const char* op, const char* name, const Tensor& tensor, const Tensor& x) {
  const auto expected = x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  TORCH_CHECK_TYPE(tensor.scalar_type() == expected, op, ": ", name, " must be ", expected,
                   " (x is ", x.scalar_type(), "), got ", tensor.scalar_type(), ".");
  TORCH_CHECK_VALUE(tensor.device() == x.device(), op, ": ", name, " is on ", tensor.device(),
                    ", x is on ", x.device(), ".");
  TORCH_CHECK_VALUE(tensor.is_contiguous(), op, ": ", name, " must be contiguous, got strides ",
                    tensor.strides(), " for shape ", tensor.sizes(), ".");
}

// Runs body(begin, end) over work units on ATen's threads, as many as `elements` are worth.
template <typename Body>
void for_units(int64_t units, int64_t elements, const Body& body) {
  constexpr int64_t kElementsPerThread = 32768;  // below, waking a thread costs more than it saves
  const int64_t grain_size = std::max<int64_t>(units * kElementsPerThread / elements, 1);
  at::parallel_for(0, units, grain_size, body);
}

// Runs one of the two implementations on the device that holds x.
template <typename Cpp, typename Cuda>
void run_on_device(const char* op, const Tensor& x, const Cpp& cpp, const Cuda& cuda) {
  if (x.is_cpu()) {
    cpp();
    return;
  }
#ifdef ACCEL_WITH_CUDA
  const c10::cuda::CUDAGuard guard(x.device());
  const cudaStream_t stream = c10::cuda::getCurrentCUDAStream(x.device().index()).stream();
  C10_CUDA_CHECK(static_cast<cudaError_t>(cuda(stream)));
#else
  static_cast<void>(cuda);
  TORCH_CHECK(false, op, ": kernels._C was built without CUDA kernels, x is on ", x.device(), ".");
#endif
}

}  // namespace accel_kernels
