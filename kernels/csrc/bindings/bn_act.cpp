// bn_act: schemas, argument checks, allocation.

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>

#include <array>
#include <optional>
#include <tuple>

#include "bindings/checks.h"
#include "cuda/bn_act.h"

namespace accel_kernels {
namespace {

void fill_shape(const char* op, const Tensor& x, BnActShape* shape) {
  check_activation(op, "x", x);
  // Rows are 32-bit in the kernels, offsets are 64-bit.
  TORCH_CHECK_VALUE(x.size(0) * x.size(2) * x.size(3) <= std::numeric_limits<int>::max() / 2, op,
                    ": B*H*W must be below 2^30, got x of ", x.sizes(), "; split the batch.");
  shape->dtype = dtype_of(op, x);
  shape->frames = static_cast<int>(x.size(0));
  shape->pixels = static_cast<int>(x.size(2) * x.size(3));
  shape->channels = static_cast<int>(x.size(1));
}

void check_channels(const char* op, const char* name, const Tensor& tensor, const Tensor& x) {
  TORCH_CHECK_VALUE(tensor.sizes().equals({x.size(1)}), op, ": ", name, " must be [C] = [",
                    x.size(1), "], got ", tensor.sizes(), " (x is ", x.sizes(), ").");
  check_coefficient(op, name, tensor, x);
}

void check_like(const char* op, const char* name, const Tensor& tensor, const Tensor& x) {
  check_activation(op, name, tensor);
  TORCH_CHECK_VALUE(tensor.sizes() == x.sizes() && tensor.scalar_type() == x.scalar_type() &&
                        tensor.device() == x.device(),
                    op, ": ", name, " must be like x, got ", tensor.sizes(), " ",
                    tensor.scalar_type(), " on ", tensor.device(), " and x of ", x.sizes(), " ",
                    x.scalar_type(), " on ", x.device(), ".");
}

void fill_norm(const char* op, const Tensor& x, const Tensor& weight, const Tensor& bias,
               const Tensor& mean, const Tensor& var, double eps, bool relu, BnActNorm* norm) {
  fill_shape(op, x, norm);
  check_channels(op, "weight", weight, x);
  check_channels(op, "bias", bias, x);
  check_channels(op, "mean", mean, x);
  check_channels(op, "var", var, x);
  norm->weight = weight.const_data_ptr();
  norm->bias = bias.const_data_ptr();
  norm->mean = mean.const_data_ptr();
  norm->var = var.const_data_ptr();
  norm->eps = eps;
  norm->relu = relu ? 1 : 0;
}

at::TensorOptions coefficient_options(const Tensor& x) {
  return x.options().dtype(x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat);
}

// The pointer to write to; autograd then notices what was saved before the change.
void* changed_data_ptr(const std::optional<Tensor>& tensor) {
  if (!tensor.has_value()) return nullptr;
  if (!tensor->is_inference()) tensor->unsafeGetTensorImpl()->bump_version();
  return tensor->mutable_data_ptr();
}

std::tuple<Tensor, Tensor> bn_act_statistics(const Tensor& x,
                                             const std::optional<Tensor>& running_mean,
                                             const std::optional<Tensor>& running_var,
                                             double momentum) {
  const char* op = "bn_act_statistics";
  BnActStatistics params{};
  fill_shape(op, x, &params);
  if (running_mean.has_value()) check_channels(op, "running_mean", *running_mean, x);
  if (running_var.has_value()) check_channels(op, "running_var", *running_var, x);
  TORCH_CHECK_VALUE(running_mean.has_value() == running_var.has_value(), op,
                    ": running_mean and running_var must both be tensors or both None.");
  const auto options = coefficient_options(x);
  if (x.numel() == 0) {
    return {at::zeros({x.size(1)}, options), at::zeros({x.size(1)}, options)};
  }
  Tensor mean = at::empty({x.size(1)}, options);
  Tensor var = at::empty({x.size(1)}, options);
  params.x = x.const_data_ptr();
  params.mean = mean.mutable_data_ptr();
  params.var = var.mutable_data_ptr();
  params.running_mean = changed_data_ptr(running_mean);
  params.running_var = changed_data_ptr(running_var);
  params.momentum = momentum;
  params.rows_per_unit = bn_act_rows_per_unit(params);
  const int64_t units = divide_up(params.rows(), params.rows_per_unit);
  Tensor partial = at::empty({units, 2, x.size(1)}, options);
  params.partial = partial.mutable_data_ptr();
  run_on_device(
      op, x,
      [&] {
        for_units(units, x.numel(),
                  [&](int64_t begin, int64_t end) { bn_act_statistics_cpp(params, begin, end); });
        bn_act_statistics_finish_cpp(params);
      },
      [&](cudaStream_t stream) { return accel_bn_act_statistics(&params, stream); });
  return {mean, var};
}

// What is not wanted comes back as an empty tensor of shape [0].
std::tuple<Tensor, Tensor, Tensor> bn_act(const Tensor& x, const Tensor& weight, const Tensor& bias,
                                          const Tensor& mean, const Tensor& var,
                                          const std::optional<Tensor>& shortcut, double eps,
                                          bool relu, bool /*batch_statistics*/, bool pool,
                                          bool save_mask) {
  const char* op = "bn_act";
  BnActForward params{};
  fill_norm(op, x, weight, bias, mean, var, eps, relu, &params);
  if (shortcut.has_value()) check_like(op, "shortcut", *shortcut, x);
  const auto options = coefficient_options(x);
  Tensor y = at::empty_like(x, {}, at::MemoryFormat::ChannelsLast);
  Tensor pooled = pool ? at::empty({x.size(0), x.size(1)}, options) : at::empty({0}, options);
  Tensor mask = at::empty({save_mask ? params.rows() * mask_bytes(params.channels) : 0},
                          x.options().dtype(at::kByte));
  if (x.numel() == 0) return {y, pooled, mask};
  params.x = x.const_data_ptr();
  params.shortcut = shortcut.has_value() ? shortcut->const_data_ptr() : nullptr;
  params.y = y.mutable_data_ptr();
  params.mask = save_mask ? mask.mutable_data_ptr() : nullptr;
  Tensor pooled_partial = pooled;
  if (pool) {
    params.pixels_per_unit = bn_act_pixels_per_unit(params);
    const int64_t units = divide_up(params.pixels, params.pixels_per_unit);
    if (units > 1) pooled_partial = at::empty({units, x.size(0), x.size(1)}, options);
    params.pooled = pooled.mutable_data_ptr();
    params.pooled_partial = pooled_partial.mutable_data_ptr();
  }
  run_on_device(
      op, x,
      [&] {
        for_units(bn_act_fwd_units_cpp(params), x.numel(),
                  [&](int64_t begin, int64_t end) { bn_act_fwd_cpp(params, begin, end); });
        bn_act_fwd_finish_cpp(params);
      },
      [&](cudaStream_t stream) { return accel_bn_act_fwd(&params, stream); });
  return {y, pooled, mask};
}

// `like` gives the shape: x, or grad where x is not needed.
void fill_backward(const char* op, const Tensor& grad, const std::optional<Tensor>& grad_pooled,
                   const std::optional<Tensor>& x, const Tensor& weight, const Tensor& bias,
                   const Tensor& mean, const Tensor& var, const std::optional<Tensor>& mask,
                   double eps, bool relu, BnActBackward* params) {
  fill_norm(op, grad, weight, bias, mean, var, eps, relu, params);
  if (x.has_value()) check_like(op, "x", *x, grad);
  if (grad_pooled.has_value()) {
    TORCH_CHECK_VALUE(grad_pooled->sizes().equals({grad.size(0), grad.size(1)}), op,
                      ": grad_pooled must be [B, C] = [", grad.size(0), ", ", grad.size(1),
                      "], got ", grad_pooled->sizes(), ".");
    check_coefficient(op, "grad_pooled", *grad_pooled, grad);
  }
  if (mask.has_value()) {
    TORCH_CHECK_VALUE(mask->scalar_type() == at::kByte && mask->is_contiguous() &&
                          mask->device() == grad.device() &&
                          mask->numel() == params->rows() * mask_bytes(params->channels),
                      op, ": mask must be the one of the forward pass, got ", mask->sizes(), " ",
                      mask->scalar_type(), ".");
  }
  TORCH_CHECK_VALUE(x.has_value() || mask.has_value() || !relu, op,
                    ": relu needs x or the mask, both are None.");
  params->grad = grad.const_data_ptr();
  params->grad_pooled = grad_pooled.has_value() ? grad_pooled->const_data_ptr() : nullptr;
  params->x = x.has_value() ? x->const_data_ptr() : nullptr;
  params->mask = mask.has_value() ? mask->const_data_ptr() : nullptr;
}

std::tuple<Tensor, Tensor> bn_act_backward_sums(
    const Tensor& grad, const std::optional<Tensor>& grad_pooled, const Tensor& x,
    const Tensor& weight, const Tensor& bias, const Tensor& mean, const Tensor& var,
    const std::optional<Tensor>& mask, double eps, bool relu) {
  const char* op = "bn_act_backward_sums";
  BnActBackward params{};
  fill_backward(op, grad, grad_pooled, x, weight, bias, mean, var, mask, eps, relu, &params);
  if (grad.numel() == 0) {
    return {at::zeros({grad.size(1)}, weight.options()), at::zeros({grad.size(1)}, weight.options())};
  }
  Tensor dweight = at::empty_like(weight);
  Tensor dbias = at::empty_like(bias);
  params.rows_per_unit = bn_act_rows_per_unit(params);
  const int64_t units = divide_up(params.rows(), params.rows_per_unit);
  Tensor partial = at::empty({units, 2, grad.size(1)}, weight.options());
  params.dweight = dweight.mutable_data_ptr();
  params.dbias = dbias.mutable_data_ptr();
  params.partial = partial.mutable_data_ptr();
  run_on_device(
      op, grad,
      [&] {
        for_units(units, grad.numel(),
                  [&](int64_t begin, int64_t end) { bn_act_bwd_sums_cpp(params, begin, end); });
        bn_act_bwd_sums_finish_cpp(params);
      },
      [&](cudaStream_t stream) { return accel_bn_act_bwd_sums(&params, stream); });
  return {dweight, dbias};
}

// dweight and dbias: the sums over all rows that the statistics are of, or None if the statistics
// do not depend on x. count: [1], the number of those rows; None: those of grad.
std::tuple<Tensor, Tensor> bn_act_backward(
    const Tensor& grad, const std::optional<Tensor>& grad_pooled, const std::optional<Tensor>& x,
    const Tensor& weight, const Tensor& bias, const Tensor& mean, const Tensor& var,
    const std::optional<Tensor>& mask, const std::optional<Tensor>& dweight,
    const std::optional<Tensor>& dbias, const std::optional<Tensor>& count, double eps, bool relu,
    std::array<bool, 2> output_mask) {
  const char* op = "bn_act_backward";
  BnActBackward params{};
  fill_backward(op, grad, grad_pooled, x, weight, bias, mean, var, mask, eps, relu, &params);
  TORCH_CHECK_VALUE(dweight.has_value() == dbias.has_value(), op,
                    ": dweight and dbias must both be tensors or both None.");
  TORCH_CHECK_VALUE(x.has_value() || !dweight.has_value(), op,
                    ": x is None, but dx depends on it through the statistics.");
  if (dweight.has_value()) {
    check_channels(op, "dweight", *dweight, grad);
    check_channels(op, "dbias", *dbias, grad);
    params.dweight = dweight->mutable_data_ptr();
    params.dbias = dbias->mutable_data_ptr();
  }
  if (count.has_value()) {
    TORCH_CHECK_VALUE(count->numel() == 1, op, ": count must be one number, got ", count->sizes(),
                      ".");
    check_coefficient(op, "count", *count, grad);
    params.count = count->const_data_ptr();
  }
  TORCH_CHECK_VALUE(mask.has_value() || !relu || !output_mask[1], op,
                    ": dshortcut needs the mask: the sign of the norm is not that of the sum.");
  const auto gradient = [&](bool wanted) {
    return wanted ? at::empty_like(grad, {}, at::MemoryFormat::ChannelsLast)
                  : at::empty({0}, grad.options());
  };
  Tensor dx = gradient(output_mask[0]);
  Tensor dshortcut = gradient(output_mask[1]);
  if (grad.numel() == 0) return {dx, dshortcut};
  params.dx = output_mask[0] ? dx.mutable_data_ptr() : nullptr;
  params.dshortcut = output_mask[1] ? dshortcut.mutable_data_ptr() : nullptr;
  run_on_device(
      op, grad,
      [&] {
        for_units(bn_act_bwd_units_cpp(params), grad.numel(),
                  [&](int64_t begin, int64_t end) { bn_act_bwd_cpp(params, begin, end); });
      },
      [&](cudaStream_t stream) { return accel_bn_act_bwd(&params, stream); });
  return {dx, dshortcut};
}

}  // namespace
}  // namespace accel_kernels

