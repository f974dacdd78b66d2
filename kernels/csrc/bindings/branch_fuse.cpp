// branch_fuse: schema, argument checks, allocation.

#include "cuda/branch_fuse.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros_like.h>

#include <array>
#include <optional>
#include <tuple>

#include "bindings/checks.h"

namespace accel_kernels {
namespace {

constexpr const char* kNames[kBranches] = {"f1", "f2", "f3"};

void check_like(const char* op, const char* name, const Tensor& f, const char* other_name,
                const Tensor& other) {
  check_companion(op, name, f, other_name, other);
  TORCH_CHECK_VALUE(f.sizes() == other.sizes(), op, ": ", name, " must be like ", other_name,
                    " of ", other.sizes(), ", got ", f.sizes(), ".");
}

void fill_shape(const char* op, const Tensor& f, const Tensor& s, int64_t num_segments,
                BranchFuseShape* shape) {
  TORCH_CHECK_VALUE(num_segments >= 1 && f.size(0) % num_segments == 0, op,
                    ": f1 must hold whole clips of num_segments = ", num_segments,
                    " frames, got f1 of ", f.sizes(), ".");
  const int64_t batch = f.size(0) / num_segments;
  const int64_t channels = f.size(1);
  TORCH_CHECK_VALUE(s.sizes().equals({batch, kBranches, channels}), op,
                    ": s must be [N, 3, C] = [", batch, ", 3, ", channels, "], got ", s.sizes(),
                    " (f1 is ", f.sizes(), ").");
  check_coefficient(op, "s", s, f);
  const int64_t rows = num_segments * f.size(2) * f.size(3);
  // Positions inside one clip are 32-bit in the kernels, offsets are 64-bit.
  TORCH_CHECK_VALUE(batch <= std::numeric_limits<int>::max() &&
                        rows * channels <= std::numeric_limits<int>::max(),
                    op, ": T*H*W*C must be below 2^31, got f1 of ", f.sizes(), ".");
  shape->dtype = dtype_of(op, f);
  shape->batch = static_cast<int>(batch);
  shape->rows = static_cast<int>(rows);
  shape->channels = static_cast<int>(channels);
  shape->s = s.const_data_ptr();
}

Tensor branch_fuse(const Tensor& f1, const Tensor& f2, const Tensor& f3, const Tensor& s,
                   int64_t num_segments) {
  const char* op = "branch_fuse";
  const Tensor* branches[kBranches] = {&f1, &f2, &f3};
  BranchFuseForward params{};
  for (int i = 0; i < kBranches; ++i) {
    check_like(op, kNames[i], *branches[i], "f1", f1);
    params.f[i] = branches[i]->const_data_ptr();
  }
  fill_shape(op, f1, s, num_segments, &params);
  Tensor out = at::empty_like(f1, {}, at::MemoryFormat::ChannelsLast);
  if (out.numel() == 0) return out;
  params.out = out.mutable_data_ptr();
  run_on_device(
      op, f1,
      [&] {
        for_units(branch_fuse_fwd_units_cpp(params), f1.numel(), [&](int64_t begin, int64_t end) {
          branch_fuse_fwd_cpp(params, begin, end);
        });
      },
      [&](cudaStream_t stream) { return accel_branch_fuse_fwd(&params, stream); });
  return out;
}

// Gradients for which output_mask is false come back as empty tensors of shape [0].
std::tuple<Tensor, Tensor, Tensor, Tensor> branch_fuse_backward(
    const Tensor& grad, const std::optional<Tensor>& f1, const std::optional<Tensor>& f2,
    const std::optional<Tensor>& f3, const Tensor& s, int64_t num_segments,
    std::array<bool, 4> output_mask) {
  const char* op = "branch_fuse_backward";
  const std::optional<Tensor>* branches[kBranches] = {&f1, &f2, &f3};
  const bool want_ds = output_mask[kBranches];
  BranchFuseBackward params{};
  check_activation(op, "grad", grad);
  fill_shape(op, grad, s, num_segments, &params);
  Tensor df[kBranches];
  for (int i = 0; i < kBranches; ++i) {
    if (want_ds) {
      TORCH_CHECK_VALUE(branches[i]->has_value(), op, ": ds needs ", kNames[i], ", got None.");
      check_like(op, kNames[i], **branches[i], "grad", grad);
      params.f[i] = (*branches[i])->const_data_ptr();
    }
    df[i] = output_mask[i] ? at::empty_like(grad, {}, at::MemoryFormat::ChannelsLast)
                           : at::empty({0}, grad.options());
    params.df[i] = output_mask[i] ? df[i].mutable_data_ptr() : nullptr;
  }
  Tensor ds = !want_ds             ? at::empty({0}, s.options())
              : grad.numel() == 0 ? at::zeros_like(s)
                                  : at::empty_like(s);
  if (grad.numel() == 0) return {df[0], df[1], df[2], ds};

  params.grad = grad.const_data_ptr();
  params.rows_per_unit = branch_fuse_rows_per_unit(params);
  Tensor ds_partial;
  if (want_ds) {
    const int64_t row_units = branch_fuse_row_units(params);
    ds_partial = row_units > 1 ? at::empty({row_units * s.numel()}, s.options()) : ds;
    params.ds = ds.mutable_data_ptr();
    params.ds_partial = ds_partial.mutable_data_ptr();
  }
  run_on_device(
      op, grad,
      [&] {
        for_units(branch_fuse_bwd_units_cpp(params), grad.numel(),
                  [&](int64_t begin, int64_t end) { branch_fuse_bwd_cpp(params, begin, end); });
        branch_fuse_bwd_finish_cpp(params);
      },
      [&](cudaStream_t stream) { return accel_branch_fuse_bwd(&params, stream); });
  return {df[0], df[1], df[2], ds};
}

}  // namespace
}  // namespace accel_kernels

TORCH_LIBRARY_FRAGMENT(accel_kernels, m) {
  const auto tags = accel_kernels::operator_tags();
  m.def("branch_fuse(Tensor f1, Tensor f2, Tensor f3, Tensor s, int num_segments) -> Tensor", tags);
  m.def(
      "branch_fuse_backward(Tensor grad, Tensor? f1, Tensor? f2, Tensor? f3, Tensor s, "
      "int num_segments, bool[4] output_mask) -> (Tensor, Tensor, Tensor, Tensor)",
      tags);
}

TORCH_LIBRARY_IMPL(accel_kernels, CPU, m) {
  m.impl("branch_fuse", &accel_kernels::branch_fuse);
  m.impl("branch_fuse_backward", &accel_kernels::branch_fuse_backward);
}

#ifdef ACCEL_WITH_CUDA
TORCH_LIBRARY_IMPL(accel_kernels, CUDA, m) {
  m.impl("branch_fuse", &accel_kernels::branch_fuse);
  m.impl("branch_fuse_backward", &accel_kernels::branch_fuse_backward);
}
#endif
