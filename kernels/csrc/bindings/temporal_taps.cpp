// temporal_taps: schema, argument checks, allocation.

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros_like.h>

#include <array>
#include <optional>
#include <tuple>

#include "bindings/checks.h"
#include "cuda/temporal_taps.h"

namespace accel_kernels {
namespace {

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

}  // namespace
}  // namespace accel_kernels

TORCH_LIBRARY_FRAGMENT(accel_kernels, m) {
  const auto tags = accel_kernels::operator_tags();
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
