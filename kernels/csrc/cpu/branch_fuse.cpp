// branch_fuse, C++ twin of the CUDA operator: same formulas, same partial sums, raw pointers.
// Free of torch; the bindings spread the work units over threads.

#include <algorithm>
#include <cstdint>
#include <type_traits>
#include <vector>

#include "common/clones.h"
#include "common/host_reduce.h"
#include "common/host_types.h"
#include "cuda/branch_fuse.h"

namespace accel_kernels {
namespace {

constexpr int kForwardRows = 64;  // of one forward work unit: long enough to reuse s

template <typename acc_t>
ACCEL_INLINE void forward_row(const acc_t* __restrict f0, const acc_t* __restrict f1,
                              const acc_t* __restrict f2, const acc_t* __restrict s,
                              acc_t* __restrict out, int channels) {
  for (int c = 0; c < channels; ++c) {
    out[c] = s[c] * f0[c] + s[channels + c] * f1[c] + s[2 * channels + c] * f2[c];
  }
}

template <typename scalar_t>
ACCEL_CLONES void forward_units(const BranchFuseForward& params, int64_t begin, int64_t end) {
  using acc_t = accumulate_t<scalar_t>;
  const int channels = params.channels;
  const int row_units = divide_up(params.rows, kForwardRows);
  std::vector<acc_t> wide(size_t{kBranches + 1} * channels);
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t n = unit / row_units;
    const int first = static_cast<int>(unit % row_units) * kForwardRows;
    const int last = std::min(first + kForwardRows, params.rows);
    const auto* s = static_cast<const acc_t*>(params.s) + n * kBranches * channels;
    for (int row = first; row < last; ++row) {
      const int64_t offset = (n * params.rows + row) * channels;
      const acc_t* f[kBranches];
      for (int i = 0; i < kBranches; ++i) {
        f[i] = wide_row(static_cast<const scalar_t*>(params.f[i]) + offset,
                        wide.data() + i * channels, channels);
      }
      auto* out = static_cast<scalar_t*>(params.out) + offset;
      if constexpr (std::is_same_v<scalar_t, acc_t>) {
        forward_row(f[0], f[1], f[2], s, out, channels);
      } else {
        acc_t* wide_out = wide.data() + kBranches * channels;
        forward_row(f[0], f[1], f[2], s, wide_out, channels);
        narrow_row(wide_out, out, channels);
      }
    }
  }
}

template <typename acc_t>
ACCEL_INLINE void scale_row(const acc_t* __restrict grad, const acc_t* __restrict s,
                            acc_t* __restrict df, int channels) {
  for (int c = 0; c < channels; ++c) df[c] = s[c] * grad[c];
}

template <typename acc_t>
ACCEL_INLINE void accumulate_row(const acc_t* __restrict grad, const acc_t* __restrict f,
                                 acc_t* __restrict ds, int channels) {
  for (int c = 0; c < channels; ++c) ds[c] += f[c] * grad[c];
}

template <typename scalar_t>
ACCEL_CLONES void backward_units(const BranchFuseBackward& params, int64_t begin, int64_t end) {
  using acc_t = accumulate_t<scalar_t>;
  const int channels = params.channels;
  const int row_units = branch_fuse_row_units(params);
  std::vector<acc_t> wide_grad(channels);
  std::vector<acc_t> wide(channels);
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t n = unit / row_units;
    const int row_unit = static_cast<int>(unit % row_units);
    const int first = row_unit * params.rows_per_unit;
    const int last = std::min(first + params.rows_per_unit, params.rows);
    const auto* s = static_cast<const acc_t*>(params.s) + n * kBranches * channels;
    acc_t* ds = nullptr;
    if (params.ds != nullptr) {
      const int64_t target = row_unit * int64_t{params.batch} + n;
      ds = static_cast<acc_t*>(params.ds_partial) + target * kBranches * channels;
      std::fill_n(ds, int64_t{kBranches} * channels, acc_t{0});
    }
    for (int row = first; row < last; ++row) {
      const int64_t offset = (n * params.rows + row) * channels;
      const acc_t* grad = wide_row(static_cast<const scalar_t*>(params.grad) + offset,
                                   wide_grad.data(), channels);
      for (int i = 0; i < kBranches; ++i) {
        if (ds != nullptr) {
          const acc_t* f = wide_row(static_cast<const scalar_t*>(params.f[i]) + offset,
                                    wide.data(), channels);
          accumulate_row(grad, f, ds + i * channels, channels);
        }
        if (params.df[i] == nullptr) continue;
        auto* df = static_cast<scalar_t*>(params.df[i]) + offset;
        if constexpr (std::is_same_v<scalar_t, acc_t>) {
          scale_row(grad, s + i * channels, df, channels);
        } else {
          scale_row(grad, s + i * channels, wide.data(), channels);
          narrow_row(wide.data(), df, channels);
        }
      }
    }
  }
}

}  // namespace

int64_t branch_fuse_fwd_units_cpp(const BranchFuseForward& params) {
  return int64_t{params.batch} * divide_up(params.rows, kForwardRows);
}

void branch_fuse_fwd_cpp(const BranchFuseForward& params, int64_t begin, int64_t end) {
  dispatch_dtype<Half, BFloat16>(params.dtype, [&](auto tag) {
    forward_units<typename decltype(tag)::type>(params, begin, end);
  });
}

int64_t branch_fuse_bwd_units_cpp(const BranchFuseBackward& params) {
  return int64_t{params.batch} * branch_fuse_row_units(params);
}

void branch_fuse_bwd_cpp(const BranchFuseBackward& params, int64_t begin, int64_t end) {
  dispatch_dtype<Half, BFloat16>(params.dtype, [&](auto tag) {
    backward_units<typename decltype(tag)::type>(params, begin, end);
  });
}

void branch_fuse_bwd_finish_cpp(const BranchFuseBackward& params) {
  if (params.ds_partial == params.ds) return;
  dispatch_dtype<Half, BFloat16>(params.dtype, [&](auto tag) {
    using acc_t = accumulate_t<typename decltype(tag)::type>;
    column_sum<acc_t>(params.ds_partial, params.ds, branch_fuse_row_units(params),
                      int64_t{params.batch} * kBranches * params.channels);
  });
}

}  // namespace accel_kernels
