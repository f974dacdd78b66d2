// deform_conv: schema, argument checks, and the GEMMs over blocks of columns that stay in cache.

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/abs.h>
#include <ATen/ops/add.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/amax.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/linalg_vector_norm.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/sum.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>

#include <c10/core/impl/LocalDispatchKeySet.h>

#include <array>
#include <limits>
#include <optional>
#include <tuple>

#include "bindings/checks.h"
#include "cuda/deform_conv.h"

namespace accel_kernels {
namespace {

constexpr auto kChannelsLast = at::MemoryFormat::ChannelsLast;

// A unit of the C++ twin is a group of frames. Its split is a function of the shape alone.
constexpr int64_t kUnitRows = 256;            // at least: GEMMs of fewer rows are slow
constexpr int64_t kUnitsWithWeights = 16;     // at most, where each keeps a gradient of the weights
constexpr int64_t kColumnElements = 1 << 18;  // of one block of columns
constexpr int64_t kColumnRows = 64;           // at least

// Types are chosen here; autocast would lower some of the products once more.
using NoAutocast = c10::impl::ExcludeDispatchKeyGuard;

// Everything both directions need, and rows of pixels as matrices.
struct Problem {
  Problem(const char* op, const Tensor& x, const Tensor& offset, const Tensor& weight);

  int64_t batch, channels, height, width, outputs, kernel, pixels;
  int64_t width_of_columns;  // k*k*C
  at::ScalarType coefficient;

  DeformConvShape shape(const Tensor& x, const Tensor& offset) const {
    return {dtype_of("deform_conv", x),
            static_cast<int>(batch),
            static_cast<int>(channels),
            static_cast<int>(height),
            static_cast<int>(width),
            static_cast<int>(kernel),
            x.const_data_ptr(),
            offset.const_data_ptr()};
  }
  // [O, k*k*C], taps outside channels: the memory of a weight in channels_last.
  Tensor matrix(const Tensor& weight) const {
    return weight.as_strided({outputs, width_of_columns}, {width_of_columns, 1});
  }
  // [B*P, columns] of an activation in channels_last.
  Tensor rows(const Tensor& activation) const {
    const int64_t columns = activation.size(1);
    return activation.as_strided({batch * pixels, columns}, {columns, 1});
  }
};

Problem::Problem(const char* op, const Tensor& x, const Tensor& offset, const Tensor& weight) {
  check_activation(op, "x", x);
  check_activation(op, "offset", offset);
  TORCH_CHECK_VALUE(weight.dim() == 4 && weight.size(1) == x.size(1) &&
                        weight.size(2) == weight.size(3) && weight.size(2) % 2 == 1 &&
                        weight.numel() > 0,
                    op, ": weight must be [O, C, k, k] with C = ", x.size(1),
                    " and k odd, got ", weight.sizes(), " (x is ", x.sizes(), ").");
  batch = x.size(0);
  channels = x.size(1);
  height = x.size(2);
  width = x.size(3);
  outputs = weight.size(0);
  kernel = weight.size(2);
  pixels = height * width;
  width_of_columns = kernel * kernel * channels;
  TORCH_CHECK_VALUE(offset.sizes().equals({batch, 2 * kernel * kernel, height, width}), op,
                    ": offset must be [B, 2*k*k, H, W] = [", batch, ", ", 2 * kernel * kernel, ", ",
                    height, ", ", width, "], got ", offset.sizes(), " (x is ", x.sizes(), ").");
  TORCH_CHECK_TYPE(offset.scalar_type() == x.scalar_type(), op, ": offset must be ",
                   x.scalar_type(), " as x is, got ", offset.scalar_type(), ".");
  TORCH_CHECK_VALUE(offset.device() == x.device() && weight.device() == x.device(), op,
                    ": offset and weight are on ", offset.device(), " and ", weight.device(),
                    ", x is on ", x.device(), ".");
  coefficient = x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  TORCH_CHECK_TYPE(weight.scalar_type() == coefficient, op, ": weight must be ", coefficient,
                   " (x is ", x.scalar_type(), "), got ", weight.scalar_type(), ".");
  TORCH_CHECK_VALUE(weight.is_contiguous(kChannelsLast), op,
                    ": weight must be contiguous in channels_last, got strides ", weight.strides(),
                    " for shape ", weight.sizes(), ".");
  // Positions inside one frame's columns are 32-bit in the kernels.
  constexpr int64_t kLimit = std::numeric_limits<int>::max();
  TORCH_CHECK_VALUE(pixels * width_of_columns <= kLimit &&
                        (height + 3) * (width + 2) * channels <= kLimit && batch <= kLimit,
                    op, ": H*W*k*k*C must be below 2^31, got x of ", x.sizes(), ", k = ", kernel,
                    ".");
}

// Products with one factor [K, M] in the C++ twin: rows [R, K] -> [R, M].
//
// In fp32 by the operator that compiled graphs call for linear layers: oneDNN uses AVX-512 wherever
// there is any, MKL (at::mm) only on processors of its own maker and is half as fast on others. It
// is no public operator, so at::mm stays as the other way.
class Product {
 public:
  explicit Product(const Tensor& factor) : factor_(factor) {
    if (factor.scalar_type() != at::kFloat) return;
    linear_ = c10::Dispatcher::singleton().findSchema({"mkldnn::_linear_pointwise", ""});
    if (linear_.has_value() && linear_->schema().arguments().size() != 6) linear_.reset();
  }