TORCH_LIBRARY_FRAGMENT(accel_kernels, m) {
  const auto tags = accel_kernels::operator_tags();
  m.def(
      "bn_act_statistics(Tensor x, Tensor(a!)? running_mean, Tensor(b!)? running_var, "
      "float momentum) -> (Tensor, Tensor)",
      tags);
  m.def(
      "bn_act(Tensor x, Tensor weight, Tensor bias, Tensor mean, Tensor var, Tensor? shortcut, "
      "float eps, bool relu, bool batch_statistics, bool pool, bool save_mask) "
      "-> (Tensor, Tensor, Tensor)",
      tags);
  m.def(
      "bn_act_backward_sums(Tensor grad, Tensor? grad_pooled, Tensor x, Tensor weight, "
      "Tensor bias, Tensor mean, Tensor var, Tensor? mask, float eps, bool relu) "
      "-> (Tensor, Tensor)",
      tags);
  m.def(
      "bn_act_backward(Tensor grad, Tensor? grad_pooled, Tensor? x, Tensor weight, Tensor bias, "
      "Tensor mean, Tensor var, Tensor? mask, Tensor? dweight, Tensor? dbias, Tensor? count, "
      "float eps, bool relu, bool[2] output_mask) -> (Tensor, Tensor)",
      tags);
}

TORCH_LIBRARY_IMPL(accel_kernels, CPU, m) {
  m.impl("bn_act_statistics", &accel_kernels::bn_act_statistics);
  m.impl("bn_act", &accel_kernels::bn_act);
  m.impl("bn_act_backward_sums", &accel_kernels::bn_act_backward_sums);
  m.impl("bn_act_backward", &accel_kernels::bn_act_backward);
}

#ifdef ACCEL_WITH_CUDA
TORCH_LIBRARY_IMPL(accel_kernels, CUDA, m) {
  m.impl("bn_act_statistics", &accel_kernels::bn_act_statistics);
  m.impl("bn_act", &accel_kernels::bn_act);
  m.impl("bn_act_backward_sums", &accel_kernels::bn_act_backward_sums);
  m.impl("bn_act_backward", &accel_kernels::bn_act_backward);
}
#endif
