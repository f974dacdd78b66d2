// deform_conv: columns of sampled values, the left factor of the convolution's GEMM.

#include "common/launch.cuh"
#include "common/vector.cuh"
#include "cuda/deform_conv.cuh"

namespace accel_kernels {
namespace {

template <typename scalar_, int kWidth_>
struct ColumnTraits {
  using scalar_t = scalar_;
  using acc_t = accumulate_t<scalar_t>;
  static constexpr int kWidth = kWidth_;  // channels of one thread: 16 bytes, or 1 for any C
  static constexpr int kThreads = 256;
};

// One thread makes kWidth channels of the k taps of one kernel row of one pixel; threads run along
// c, then the kernel row, then the pixel. Bytes per element: writes 1 (to L2: the GEMM that follows
// reads it there), reads 4 of x, which overlap between taps and pixels and come from L1. k taps a
// thread share the index arithmetic, and their 4k loads are independent of each other.
template <typename Traits>
__global__ void __launch_bounds__(Traits::kThreads)
    deform_conv_columns_kernel(const DeformConvColumns params, unsigned threads) {
  using scalar_t = typename Traits::scalar_t;
  using acc_t = typename Traits::acc_t;
  constexpr int kWidth = Traits::kWidth;

  const unsigned index = blockIdx.x * Traits::kThreads + threadIdx.x;
  if (index >= threads) return;
  const int channels = params.channels;
  const unsigned groups = channels / kWidth;
  const TapRow taps(params, params.first_frame, index / groups);
  const unsigned c = index % groups * kWidth;
  const auto* x = static_cast<const scalar_t*>(params.x) + taps.base * channels + c;
  auto* column =
      static_cast<scalar_t*>(params.columns) + taps.sample(params) * channels + c;

  for (int tap = 0; tap < params.kernel; ++tap, column += channels) {
    const auto corners = place<scalar_t>(params, taps, tap);
    acc_t sum[kWidth] = {};
#pragma unroll
    for (int lower = 0; lower < 2; ++lower) {
#pragma unroll
      for (int right = 0; right < 2; ++right) {
        if (!corners.exists[lower][right]) continue;
        const acc_t share =
            (lower ? corners.y : 1 - corners.y) * (right ? corners.x : 1 - corners.x);
        const int64_t pixel = corners.upper + lower * params.width + right;
        const auto loaded = load_vector<kWidth>(x + pixel * channels);
#pragma unroll
        for (int i = 0; i < kWidth; ++i) sum[i] += share * widen(loaded.value[i]);
      }
    }
    Vector<scalar_t, kWidth> result;
#pragma unroll
    for (int i = 0; i < kWidth; ++i) result.value[i] = narrow<scalar_t>(sum[i]);
    store_vector(column, result);
  }
}

template <typename Traits>
int launch(const DeformConvColumns& params, cudaStream_t stream) {
  const int64_t threads = static_cast<int64_t>(params.frames) * params.height * params.width *
                          params.kernel * (params.channels / Traits::kWidth);
  const auto blocks = static_cast<unsigned>((threads + Traits::kThreads - 1) / Traits::kThreads);
  ACCEL_LAUNCH(deform_conv_columns_kernel<Traits>, blocks, Traits::kThreads, stream, params,
               static_cast<unsigned>(threads));
  return static_cast<int>(cudaGetLastError());
}

}  // namespace
}  // namespace accel_kernels

extern "C" int accel_deform_conv_columns(const accel_kernels::DeformConvColumns* params,
                                         cudaStream_t stream) {
  using namespace accel_kernels;
  return dispatch_dtype<__half, __nv_bfloat16>(params->dtype, [&](auto tag) -> int {
    using scalar_t = typename decltype(tag)::type;
    if constexpr (sizeof(scalar_t) < 8) {  // fp64 serves tests: the scalar kernel is enough
      constexpr int kWidth = 16 / sizeof(scalar_t);
      if (params->channels % kWidth == 0 && is_aligned(params->x, 16) &&
          is_aligned(params->columns, 16)) {
        return launch<ColumnTraits<scalar_t, kWidth>>(*params, stream);
      }
    }
    return launch<ColumnTraits<scalar_t, 1>>(*params, stream);
  });
}