  Tensor operator()(const Tensor& rows) const {
    if (!linear_.has_value()) return at::mm(rows, factor_);
    torch::jit::Stack stack{rows,   factor_.t(), c10::IValue(),
                            "none", c10::List<std::optional<at::Scalar>>(), ""};
    linear_->callBoxed(stack);
    return stack.front().toTensor();
  }

 private:
  Tensor factor_;
  std::optional<c10::OperatorHandle> linear_;
};

// The groups of frames of the C++ twin.
struct Units {
  Units(const Problem& problem, bool want_dweight) {
    frames = std::max<int64_t>(kUnitRows / problem.pixels, 1);
    if (want_dweight) {
      const int64_t needed = (problem.batch + kUnitsWithWeights - 1) / kUnitsWithWeights;
      frames = std::max(frames, needed);
    }
    count = (problem.batch + frames - 1) / frames;
    block_rows = std::max(kColumnElements / problem.width_of_columns, kColumnRows);
    block_rows = std::min(block_rows, frames * problem.pixels);
  }
  int64_t frames;  // of a unit, the last may have fewer
  int64_t count;
  int64_t block_rows;  // of one GEMM
};

// GEMMs run in the thread that made their columns, so that threads change no sum.
template <typename Body>
void for_row_blocks(const Problem& problem, const Units& units, const Body& body) {
  for_units(units.count, problem.batch * problem.pixels * problem.width_of_columns,
            [&](int64_t begin, int64_t end) {
              const at::AutoDispatchBelowADInplaceOrView below_autograd;  // other threads are not
              for (int64_t unit = begin; unit < end; ++unit) {
                const int64_t first = unit * units.frames;
                body(unit, first, std::min(units.frames, problem.batch - first));
              }
            });
}

void forward_cpp(const Problem& problem, const Tensor& x, const Tensor& offset,
                 const Tensor& weight, const std::optional<Tensor>& bias, const Tensor& out) {
  const DeformConvShape shape = problem.shape(x, offset);
  const Units units(problem, false);
  const Product product(problem.matrix(weight).t());  // [k*k*C, O]
  const Tensor out_rows = problem.rows(out);
  for_row_blocks(problem, units, [&](int64_t, int64_t first, int64_t frames) {
    const Tensor padded = at::empty({frames, deform_conv_padded_size(shape)}, weight.options());
    const Tensor columns =
        at::empty({units.block_rows, problem.width_of_columns}, weight.options());
    deform_conv_pad_cpp(shape, first, frames, padded.mutable_data_ptr());
    const int64_t rows = frames * problem.pixels;
    for (int64_t row = 0; row < rows; row += units.block_rows) {
      const int64_t count = std::min(units.block_rows, rows - row);
      deform_conv_columns_cpp(shape, padded.const_data_ptr(), first, row, row + count,
                              columns.mutable_data_ptr());
      Tensor target = out_rows.narrow(0, first * problem.pixels + row, count);
      const Tensor sums = product(columns.narrow(0, 0, count));
      if (bias.has_value()) {
        at::add_out(target, sums, *bias);
      } else {
        target.copy_(sums);
      }
    }
  });
}

void backward_cpp(const Problem& problem, const Tensor& grad, const Tensor& x,
                  const Tensor& offset, const Tensor& weight, const Tensor& dx,
                  const Tensor& doffset, const Tensor& dweight) {
  const DeformConvShape shape = problem.shape(x, offset);
  const bool want_dweight = dweight.numel() > 0;
  const bool want_columns = dx.numel() > 0 || doffset.numel() > 0;
  const Units units(problem, want_dweight);
  const Product product(problem.matrix(weight));  // [O, k*k*C]
  const Tensor grad_rows = problem.rows(grad);
  const Tensor partial =
      at::empty({want_dweight ? units.count : 0, problem.outputs, problem.width_of_columns},
                weight.options());
  for_row_blocks(problem, units, [&](int64_t unit, int64_t first, int64_t frames) {
    const Tensor padded = at::empty({frames, deform_conv_padded_size(shape)}, weight.options());
    const Tensor padded_dx = dx.numel() > 0 ? at::zeros_like(padded) : Tensor();
    const Tensor columns = at::empty(
        {want_dweight ? units.block_rows : 0, problem.width_of_columns}, weight.options());
    deform_conv_pad_cpp(shape, first, frames, padded.mutable_data_ptr());
    const int64_t rows = frames * problem.pixels;
    for (int64_t row = 0; row < rows; row += units.block_rows) {
      const int64_t count = std::min(units.block_rows, rows - row);
      const Tensor given = grad_rows.narrow(0, first * problem.pixels + row, count);
      if (want_dweight) {
        const Tensor block = columns.narrow(0, 0, count);
        deform_conv_columns_cpp(shape, padded.const_data_ptr(), first, row, row + count,
                                columns.mutable_data_ptr());
        Tensor sum = partial[unit];
        if (row == 0) {
          at::mm_out(sum, given.t(), block);
        } else {
          sum.addmm_(given.t(), block);
        }
      }
      if (want_columns) {
        deform_conv_gradient_cpp(shape, padded.const_data_ptr(), first, row, row + count,
                                 product(given).const_data_ptr(),
                                 dx.numel() > 0 ? padded_dx.mutable_data_ptr() : nullptr,
                                 doffset.numel() > 0 ? doffset.mutable_data_ptr() : nullptr);
      }
    }
    if (dx.numel() > 0) {
      deform_conv_crop_cpp(shape, padded_dx.const_data_ptr(), first, frames,
                           dx.mutable_data_ptr());
    }
  });
  if (want_dweight) {
    Tensor sum = problem.matrix(dweight);
    sum.copy_(partial[0]);
    for (int64_t unit = 1; unit < units.count; ++unit) sum.add_(partial[unit]);
  }
}

// Frames of one block of columns: half of the L2 cache, where the GEMM finds them.
int64_t frames_per_block(const Problem& problem, const Tensor& x) {
  int l2_bytes = 0;
#ifdef ACCEL_WITH_CUDA
  C10_CUDA_CHECK(cudaDeviceGetAttribute(&l2_bytes, cudaDevAttrL2CacheSize, x.device().index()));
#endif
  const int64_t frame_bytes = problem.pixels * problem.width_of_columns * x.element_size();
  return std::clamp<int64_t>(l2_bytes / 2 / frame_bytes, 1, problem.batch);
}

int forward_cuda(const Problem& problem, const Tensor& x, const Tensor& offset,
                 const Tensor& weight, const std::optional<Tensor>& bias, const Tensor& out,
                 cudaStream_t stream) {
  const int64_t block = frames_per_block(problem, x);
  const Tensor columns = at::empty({block * problem.pixels, problem.width_of_columns}, x.options());
  const Tensor transposed = problem.matrix(weight).to(x.scalar_type()).t();  // [k*k*C, O]
  const Tensor added = bias.has_value() ? bias->to(x.scalar_type()) : Tensor();
  const Tensor out_rows = problem.rows(out);
  DeformConvColumns params{problem.shape(x, offset)};
  params.columns = columns.mutable_data_ptr();
  for (int64_t first = 0; first < problem.batch; first += block) {
    params.first_frame = static_cast<int>(first);
    params.frames = static_cast<int>(std::min(block, problem.batch - first));
    if (const int error = accel_deform_conv_columns(&params, stream)) return error;
    const int64_t rows = params.frames * problem.pixels;
    Tensor target = out_rows.narrow(0, first * problem.pixels, rows);
    if (added.defined()) {
      at::addmm_out(target, added, columns.narrow(0, 0, rows), transposed);
    } else {
      at::mm_out(target, columns.narrow(0, 0, rows), transposed);
    }
  }
  return 0;
}

int backward_cuda(const Problem& problem, const Tensor& grad, const Tensor& x, const Tensor& offset,
                  const Tensor& weight, const Tensor& dx, const Tensor& doffset,
                  const Tensor& dweight, cudaStream_t stream) {
  const bool want_dx = dx.numel() > 0;
  const int64_t block = frames_per_block(problem, x);
  const Tensor columns = at::empty({block * problem.pixels, problem.width_of_columns}, x.options());
  const Tensor matrix = problem.matrix(weight).to(x.scalar_type());  // [O, k*k*C]
  const Tensor grad_rows = problem.rows(grad);

  DeformConvColumns again{problem.shape(x, offset)};
  again.columns = columns.mutable_data_ptr();
  DeformConvGradient params{problem.shape(x, offset)};
  params.dcolumns = columns.const_data_ptr();
  params.doffset = doffset.numel() > 0 ? doffset.mutable_data_ptr() : nullptr;
  Tensor sum_bound, sums, not_finite;
  if (want_dx) {
    // |dcolumn| <= max|grad| * max over columns of sum|weight|, and a pixel is touched by at most
    // all samples of its frame, each with a share of at most 1.
    const Tensor largest_grad = at::linalg_vector_norm(grad, std::numeric_limits<double>::infinity());
    const Tensor largest_weight = matrix.to(at::kDouble).abs().sum(0).amax();
    const double samples = static_cast<double>(problem.pixels * problem.kernel * problem.kernel);
    sum_bound = largest_grad.to(at::kDouble).mul(largest_weight).mul(samples);
    sums = at::empty({block * problem.pixels * problem.channels}, x.options().dtype(at::kLong));
    not_finite = at::zeros({1}, x.options().dtype(at::kInt));
    params.sum_bound = static_cast<const double*>(sum_bound.const_data_ptr());
    params.dx_sums = static_cast<int64_t*>(sums.mutable_data_ptr());
    params.not_finite = static_cast<int*>(not_finite.mutable_data_ptr());
    params.dx = dx.mutable_data_ptr();
  }
  Tensor dmatrix, dmatrix_block;
  if (dweight.numel() > 0) {
    dmatrix = problem.matrix(dweight).zero_();
    dmatrix_block = at::empty_like(matrix);
  }
  for (int64_t first = 0; first < problem.batch; first += block) {
    again.first_frame = params.first_frame = static_cast<int>(first);
    again.frames = params.frames = static_cast<int>(std::min(block, problem.batch - first));
    const int64_t rows = params.frames * problem.pixels;
    const Tensor given = grad_rows.narrow(0, first * problem.pixels, rows);
    Tensor block_columns = columns.narrow(0, 0, rows);
    if (dmatrix.defined()) {
      if (const int error = accel_deform_conv_columns(&again, stream)) return error;
      dmatrix.add_(at::mm_out(dmatrix_block, given.t(), block_columns));
    }
    if (want_dx || params.doffset != nullptr) {
      at::mm_out(block_columns, given, matrix);
      if (want_dx) sums.zero_();
      if (const int error = accel_deform_conv_gradient(&params, stream)) return error;
    }
  }
  return 0;
}

Tensor deform_conv(const Tensor& x, const Tensor& offset, const Tensor& weight,
                   const std::optional<Tensor>& bias) {
  const char* op = "deform_conv";
  const NoAutocast guard(c10::autocast_dispatch_keyset);
  const Problem problem(op, x, offset, weight);
  if (bias.has_value()) {
    TORCH_CHECK_VALUE(bias->sizes().equals({problem.outputs}), op, ": bias must be [O] = [",
                      problem.outputs, "], got ", bias->sizes(), ".");
    check_coefficient(op, "bias", *bias, x);
  }
  Tensor out = at::empty({problem.batch, problem.outputs, problem.height, problem.width},
                         x.options().memory_format(kChannelsLast));
  if (out.numel() == 0) return out;
  run_on_device(
      op, x,
      [&] {  // 16-bit types are computed in fp32, and rounded once
        Tensor wide_out = out.to(problem.coefficient);
        forward_cpp(problem, x.to(problem.coefficient), offset.to(problem.coefficient), weight,
                    bias, wide_out);
        if (!wide_out.is_same(out)) out.copy_(wide_out);
      },
      [&](cudaStream_t stream) {
        return forward_cuda(problem, x, offset, weight, bias, out, stream);
      });
  return out;
}

// Gradients for which output_mask is false come back as empty tensors of shape [0].
std::tuple<Tensor, Tensor, Tensor, Tensor> deform_conv_backward(const Tensor& grad, const Tensor& x,
                                                                const Tensor& offset,
                                                                const Tensor& weight,
                                                                std::array<bool, 4> output_mask) {
  const char* op = "deform_conv_backward";
  const NoAutocast guard(c10::autocast_dispatch_keyset);
  const auto [want_dx, want_doffset, want_dweight, want_dbias] = output_mask;
  const Problem problem(op, x, offset, weight);
  check_activation(op, "grad", grad);
  TORCH_CHECK_VALUE(
      grad.sizes().equals({problem.batch, problem.outputs, problem.height, problem.width}) &&
          grad.scalar_type() == x.scalar_type() && grad.device() == x.device(),
      op, ": grad must be [B, O, H, W] of x's dtype and device, got ", grad.sizes(), " ",
      grad.options(), " (x is ", x.sizes(), " ", x.options(), ").");

  const auto like = [&](const Tensor& tensor, bool wanted) {
    return wanted ? at::empty_like(tensor, {}, kChannelsLast) : at::empty({0}, tensor.options());
  };
  Tensor dx = like(x, want_dx);
  Tensor doffset = like(offset, want_doffset);
  Tensor dweight = like(weight, want_dweight);
  Tensor dbias = want_dbias ? at::sum(grad, {0, 2, 3}, false, problem.coefficient)
                            : at::empty({0}, weight.options());
  if (grad.numel() == 0) {
    if (want_dweight) dweight.zero_();
    return {dx, doffset, dweight, dbias};
  }
  if (!want_dx && !want_doffset && !want_dweight) return {dx, doffset, dweight, dbias};
  run_on_device(
      op, x,
      [&] {
        const auto wide = [&](const Tensor& tensor) { return tensor.to(problem.coefficient); };
        const Tensor wide_dx = wide(dx);
        const Tensor wide_doffset = wide(doffset);
        backward_cpp(problem, wide(grad), wide(x), wide(offset), weight, wide_dx, wide_doffset,
                     dweight);
        if (!wide_dx.is_same(dx)) dx.copy_(wide_dx);
        if (!wide_doffset.is_same(doffset)) doffset.copy_(wide_doffset);
      },
      [&](cudaStream_t stream) {
        return backward_cuda(problem, grad, x, offset, weight, dx, doffset, dweight, stream);
      });
  return {dx, doffset, dweight, dbias};
}

}  // namespace
}  // namespace accel_kernels

TORCH_LIBRARY_FRAGMENT(accel_kernels, m) {
  const auto tags = accel_kernels::operator_tags();
  m.def("deform_conv(Tensor x, Tensor offset, Tensor weight, Tensor? bias) -> Tensor", tags);
  m.def(
      "deform_conv_backward(Tensor grad, Tensor x, Tensor offset, Tensor weight, "
      "bool[4] output_mask) -> (Tensor, Tensor, Tensor, Tensor)",
      tags);
}

TORCH_LIBRARY_IMPL(accel_kernels, CPU, m) {
  m.impl("deform_conv", &accel_kernels::deform_conv);
  m.impl("deform_conv_backward", &accel_kernels::deform_conv_backward);
}

#ifdef ACCEL_WITH_CUDA
TORCH_LIBRARY_IMPL(accel_kernels, CUDA, m) {
  m.impl("deform_conv", &accel_kernels::deform_conv);
  m.impl("deform_conv_backward", &accel_kernels::deform_conv_backward);
}
#endif
