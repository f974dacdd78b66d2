// temporal_taps, backward: the gradients of x, w and a in one pass over grad and x.

#include "common/launch.cuh"
#include "common/reduce.cuh"
#include "common/vector.cuh"
#include "cuda/temporal_taps.h"

namespace accel_kernels {
namespace {

template <typename scalar_, int kWidth_>
struct BackwardTraits {
  using scalar_t = scalar_;
  using acc_t = accumulate_t<scalar_t>;
  static constexpr int kWidth = kWidth_;  // channels of one lane: 2, or 1 for any C
  static constexpr int kWarps = 8;
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kChannels = 32 * kWidth;     // of one block
  static constexpr int kSums = 3 + kFramesPerUnit;  // per channel: dw, then da of each frame
  static_assert(kWarps * kSums * kChannels * sizeof(acc_t) <= 48 * 1024,
                "the sums of all warps must fit in static shared memory");
};

// One block computes, for 8 frames of one clip, kChannels channels and pixels_per_unit pixels: dx,
// and one row of partial sums of dw and da. A warp reads 32 lanes x 2 channels of one pixel (128
// bytes in fp16); the 8 warps take the pixels in turn. Bytes per element: reads x and grad once
// (grad 10/8 times if T > 8, mostly from L2), writes dx once.
// Two channels a lane, not eight as in the forward: 11 sums per channel have to stay in registers
// (22 here), and 18 loads of 4 bytes in flight per thread still make 18 KB a block.
template <typename Traits>
__global__ void __launch_bounds__(Traits::kThreads, 2)
    temporal_taps_bwd_kernel(const TemporalTapsBackward params, int pixel_units, int frame_units) {
  using scalar_t = typename Traits::scalar_t;
  using acc_t = typename Traits::acc_t;
  using Loaded = Vector<scalar_t, Traits::kWidth>;
  constexpr int kWidth = Traits::kWidth;
  constexpr int kFrames = kFramesPerUnit;

  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x / 32;
  const int pixel_unit = blockIdx.x % pixel_units;
  const int frame_unit = blockIdx.x / pixel_units % frame_units;
  const int n = blockIdx.x / pixel_units / frame_units;
  const int first_channel = blockIdx.y * Traits::kChannels;
  const int c = first_channel + lane * kWidth;
  const int first_frame = frame_unit * kFrames;
  const int frames = params.frames;
  const int channels = params.channels;
  const int64_t frame_size = static_cast<int64_t>(params.pixels) * channels;

  acc_t dw[3][kWidth] = {};
  acc_t da[kFrames][kWidth] = {};

  if (c < channels) {
    const int64_t w_row = static_cast<int64_t>(params.w_per_sample ? n : 0) * channels + c;
    acc_t w[3 * kWidth];
    load_array<3 * kWidth, false>(static_cast<const acc_t*>(params.w) + 3 * w_row, w);
    acc_t a[kFrames][kWidth];
#pragma unroll
    for (int j = 0; j < kFrames; ++j) {
#pragma unroll
      for (int i = 0; i < kWidth; ++i) a[j][i] = 1;
      if (params.a != nullptr && first_frame + j < frames) {
        const int64_t row = static_cast<int64_t>(n) * frames + first_frame + j;
        load_array<kWidth, false>(static_cast<const acc_t*>(params.a) + row * channels + c, a[j]);
      }
    }

    const int begin = pixel_unit * params.pixels_per_unit;
    const int end = min(begin + params.pixels_per_unit, params.pixels);
    for (int p = begin + warp; p < end; p += Traits::kWarps) {
      const int64_t offset = (static_cast<int64_t>(n) * frames + first_frame) * frame_size +
                             static_cast<int64_t>(p) * channels + c;
      const auto* x = static_cast<const scalar_t*>(params.x) + offset;
      const auto* grad = static_cast<const scalar_t*>(params.grad) + offset;

      Loaded x_loaded[kFrames] = {};
      Loaded g_loaded[kFrames + 2] = {};  // one frame more on either side
#pragma unroll
      for (int j = 0; j < kFrames + 2; ++j) {
        const int s = first_frame + j - 1;
        if (s >= 0 && s < frames) g_loaded[j] = load_vector<kWidth>(grad + (j - 1) * frame_size);
      }
#pragma unroll
      for (int j = 0; j < kFrames; ++j) {
        if (first_frame + j < frames) x_loaded[j] = load_vector<kWidth>(x + j * frame_size);
      }
#pragma unroll
      for (int j = 0; j < kFrames; ++j) {
        if (first_frame + j >= frames) break;
        Loaded result;
#pragma unroll
        for (int i = 0; i < kWidth; ++i) {
          const acc_t before = widen(g_loaded[j].value[i]);
          const acc_t here = widen(g_loaded[j + 1].value[i]);
          const acc_t after = widen(g_loaded[j + 2].value[i]);
          const acc_t value = widen(x_loaded[j].value[i]);
          const acc_t h = w[3 * i] * after + w[3 * i + 1] * here + w[3 * i + 2] * before;
          const acc_t z = a[j][i] * value;
          dw[0][i] += z * after;
          dw[1][i] += z * here;
          dw[2][i] += z * before;
          da[j][i] += value * h;
          result.value[i] = narrow<scalar_t>(a[j][i] * h);
        }
        if (params.dx != nullptr) {
          store_vector(static_cast<scalar_t*>(params.dx) + offset + j * frame_size, result);
        }
      }
    }
  }

  __shared__ acc_t sums[Traits::kWarps][Traits::kSums][Traits::kChannels];
#pragma unroll
  for (int i = 0; i < kWidth; ++i) {
#pragma unroll
    for (int k = 0; k < 3; ++k) sums[warp][k][lane * kWidth + i] = dw[k][i];
#pragma unroll
    for (int j = 0; j < kFrames; ++j) sums[warp][3 + j][lane * kWidth + i] = da[j][i];
  }
  __syncthreads();

  for (int item = threadIdx.x; item < Traits::kSums * Traits::kChannels; item += Traits::kThreads) {
    const int row = item / Traits::kChannels;
    const int channel = first_channel + item % Traits::kChannels;
    if (channel >= channels) continue;
    acc_t sum = 0;
    for (int other = 0; other < Traits::kWarps; ++other) {
      sum += sums[other][row][item % Traits::kChannels];
    }
    if (row < 3) {
      const int64_t unit = static_cast<int64_t>(frame_unit) * pixel_units + pixel_unit;
      const int64_t target = ((unit * params.batch + n) * channels + channel) * 3 + row;
      static_cast<acc_t*>(params.dw_partial)[target] = sum;
    } else if (params.da_partial != nullptr && first_frame + row - 3 < frames) {
      const int64_t clip = static_cast<int64_t>(pixel_unit) * params.batch + n;
      const int64_t target = (clip * frames + first_frame + row - 3) * channels + channel;
      static_cast<acc_t*>(params.da_partial)[target] = sum;
    }
  }
}

template <typename Traits>
int launch(const TemporalTapsBackward& params, cudaStream_t stream) {
  using acc_t = typename Traits::acc_t;
  const TemporalTapsUnits units(params);
  const dim3 grid(static_cast<unsigned>(units.count),
                  static_cast<unsigned>(divide_up(params.channels, Traits::kChannels)));
  ACCEL_LAUNCH(temporal_taps_bwd_kernel<Traits>, grid, Traits::kThreads, stream, params,
               units.pixel_units, units.frame_units);
  if (params.dw_partial != params.dw) {
    launch_column_sum<acc_t>(params.dw_partial, params.dw, units.dw_rows, units.dw_columns, stream);
  }
  if (params.da_partial != params.da) {
    launch_column_sum<acc_t>(params.da_partial, params.da, units.pixel_units, units.da_columns,
                             stream);
  }
  return static_cast<int>(cudaGetLastError());
}

}  // namespace
}  // namespace accel_kernels

extern "C" int accel_temporal_taps_bwd(const accel_kernels::TemporalTapsBackward* params,
                                       cudaStream_t stream) {
  using namespace accel_kernels;
  return dispatch_dtype<__half, __nv_bfloat16>(params->dtype, [&](auto tag) -> int {
    using scalar_t = typename decltype(tag)::type;
    if constexpr (sizeof(scalar_t) < 8) {  // fp64 serves tests: the scalar kernel is enough
      constexpr int kBytes = 2 * sizeof(scalar_t);
      if (params->channels % 2 == 0 && is_aligned(params->x, kBytes) &&
          is_aligned(params->grad, kBytes) && is_aligned(params->dx, kBytes)) {
        return launch<BackwardTraits<scalar_t, 2>>(*params, stream);
      }
    }
    return launch<BackwardTraits<scalar_t, 1>>(*params, stream);
  });
}
