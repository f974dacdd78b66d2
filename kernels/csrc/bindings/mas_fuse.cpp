// mas_fuse: schema, argument checks, allocation.

#include "cuda/mas_fuse.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros_like.h>

#include <array>
#include <tuple>

#include "bindings/checks.h"

namespace accel_kernels {
namespace {

void fill_shape(const char* op, const Tensor& x, const Tensor& m, const Tensor& b, const Tensor& d,
                const Tensor& w, int64_t num_segments, MasFuseShape* shape) {
  check_activation(op, "x", x);
  const int64_t channels = x.size(1);
  const int64_t pixels = x.size(2) * x.size(3);
  TORCH_CHECK_VALUE(num_segments >= 1 && x.size(0) % num_segments == 0, op,
                    ": x must hold whole clips of num_segments = ", num_segments,
                    " frames, got x of ", x.sizes(), ".");
  const int64_t batch = x.size(0) / num_segments;
  check_companion(op, "m", m, "x", x);
  check_companion(op, "d", d, "x", x);
  const int64_t rank = m.size(1);
  TORCH_CHECK_VALUE(rank >= 1 && rank <= kMasFuseMaxRank &&
                        m.sizes().equals({x.size(0), rank, x.size(2), x.size(3)}),
                    op, ": m must be [N*T, r, H, W] with r from 1 to ", kMasFuseMaxRank, ", got ",
                    m.sizes(), " (x is ", x.sizes(), ").");
  TORCH_CHECK_VALUE(b.sizes().equals({channels, rank}), op, ": b must be [C, r] = [", channels,
                    ", ", rank, "], got ", b.sizes(), " (x is ", x.sizes(), ").");
  TORCH_CHECK_VALUE(d.sizes().equals({batch, 2 * channels, x.size(2), x.size(3)}), op,
                    ": d must be [N, 2*C, H, W] = [", batch, ", ", 2 * channels, ", ", x.size(2),
                    ", ", x.size(3), "], got ", d.sizes(), " (x is ", x.sizes(), ").");
  TORCH_CHECK_VALUE(w.sizes().equals({channels, 3}), op, ": w must be [C, 3] = [", channels,
                    ", 3], got ", w.sizes(), " (x is ", x.sizes(), ").");
  check_coefficient(op, "b", b, x);
  check_coefficient(op, "w", w, x);
  // Positions inside one frame of all clips are 32-bit in the kernels, offsets are 64-bit.
  TORCH_CHECK_VALUE(num_segments <= std::numeric_limits<int>::max() &&
                        batch * pixels * channels <= std::numeric_limits<int>::max(),
                    op, ": N*H*W*C must be below 2^31, got x of ", x.sizes(),
                    "; split the batch.");

  shape->dtype = dtype_of(op, x);
  shape->batch = static_cast<int>(batch);
  shape->frames = static_cast<int>(num_segments);
  shape->pixels = static_cast<int>(pixels);
  shape->channels = static_cast<int>(channels);
  shape->rank = static_cast<int>(rank);
  shape->x = x.const_data_ptr();
  shape->m = m.const_data_ptr();
  shape->d = d.const_data_ptr();
  shape->b = b.const_data_ptr();
  shape->w = w.const_data_ptr();
}

Tensor mas_fuse(const Tensor& x, const Tensor& m, const Tensor& b, const Tensor& d, const Tensor& w,
                int64_t num_segments) {
  const char* op = "mas_fuse";
  MasFuseForward params{};
  fill_shape(op, x, m, b, d, w, num_segments, &params);
  Tensor out = at::empty_like(x, {}, at::MemoryFormat::ChannelsLast);
  if (out.numel() == 0) return out;
  params.out = out.mutable_data_ptr();
  run_on_device(
      op, x,
      [&] {
        for_units(mas_fuse_fwd_units_cpp(params), x.numel(), [&](int64_t begin, int64_t end) {
          mas_fuse_fwd_cpp(params, begin, end);
        });
      },
      [&](cudaStream_t stream) { return accel_mas_fuse_fwd(&params, stream); });
  return out;
}

// Gradients for which output_mask is false come back as empty tensors of shape [0].
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> mas_fuse_backward(
    const Tensor& grad, const Tensor& x, const Tensor& m, const Tensor& b, const Tensor& d,
    const Tensor& w, int64_t num_segments, std::array<bool, 5> output_mask) {
  const char* op = "mas_fuse_backward";
  MasFuseBackward params{};
  fill_shape(op, x, m, b, d, w, num_segments, &params);
  check_companion(op, "grad", grad, "x", x);
  TORCH_CHECK_VALUE(grad.sizes() == x.sizes(), op, ": grad must be like x, got ", grad.sizes(),
                    " and ", x.sizes(), ".");
  const auto activation = [&](bool wanted, const Tensor& like) {
    return wanted ? at::empty_like(like, {}, at::MemoryFormat::ChannelsLast)
                  : at::empty({0}, like.options());
  };
  Tensor dx = activation(output_mask[0], x);
  Tensor dm = activation(output_mask[1], m);
  Tensor dd = activation(output_mask[3], d);
  const bool is_empty = x.numel() == 0;
  Tensor db = is_empty ? at::zeros_like(b) : at::empty_like(b);
  Tensor dw = is_empty ? at::zeros_like(w) : at::empty_like(w);
  const auto result = [&] {  // db and dw cost little beside the rest: they are always computed
    return std::make_tuple(dx, dm, output_mask[2] ? db : at::empty({0}, b.options()), dd,
                           output_mask[4] ? dw : at::empty({0}, w.options()));
  };
  if (is_empty) return result();

  params.grad = grad.const_data_ptr();
  params.dx = output_mask[0] ? dx.mutable_data_ptr() : nullptr;
  params.dm = output_mask[1] ? dm.mutable_data_ptr() : nullptr;
  params.dd = output_mask[3] ? dd.mutable_data_ptr() : nullptr;
  params.dw = dw.mutable_data_ptr();
  params.db = db.mutable_data_ptr();
  params.pixels_per_unit = mas_fuse_pixels_per_unit(params);
  const int64_t units = mas_fuse_bwd_units(params);
  const Tensor dw_partial = units > 1 ? at::empty({units * w.numel()}, w.options()) : dw;
  const Tensor db_partial = units > 1 ? at::empty({units * b.numel()}, b.options()) : db;
  params.dw_partial = dw_partial.mutable_data_ptr();
  params.db_partial = db_partial.mutable_data_ptr();
  run_on_device(
      op, x,
      [&] {
        for_units(units, x.numel(), [&](int64_t begin, int64_t end) {
          mas_fuse_bwd_cpp(params, begin, end);
        });
        mas_fuse_bwd_finish_cpp(params);
      },
      [&](cudaStream_t stream) {
        const int64_t blocks = accel_mas_fuse_bwd_channel_blocks(&params);
        Tensor dm_partial;
        if (output_mask[1] && blocks > 1) {
          dm_partial = at::empty({blocks * m.numel()}, w.options());
          params.dm_partial = dm_partial.mutable_data_ptr();
        }
        return accel_mas_fuse_bwd(&params, stream);
      });
  return result();
}

}  // namespace
}  // namespace accel_kernels

TORCH_LIBRARY_FRAGMENT(accel_kernels, m) {
  const auto tags = accel_kernels::operator_tags();
  m.def(
      "mas_fuse(Tensor x, Tensor m, Tensor b, Tensor d, Tensor w, int num_segments) -> Tensor",
      tags);
  m.def(
      "mas_fuse_backward(Tensor grad, Tensor x, Tensor m, Tensor b, Tensor d, Tensor w, "
      "int num_segments, bool[5] output_mask) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
      tags);
}

TORCH_LIBRARY_IMPL(accel_kernels, CPU, m) {
  m.impl("mas_fuse", &accel_kernels::mas_fuse);
  m.impl("mas_fuse_backward", &accel_kernels::mas_fuse_backward);
}

#ifdef ACCEL_WITH_CUDA
TORCH_LIBRARY_IMPL(accel_kernels, CUDA, m) {
  m.impl("mas_fuse", &accel_kernels::mas_fuse);
  m.impl("mas_fuse_backward", &accel_kernels::mas_fuse_backward);
}
#endif
