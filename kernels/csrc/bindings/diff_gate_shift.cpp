// diff_gate_shift: schema, argument checks, allocation.

#include "cuda/diff_gate_shift.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros_like.h>

#include <tuple>

#include "bindings/checks.h"

namespace accel_kernels {
namespace {

DiffGateShiftShape checked_shape(const char* op, const Tensor& x, const Tensor& z, const Tensor& v,
                                 const Tensor& m, const Tensor& c, const Tensor& w,
                                 int64_t num_segments) {
  check_activation(op, "x", x);
  check_activation(op, "z", z);
  check_activation(op, "v", v);
  const int64_t channels = x.size(1);
  TORCH_CHECK_VALUE(num_segments >= 1 && x.size(0) % num_segments == 0, op,
                    ": x must hold whole clips of num_segments = ", num_segments,
                    " frames, got x of ", x.sizes(), ".");
  TORCH_CHECK_VALUE(m.dim() == 3 && m.size(0) == 2 && m.size(1) == channels && m.size(2) >= 1 &&
                        m.size(2) <= kDiffGateShiftMaxRank,
                    op, ": m must be [2, C, r] = [2, ", channels, ", 1..", kDiffGateShiftMaxRank,
                    "], got ", m.sizes(), " (x is ", x.sizes(), ").");
  const int64_t rank = m.size(2);
  for (const auto& [name, tensor] : {std::pair{"z", &z}, std::pair{"v", &v}}) {
    TORCH_CHECK_VALUE(tensor->sizes().equals({x.size(0), rank, x.size(2), x.size(3)}), op, ": ",
                      name, " must be [N*T, r, H, W] = [", x.size(0), ", ", rank, ", ", x.size(2),
                      ", ", x.size(3), "], got ", tensor->sizes(), ".");
    TORCH_CHECK_TYPE(tensor->scalar_type() == x.scalar_type(), op, ": ", name,
                     " must have the dtype of x, ", x.scalar_type(), ", got ",
                     tensor->scalar_type(), ".");
    TORCH_CHECK_VALUE(tensor->device() == x.device(), op, ": ", name, " is on ", tensor->device(),
                      ", x is on ", x.device(), ".");
  }
  TORCH_CHECK_VALUE(c.sizes().equals({2, channels}), op, ": c must be [2, C] = [2, ", channels,
                    "], got ", c.sizes(), " (x is ", x.sizes(), ").");
  TORCH_CHECK_VALUE(w.sizes().equals({channels, 3}), op, ": w must be [C, 3] = [", channels,
                    ", 3], got ", w.sizes(), " (x is ", x.sizes(), ").");
  check_coefficient(op, "m", m, x);
  check_coefficient(op, "c", c, x);
  check_coefficient(op, "w", w, x);
  // Positions inside one frame of all clips are 32-bit in the kernels, offsets are 64-bit.
  const int64_t batch = x.size(0) / num_segments;
  TORCH_CHECK_VALUE(
      num_segments <= std::numeric_limits<int>::max() &&
          batch * x.size(2) * x.size(3) * channels <= std::numeric_limits<int>::max(),
      op, ": N*H*W*C must be below 2^31, got x of ", x.sizes(), "; split the batch.");

  DiffGateShiftShape shape{};
  shape.dtype = dtype_of(op, x);
  shape.batch = static_cast<int>(batch);
  shape.frames = static_cast<int>(num_segments);
  shape.pixels = static_cast<int>(x.size(2) * x.size(3));
  shape.channels = static_cast<int>(channels);
  shape.rank = static_cast<int>(rank);
  shape.x = x.const_data_ptr();
  shape.z = z.const_data_ptr();
  shape.v = v.const_data_ptr();
  shape.m = m.const_data_ptr();
  shape.c = c.const_data_ptr();
  shape.w = w.const_data_ptr();
  return shape;
}

Tensor diff_gate_shift(const Tensor& x, const Tensor& z, const Tensor& v, const Tensor& m,
                       const Tensor& c, const Tensor& w, int64_t num_segments) {
  const char* op = "diff_gate_shift";
  DiffGateShiftForward params{checked_shape(op, x, z, v, m, c, w, num_segments)};
  Tensor y = at::empty_like(x, {}, at::MemoryFormat::ChannelsLast);
  if (y.numel() == 0) return y;
  params.y = y.mutable_data_ptr();
  run_on_device(
      op, x,
      [&] {
        for_units(diff_gate_shift_fwd_units_cpp(params), x.numel(),
                  [&](int64_t begin, int64_t end) { diff_gate_shift_fwd_cpp(params, begin, end); });
      },
      [&](cudaStream_t stream) { return accel_diff_gate_shift_fwd(&params, stream); });
  return y;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> diff_gate_shift_backward(
    const Tensor& grad, const Tensor& x, const Tensor& z, const Tensor& v, const Tensor& m,
    const Tensor& c, const Tensor& w, int64_t num_segments) {
  const char* op = "diff_gate_shift_backward";
  DiffGateShiftBackward params{checked_shape(op, x, z, v, m, c, w, num_segments)};
  check_activation(op, "grad", grad);
  TORCH_CHECK_VALUE(grad.sizes() == x.sizes() && grad.options().type_equal(x.options()) &&
                        grad.device() == x.device(),
                    op, ": grad must be like x, got ", grad.sizes(), " ", grad.options(), " and ",
                    x.sizes(), " ", x.options(), ".");
  Tensor dx = at::empty_like(x, {}, at::MemoryFormat::ChannelsLast);
  Tensor dz = at::empty_like(z, {}, at::MemoryFormat::ChannelsLast);
  Tensor dv = at::empty_like(v, {}, at::MemoryFormat::ChannelsLast);
  if (x.numel() == 0) {
    return {dx, dz.zero_(), dv.zero_(), at::zeros_like(m), at::zeros_like(c), at::zeros_like(w)};
  }
  Tensor dm = at::empty_like(m);
  Tensor dc = at::empty_like(c);
  Tensor dw = at::empty_like(w);
  params.grad = grad.const_data_ptr();
  params.dx = dx.mutable_data_ptr();
  const int element_size = static_cast<int>(x.element_size());
  const int tiles = divide_up(x.size(1), 32 * diff_gate_shift_bwd_width(params, element_size));
  // A row of partial sums is at most an eighth (T = 8) of what its unit reads of x, but a GPU needs
  // 512 blocks, even if smaller ones.
  params.items_per_unit =
      x.is_cpu() ? diff_gate_shift_items_per_unit(params, std::max(2 * params.rank, 16), 32)
                 : diff_gate_shift_items_per_unit(params, 16, divide_up(512, tiles));
  const int64_t units = DiffGateShiftUnits(params, params.items_per_unit).count;
  const auto partial = [&](const Tensor& sum) {
    return units > 1 ? at::empty({units * sum.numel()}, sum.options()) : sum;
  };
  const Tensor dm_partial = partial(dm);
  const Tensor dc_partial = partial(dc);
  const Tensor dw_partial = partial(dw);
  Tensor dz_partial;
  if (!x.is_cpu() && tiles > 1) {
    dz_partial = at::empty({2 * tiles * z.numel()}, m.options());
    params.dz_partial = dz_partial.mutable_data_ptr();
  }
  params.dz = dz.mutable_data_ptr();
  params.dv = dv.mutable_data_ptr();
  params.dm = dm.mutable_data_ptr();
  params.dc = dc.mutable_data_ptr();
  params.dw = dw.mutable_data_ptr();
  params.dm_partial = dm_partial.mutable_data_ptr();
  params.dc_partial = dc_partial.mutable_data_ptr();
  params.dw_partial = dw_partial.mutable_data_ptr();
  run_on_device(
      op, x,
      [&] {
        for_units(units, x.numel(), [&](int64_t begin, int64_t end) {
          diff_gate_shift_bwd_cpp(params, begin, end);
        });
        diff_gate_shift_bwd_finish_cpp(params);
      },
      [&](cudaStream_t stream) { return accel_diff_gate_shift_bwd(&params, stream); });
  return {dx, dz, dv, dm, dc, dw};
}

}  // namespace
}  // namespace accel_kernels

TORCH_LIBRARY_FRAGMENT(accel_kernels, m) {
  const auto tags = accel_kernels::operator_tags();
  m.def(
      "diff_gate_shift(Tensor x, Tensor z, Tensor v, Tensor m, Tensor c, Tensor w, "
      "int num_segments) -> Tensor",
      tags);
  m.def(
      "diff_gate_shift_backward(Tensor grad, Tensor x, Tensor z, Tensor v, Tensor m, Tensor c, "
      "Tensor w, int num_segments) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
      tags);
}

TORCH_LIBRARY_IMPL(accel_kernels, CPU, m) {
  m.impl("diff_gate_shift", &accel_kernels::diff_gate_shift);
  m.impl("diff_gate_shift_backward", &accel_kernels::diff_gate_shift_backward);
}

#ifdef ACCEL_WITH_CUDA
TORCH_LIBRARY_IMPL(accel_kernels, CUDA, m) {
  m.impl("diff_gate_shift", &accel_kernels::diff_gate_shift);
  m.impl("diff_gate_shift_backward", &accel_kernels::diff_gate_shift_backward);
}
#endif
