// Operators of the namespace accel_kernels: schemas, argument checks, allocation, dispatch. The
// only file that includes torch. Loaded with torch.ops.load_library, never imported.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros_like.h>
#include <torch/library.h>
#include <torch/version.h>

#ifdef ACCEL_WITH_CUDA
// From c10 only: ATen/cuda needs headers that a bare CUDA toolkit lacks.
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#endif

#include <algorithm>
#include <array>
#include <limits>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "cuda/temporal_taps.h"

namespace accel_kernels {
namespace {

using at::Tensor;

// ---- shared by all operators -------------------------------------------------------------------

DType dtype_of(const char* op, const Tensor& x) {
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

void check_activation(const char* op, const char* name, const Tensor& tensor) {
  TORCH_CHECK_VALUE(tensor.dim() == 4, op, ": ", name, " must be [N*T, C, H, W], got ",
                    tensor.sizes(), ".");
  TORCH_CHECK_VALUE(tensor.is_contiguous(at::MemoryFormat::ChannelsLast), op, ": ", name,
                    " must be contiguous in channels_last, got strides ", tensor.strides(),
                    " for shape ", tensor.sizes(),
                    "; use .contiguous(memory_format=torch.channels_last).");
}

// Coefficients are stored in the arithmetic type of x and lie densely.
void check_coefficient(const char* op, const char* name, const Tensor& tensor, const Tensor& x) {
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

// ---- temporal_taps -----------------------------------------------------------------------------

void fill_shape(const char* op, const Tensor& x, const Tensor& w, const std::optional<Tensor>& a,
                int64_t num_segments, TemporalTapsShape* shape) {
  check_activation(op, "x", x);
  const int64_t channels = x.size(1);
  TORCH_CHECK_VALUE(num_segments >= 1 && x.size(0) % num_segments == 0, op,
                    ": x must hold whole clips of num_segments = ", num_segments,
                    " frames, got x of ", x.sizes(), ".");
  const int64_t batch = x.size(0) / num_segments;
  const bool shared = w.sizes().equals({channels, 3});
  TORCH_CHECK_VALUE(shared || w.sizes().equals({batch, channels, 3}), op,
                    ": w must be [C, 3] = [", channels, ", 3] or [N, C, 3] = [", batch, ", ",
                    channels, ", 3], got ", w.sizes(), " (x is ", x.sizes(), ").");
  check_coefficient(op, "w", w, x);
  if (a.has_value()) {
    TORCH_CHECK_VALUE(a->sizes().equals({batch, num_segments, channels}), op,
                      ": a must be [N, T, C] = [", batch, ", ", num_segments, ", ", channels,
                      "], got ", a->sizes(), " (x is ", x.sizes(), ").");
    check_coefficient(op, "a", *a, x);
  }
  // Positions inside one frame of all clips are 32-bit in the kernels, offsets are 64-bit.
  TORCH_CHECK_VALUE(
      num_segments <= std::numeric_limits<int>::max() &&
          batch * x.size(2) * x.size(3) * channels <= std::numeric_limits<int>::max(),
      op, ": N*H*W*C must be below 2^31, got x of ", x.sizes(), "; split the batch.");

  shape->dtype = dtype_of(op, x);
  shape->batch = static_cast<int>(batch);
  shape->frames = static_cast<int>(num_segments);
  shape->pixels = static_cast<int>(x.size(2) * x.size(3));
  shape->channels = static_cast<int>(channels);
  shape->w_per_sample = shared ? 0 : 1;
  shape->w = w.const_data_ptr();
  shape->a = a.has_value() ? a->const_data_ptr() : nullptr;
}

void run_forward(const char* op, const Tensor& x, const TemporalTapsForward& params) {
  run_on_device(
      op, x,
      [&] {
        for_units(temporal_taps_fwd_units_cpp(params), x.numel(), [&](int64_t begin, int64_t end) {
          temporal_taps_fwd_cpp(params, begin, end);
        });
      },
      [&](cudaStream_t stream) { return accel_temporal_taps_fwd(&params, stream); });
}

Tensor temporal_taps(const Tensor& x, const Tensor& w, const std::optional<Tensor>& a,
                     int64_t num_segments) {
  TemporalTapsForward params{};
  fill_shape("temporal_taps", x, w, a, num_segments, &params);
  Tensor y = at::empty_like(x, {}, at::MemoryFormat::ChannelsLast);
  if (y.numel() == 0) return y;
  params.x = x.const_data_ptr();
  params.y = y.mutable_data_ptr();
  run_forward("temporal_taps", x, params);
  return y;
}

// Gradients for which output_mask is false come back as empty tensors of shape [0].
std::tuple<Tensor, Tensor, Tensor> temporal_taps_backward(
    const Tensor& grad, const std::optional<Tensor>& x, const Tensor& w,
    const std::optional<Tensor>& a, int64_t num_segments, std::array<bool, 3> output_mask) {
  const char* op = "temporal_taps_backward";
  const bool want_dx = output_mask[0];
  const bool want_dw = output_mask[1];
  const bool want_da = output_mask[2];
  TemporalTapsShape shape{};
  fill_shape(op, grad, w, a, num_segments, &shape);
  TORCH_CHECK_VALUE(a.has_value() || !want_da, op, ": output_mask asks for da, but a is None.");

  const auto coefficient_options = w.options();
  Tensor dx = want_dx ? at::empty_like(grad, {}, at::MemoryFormat::ChannelsLast)
                      : at::empty({0}, grad.options());
  Tensor dw = at::empty({0}, coefficient_options);
  Tensor da = at::empty({0}, coefficient_options);
  if (grad.numel() == 0) {
    if (want_dw) dw = at::zeros_like(w);
    if (want_da) da = at::zeros_like(*a);
    return {dx, dw, da};
  }
  if (!want_dw && !want_da) {
    if (!want_dx) return {dx, dw, da};
    TemporalTapsForward params{shape};
    params.x = grad.const_data_ptr();
    params.y = dx.mutable_data_ptr();
    params.transposed = 1;
    run_forward(op, grad, params);
    return {dx, dw, da};
  }

  TORCH_CHECK_VALUE(x.has_value(), op, ": dw and da need x, got None.");
  check_activation(op, "x", *x);
  TORCH_CHECK_VALUE(x->sizes() == grad.sizes() && x->options().type_equal(grad.options()) &&
                        x->device() == grad.device(),
                    op, ": x must be like grad, got ", x->sizes(), " ", x->options(), " and ",
                    grad.sizes(), " ", grad.options(), ".");
  TemporalTapsBackward params{shape};
  params.pixels_per_unit = temporal_taps_pixels_per_unit(shape);
  const TemporalTapsUnits units(params);
  const auto buffer = [&](int64_t elements) { return at::empty({elements}, coefficient_options); };
  Tensor dw_all = at::empty_like(w);  // costs nothing beside da, so it is always computed
  Tensor dw_partial = units.dw_rows > 1 ? buffer(units.dw_rows * units.dw_columns) : dw_all;
  params.x = x->const_data_ptr();
  params.grad = grad.const_data_ptr();
  params.dx = want_dx ? dx.mutable_data_ptr() : nullptr;
  params.dw = dw_all.mutable_data_ptr();
  params.dw_partial = dw_partial.mutable_data_ptr();
  Tensor da_partial;
  if (want_da) {
    da = at::empty_like(*a);
    da_partial = units.pixel_units > 1 ? buffer(units.pixel_units * units.da_columns) : da;
    params.da = da.mutable_data_ptr();
    params.da_partial = da_partial.mutable_data_ptr();
  }
  run_on_device(
      op, grad,
      [&] {
        for_units(units.count, grad.numel(), [&](int64_t begin, int64_t end) {
          temporal_taps_bwd_cpp(params, begin, end);
        });
        temporal_taps_bwd_finish_cpp(params);
      },
      [&](cudaStream_t stream) { return accel_temporal_taps_bwd(&params, stream); });
  if (want_dw) dw = dw_all;
  return {dx, dw, da};
}

// ---- registration ------------------------------------------------------------------------------

std::string built_for() { return TORCH_VERSION; }

bool has_cuda() {
#ifdef ACCEL_WITH_CUDA
  return true;
#else
  return false;
#endif
}

}  // namespace
}  // namespace accel_kernels

TORCH_LIBRARY(accel_kernels, m) {
  m.def("built_for() -> str", &accel_kernels::built_for);
  m.def("has_cuda() -> bool", &accel_kernels::has_cuda);

  // Compilers must pass the strides that eager mode would: the layout checks accept no others.
  const std::vector<at::Tag> tags = {at::Tag::pt2_compliant_tag, at::Tag::needs_exact_strides};
  m.def("temporal_taps(Tensor x, Tensor w, Tensor? a, int num_segments) -> Tensor", tags);
  m.def(
      "temporal_taps_backward(Tensor grad, Tensor? x, Tensor w, Tensor? a, int num_segments, "
      "bool[3] output_mask) -> (Tensor, Tensor, Tensor)",
      tags);
}

TORCH_LIBRARY_IMPL(accel_kernels, CPU, m) {
  m.impl("temporal_taps", &accel_kernels::temporal_taps);
  m.impl("temporal_taps_backward", &accel_kernels::temporal_taps_backward);
}

#ifdef ACCEL_WITH_CUDA
TORCH_LIBRARY_IMPL(accel_kernels, CUDA, m) {
  m.impl("temporal_taps", &accel_kernels::temporal_taps);
  m.impl("temporal_taps_backward", &accel_kernels::temporal_taps_backward);
}
#endif
