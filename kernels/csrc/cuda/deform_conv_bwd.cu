// deform_conv: gradients of x and of the offsets from those of the columns.

#include "common/launch.cuh"
#include "common/vector.cuh"
#include "cuda/deform_conv.cuh"

namespace accel_kernels {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;

// Sums of dx count units of 2^-shift: with |sum| < 2^exponent they stay below 2^62. The limits keep
// the powers of two normal numbers of fp32.
__device__ __forceinline__ int unit_shift(double sum_bound) {
  int exponent;
  frexp(sum_bound, &exponent);
  return max(-120, min(62 - exponent, 120));
}

// One warp takes the k taps of one kernel row of one pixel, its lanes neighbouring channels: loads
// are 64 or 128 bytes, and the atomic additions of a warp to one pixel are 256 neighbouring bytes.
// Bytes per element of a column: reads it once and 4 of x (L1), adds 4 times 8 in L2.
template <typename scalar_t>
__global__ void __launch_bounds__(kThreads)
    deform_conv_gradient_kernel(const DeformConvGradient params, unsigned warps) {
  using acc_t = accumulate_t<scalar_t>;
  const unsigned index = blockIdx.x * kWarps + threadIdx.x / 32;
  if (index >= warps) return;
  const int lane = threadIdx.x % 32;
  const int channels = params.channels;
  const TapRow taps(params, params.first_frame, index);
  const int64_t first_sample = taps.sample(params);
  const auto* x = static_cast<const scalar_t*>(params.x) + taps.base * channels;
  const auto* dcolumn =
      static_cast<const scalar_t*>(params.dcolumns) + first_sample * channels;
  unsigned long long* sums = nullptr;
  acc_t scale = 0;
  if (params.dx_sums != nullptr) {
    const int64_t frame = taps.base - static_cast<int64_t>(params.first_frame) * params.height * params.width;
    sums = reinterpret_cast<unsigned long long*>(params.dx_sums) + frame * channels;
    scale = static_cast<acc_t>(ldexp(static_cast<acc_t>(1), unit_shift(*params.sum_bound)));
  }

  for (int tap = 0; tap < params.kernel; ++tap, dcolumn += channels) {
    const auto corners = place<scalar_t>(params, taps, tap);
    acc_t dy = 0;
    acc_t dx = 0;
    for (int c = lane; c < channels; c += 32) {
      const acc_t g = widen(dcolumn[c]);
      acc_t value[2][2] = {};
#pragma unroll
      for (int lower = 0; lower < 2; ++lower) {
#pragma unroll
        for (int right = 0; right < 2; ++right) {
          if (!corners.exists[lower][right]) continue;
          const int64_t place = (corners.upper + lower * params.width + right) * channels + c;
          value[lower][right] = widen(x[place]);
          if (sums != nullptr) {
            const acc_t share =
                (lower ? corners.y : 1 - corners.y) * (right ? corners.x : 1 - corners.x);
            const long long units = llrint(share * g * scale);
            atomicAdd(sums + place, static_cast<unsigned long long>(units));
          }
        }
      }
      dy += g * ((1 - corners.x) * (value[1][0] - value[0][0]) +
                 corners.x * (value[1][1] - value[0][1]));
      dx += g * ((1 - corners.y) * (value[0][1] - value[0][0]) +
                 corners.y * (value[1][1] - value[1][0]));
      // Infinity and NaN have no integer: they are reported instead. All write the same value.
      if (sums != nullptr && !(g - g == 0)) *params.not_finite = 1;
    }
    if (params.doffset == nullptr) continue;
#pragma unroll
    for (int step = 16; step > 0; step /= 2) {
      dy += __shfl_xor_sync(~0u, dy, step);
      dx += __shfl_xor_sync(~0u, dx, step);
    }
    if (lane < 2) {
      auto* doffset = static_cast<scalar_t*>(params.doffset) + 2 * (taps.sample_in_x(params) + tap);
      doffset[lane] = narrow<scalar_t>(lane == 0 ? dy : dx);
    }
  }
}

// One thread converts kWidth sums. Bytes per element: reads 8, writes 1.
template <typename scalar_t, int kWidth>
__global__ void __launch_bounds__(kThreads)
    deform_conv_convert_kernel(const int64_t* __restrict__ sums, scalar_t* __restrict__ dx,
                               const double* __restrict__ sum_bound,
                               const int* __restrict__ not_finite, int64_t elements) {
  using acc_t = accumulate_t<scalar_t>;
  const int64_t first = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * kWidth;
  if (first >= elements) return;
  const double bound = *sum_bound;
  acc_t unit = static_cast<acc_t>(ldexp(static_cast<acc_t>(1), -unit_shift(bound)));
  if (*not_finite != 0 || !(bound - bound == 0)) unit = static_cast<acc_t>(nan(""));
  int64_t loaded[kWidth];
  load_array<kWidth, (kWidth > 1)>(sums + first, loaded);
  Vector<scalar_t, kWidth> result;
#pragma unroll
  for (int i = 0; i < kWidth; ++i) {
    result.value[i] = narrow<scalar_t>(static_cast<acc_t>(loaded[i]) * unit);
  }
  store_vector(dx + first, result);
}

template <typename scalar_t, int kWidth>
void launch_convert(const DeformConvGradient& params, scalar_t* dx, int64_t elements,
                    cudaStream_t stream) {
  const int64_t threads = elements / kWidth;
  const auto blocks = static_cast<unsigned>((threads + kThreads - 1) / kThreads);
  ACCEL_LAUNCH((deform_conv_convert_kernel<scalar_t, kWidth>), blocks, kThreads, stream,
               params.dx_sums, dx, params.sum_bound, params.not_finite, elements);
}

template <typename scalar_t>
int launch(const DeformConvGradient& params, cudaStream_t stream) {
  const int64_t frame_size = static_cast<int64_t>(params.height) * params.width * params.channels;
  const int64_t warps =
      static_cast<int64_t>(params.frames) * params.height * params.width * params.kernel;
  ACCEL_LAUNCH(deform_conv_gradient_kernel<scalar_t>,
               static_cast<unsigned>((warps + kWarps - 1) / kWarps), kThreads, stream, params,
               static_cast<unsigned>(warps));
  if (params.dx_sums != nullptr) {
    auto* dx = static_cast<scalar_t*>(params.dx) + params.first_frame * frame_size;
    const int64_t elements = params.frames * frame_size;
    constexpr int kWidth = sizeof(scalar_t) < 8 ? 4 : 2;
    if (elements % kWidth == 0 && is_aligned(dx, kWidth * sizeof(scalar_t)) &&
        is_aligned(params.dx_sums, 16)) {
      launch_convert<scalar_t, kWidth>(params, dx, elements, stream);
    } else {
      launch_convert<scalar_t, 1>(params, dx, elements, stream);
    }
  }
  return static_cast<int>(cudaGetLastError());
}

}  // namespace
}  // namespace accel_kernels

extern "C" int accel_deform_conv_gradient(const accel_kernels::DeformConvGradient* params,
                                          cudaStream_t stream) {
  using namespace accel_kernels;
  return dispatch_dtype<__half, __nv_bfloat16>(params->dtype, [&](auto tag) -> int {
    return launch<typename decltype(tag)::type>(*params, stream);
  });
}
