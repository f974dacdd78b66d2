// branch_fuse, backward: the gradients of the branches and of s in one pass.

#include "common/launch.cuh"
#include "common/reduce.cuh"
#include "common/vector.cuh"
#include "cuda/branch_fuse.h"

namespace accel_kernels {
namespace {

template <typename scalar_, int kWidth_>
struct BackwardTraits {
  using scalar_t = scalar_;
  using acc_t = accumulate_t<scalar_t>;
  static constexpr int kWidth = kWidth_;  // channels of one lane: 4, or 1 for any C
  static constexpr int kWarps = 8;
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kChannels = 32 * kWidth;  // of one block
  static_assert(kWarps * kBranches * kChannels * sizeof(acc_t) <= 48 * 1024,
                "the sums of all warps must fit in static shared memory");
};

// One block computes, for kChannels channels and rows_per_unit rows of one clip, df and one row of
// partial sums of ds. The 8 warps take the rows in turn, 256 neighbouring bytes each in fp16. Bytes
// per element: reads grad and three branches once, writes three gradients once.
template <typename Traits>
__global__ void __launch_bounds__(Traits::kThreads, 2)
    branch_fuse_bwd_kernel(const BranchFuseBackward params, int row_units) {
  using scalar_t = typename Traits::scalar_t;
  using acc_t = typename Traits::acc_t;
  constexpr int kWidth = Traits::kWidth;

  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x / 32;
  const int row_unit = blockIdx.x % row_units;
  const int n = blockIdx.x / row_units;
  const int first_channel = blockIdx.y * Traits::kChannels;
  const int c = first_channel + lane * kWidth;
  const int channels = params.channels;

  acc_t ds[kBranches][kWidth] = {};
  if (c < channels) {
    acc_t s[kBranches][kWidth];
#pragma unroll
    for (int i = 0; i < kBranches; ++i) {
      const int64_t row = static_cast<int64_t>(n) * kBranches + i;
      load_array<kWidth, false>(static_cast<const acc_t*>(params.s) + row * channels + c, s[i]);
    }
    const int begin = row_unit * params.rows_per_unit;
    const int end = min(begin + params.rows_per_unit, params.rows);
    for (int row = begin + warp; row < end; row += Traits::kWarps) {
      const int64_t offset = (static_cast<int64_t>(n) * params.rows + row) * channels + c;
      const auto grad = load_vector<kWidth>(static_cast<const scalar_t*>(params.grad) + offset);
      Vector<scalar_t, kWidth> f[kBranches] = {};
      if (params.ds != nullptr) {
#pragma unroll
        for (int i = 0; i < kBranches; ++i) {
          f[i] = load_vector<kWidth>(static_cast<const scalar_t*>(params.f[i]) + offset);
        }
      }
#pragma unroll
      for (int i = 0; i < kBranches; ++i) {
        Vector<scalar_t, kWidth> df;
#pragma unroll
        for (int j = 0; j < kWidth; ++j) {
          const acc_t g = widen(grad.value[j]);
          ds[i][j] += g * widen(f[i].value[j]);
          df.value[j] = narrow<scalar_t>(s[i][j] * g);
        }
        if (params.df[i] != nullptr) {
          store_vector(static_cast<scalar_t*>(params.df[i]) + offset, df);
        }
      }
    }
  }
  if (params.ds == nullptr) return;

  __shared__ acc_t sums[Traits::kWarps][kBranches][Traits::kChannels];
#pragma unroll
  for (int i = 0; i < kBranches; ++i) {
#pragma unroll
    for (int j = 0; j < kWidth; ++j) sums[warp][i][lane * kWidth + j] = ds[i][j];
  }
  __syncthreads();
  for (int item = threadIdx.x; item < kBranches * Traits::kChannels; item += Traits::kThreads) {
    const int i = item / Traits::kChannels;
    const int channel = first_channel + item % Traits::kChannels;
    if (channel >= channels) continue;
    acc_t sum = 0;
    for (int other = 0; other < Traits::kWarps; ++other) {
      sum += sums[other][i][item % Traits::kChannels];
    }
    const int64_t clip = static_cast<int64_t>(row_unit) * params.batch + n;
    static_cast<acc_t*>(params.ds_partial)[(clip * kBranches + i) * channels + channel] = sum;
  }
}

template <typename Traits>
int launch(const BranchFuseBackward& params, cudaStream_t stream) {
  const int row_units = branch_fuse_row_units(params);
  const dim3 grid(static_cast<unsigned>(params.batch * row_units),
                  static_cast<unsigned>(divide_up(params.channels, Traits::kChannels)));
  ACCEL_LAUNCH(branch_fuse_bwd_kernel<Traits>, grid, Traits::kThreads, stream, params, row_units);
  if (params.ds != params.ds_partial) {
    const int64_t columns = static_cast<int64_t>(params.batch) * kBranches * params.channels;
    launch_column_sum<typename Traits::acc_t>(params.ds_partial, params.ds, row_units, columns,
                                              stream);
  }
  return static_cast<int>(cudaGetLastError());
}

}  // namespace
}  // namespace accel_kernels

extern "C" int accel_branch_fuse_bwd(const accel_kernels::BranchFuseBackward* params,
                                     cudaStream_t stream) {
  using namespace accel_kernels;
  return dispatch_dtype<__half, __nv_bfloat16>(params->dtype, [&](auto tag) -> int {
    using scalar_t = typename decltype(tag)::type;
    if constexpr (sizeof(scalar_t) < 8) {  // fp64 serves tests: the scalar kernel is enough
      constexpr int kWidth = 4;
      constexpr int kBytes = kWidth * sizeof(scalar_t);
      bool aligned = params->channels % kWidth == 0 && is_aligned(params->grad, kBytes);
      for (int i = 0; i < kBranches; ++i) {
        aligned = aligned && is_aligned(params->f[i], kBytes) && is_aligned(params->df[i], kBytes);
      }
      if (aligned) return launch<BackwardTraits<scalar_t, kWidth>>(*params, stream);
    }
    return launch<BackwardTraits<scalar_t, 1>>(*params, stream);
  });
}
