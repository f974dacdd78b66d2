// branch_fuse, forward.

#include "common/launch.cuh"
#include "common/vector.cuh"
#include "cuda/branch_fuse.h"

namespace accel_kernels {
namespace {

template <typename scalar_, int kWidth_>
struct ForwardTraits {
  using scalar_t = scalar_;
  using acc_t = accumulate_t<scalar_t>;
  static constexpr int kWidth = kWidth_;  // channels of one thread: 16 bytes, or 1 for any C
  static constexpr int kThreads = 256;
};

// One thread computes kWidth channels of one row of one clip. Bytes per element: reads three
// branches once, writes the result once; s is small and stays in L1/L2.
template <typename Traits>
__global__ void __launch_bounds__(Traits::kThreads)
    branch_fuse_fwd_kernel(const BranchFuseForward params) {
  using scalar_t = typename Traits::scalar_t;
  using acc_t = typename Traits::acc_t;
  constexpr int kWidth = Traits::kWidth;

  const int64_t index =
      (static_cast<int64_t>(blockIdx.x) * Traits::kThreads + threadIdx.x) * kWidth;
  const int64_t clip_size = static_cast<int64_t>(params.rows) * params.channels;
  const int64_t n = index / clip_size;
  if (n >= params.batch) return;
  const int c = static_cast<int>(index % params.channels);

  acc_t sum[kWidth] = {};
#pragma unroll
  for (int i = 0; i < kBranches; ++i) {
    acc_t s[kWidth];
    const int64_t row = n * kBranches + i;
    load_array<kWidth, (kWidth > 1)>(
        static_cast<const acc_t*>(params.s) + row * params.channels + c, s);
    const auto f = load_vector<kWidth>(static_cast<const scalar_t*>(params.f[i]) + index);
#pragma unroll
    for (int j = 0; j < kWidth; ++j) sum[j] += s[j] * widen(f.value[j]);
  }
  Vector<scalar_t, kWidth> result;
#pragma unroll
  for (int j = 0; j < kWidth; ++j) result.value[j] = narrow<scalar_t>(sum[j]);
  store_vector(static_cast<scalar_t*>(params.out) + index, result);
}

template <typename Traits>
int launch(const BranchFuseForward& params, cudaStream_t stream) {
  const int64_t threads =
      static_cast<int64_t>(params.batch) * params.rows * params.channels / Traits::kWidth;
  const auto blocks = static_cast<unsigned>(divide_up(threads, Traits::kThreads));
  ACCEL_LAUNCH(branch_fuse_fwd_kernel<Traits>, blocks, Traits::kThreads, stream, params);
  return static_cast<int>(cudaGetLastError());
}

}  // namespace
}  // namespace accel_kernels

extern "C" int accel_branch_fuse_fwd(const accel_kernels::BranchFuseForward* params,
                                     cudaStream_t stream) {
  using namespace accel_kernels;
  return dispatch_dtype<__half, __nv_bfloat16>(params->dtype, [&](auto tag) -> int {
    using scalar_t = typename decltype(tag)::type;
    if constexpr (sizeof(scalar_t) < 8) {  // fp64 serves tests: the scalar kernel is enough
      constexpr int kWidth = 16 / sizeof(scalar_t);
      bool aligned = params->channels % kWidth == 0 && is_aligned(params->out, 16) &&
                     is_aligned(params->s, 16);
      for (const void* f : params->f) aligned = aligned && is_aligned(f, 16);
      if (aligned) return launch<ForwardTraits<scalar_t, kWidth>>(*params, stream);
    }
    return launch<ForwardTraits<scalar_t, 1>>(*params, stream);
  });
}
