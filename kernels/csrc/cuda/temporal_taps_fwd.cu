// temporal_taps, forward (and the gradient of x alone, which is the same stencil transposed).

#include "common/launch.cuh"
#include "common/vector.cuh"
#include "cuda/temporal_taps.h"

namespace accel_kernels {
namespace {

template <typename scalar_, int kWidth_>
struct ForwardTraits {
  using scalar_t = scalar_;
  using acc_t = accumulate_t<scalar_t>;
  static constexpr int kWidth = kWidth_;  // channels of one thread: 16 bytes, or 1 for any C
  static constexpr int kFramesInFlight = 8;
  static constexpr int kThreads = 128;
  static constexpr int kBlocksPerSm = 3;  // allows 168 registers; 128 make bf16 spill on sm_90
  static_assert(kThreads % 32 == 0, "whole warps: 32 threads read 512 neighbouring bytes a frame");
};

// One thread computes kWidth channels of one pixel of one clip, for all frames; warps run along c,
// then p. Bytes per element: reads x once, writes y once; w and a are small and stay in L1/L2.
// Up to 8 frames are requested before the first is used: 128 threads x 8 x 16 bytes = 16 KB a
// block, and three blocks cover latency x bandwidth of an SM (about 25 KB on an H200). 128 threads
// rather than 256 because the 7x7 sites of a small batch make only about one block of 256 per SM.
template <typename Traits>
__global__ void __launch_bounds__(Traits::kThreads, Traits::kBlocksPerSm)
    temporal_taps_fwd_kernel(const TemporalTapsForward params) {
  using scalar_t = typename Traits::scalar_t;
  using acc_t = typename Traits::acc_t;
  constexpr int kWidth = Traits::kWidth;
  constexpr int kFramesInFlight = Traits::kFramesInFlight;

  const unsigned frame_size = static_cast<unsigned>(params.pixels) * params.channels;
  const unsigned threads_per_clip = frame_size / kWidth;
  const unsigned index = blockIdx.x * Traits::kThreads + threadIdx.x;
  const unsigned n = index / threads_per_clip;
  if (n >= static_cast<unsigned>(params.batch)) return;
  const unsigned position = (index - n * threads_per_clip) * kWidth;  // p * C + c
  const unsigned c = position % params.channels;
  const int frames = params.frames;

  const int64_t clip = static_cast<int64_t>(n) * frames * frame_size;
  const auto* x = static_cast<const scalar_t*>(params.x) + clip + position;
  auto* y = static_cast<scalar_t*>(params.y) + clip + position;

  const int64_t w_row = static_cast<int64_t>(params.w_per_sample ? n : 0) * params.channels + c;
  acc_t w[3 * kWidth];
  load_array<3 * kWidth, (kWidth > 1)>(static_cast<const acc_t*>(params.w) + 3 * w_row, w);
  const int64_t a_row = static_cast<int64_t>(n) * frames * params.channels + c;
  const auto* a = params.a == nullptr ? nullptr : static_cast<const acc_t*>(params.a) + a_row;
  const auto* a_in = params.transposed ? nullptr : a;
  const auto* a_out = params.transposed ? a : nullptr;
  if (params.transposed) {
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      const acc_t first = w[3 * i];
      w[3 * i] = w[3 * i + 2];
      w[3 * i + 2] = first;
    }
  }

  // Frame s completes y[s-1]: two running sums replace a window of three frames.
  acc_t older[kWidth] = {};  // y[s-1] without its last tap
  acc_t newer[kWidth] = {};  // y[s] with its first tap only
  const auto store = [&](int t) {
    acc_t scale[kWidth];
    if (a_out != nullptr) {
      load_array<kWidth, (kWidth > 1)>(a_out + static_cast<int64_t>(t) * params.channels, scale);
    }
    Vector<scalar_t, kWidth> result;
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      result.value[i] = narrow<scalar_t>(a_out != nullptr ? scale[i] * older[i] : older[i]);
    }
    store_vector(y + t * static_cast<int64_t>(frame_size), result);
  };

  for (int begin = 0; begin < frames; begin += kFramesInFlight) {
    Vector<scalar_t, kWidth> loaded[kFramesInFlight];
#pragma unroll
    for (int j = 0; j < kFramesInFlight; ++j) {
      if (begin + j < frames) {
        loaded[j] = load_vector<kWidth>(x + (begin + j) * static_cast<int64_t>(frame_size));
      }
    }
#pragma unroll
    for (int j = 0; j < kFramesInFlight; ++j) {
      const int s = begin + j;
      if (s >= frames) break;
      acc_t scale[kWidth];
      if (a_in != nullptr) {
        load_array<kWidth, (kWidth > 1)>(a_in + static_cast<int64_t>(s) * params.channels, scale);
      }
      acc_t z[kWidth];
#pragma unroll
      for (int i = 0; i < kWidth; ++i) {
        const acc_t value = widen(loaded[j].value[i]);
        z[i] = a_in != nullptr ? scale[i] * value : value;
        older[i] += w[3 * i + 2] * z[i];
      }
      if (s > 0) store(s - 1);
#pragma unroll
      for (int i = 0; i < kWidth; ++i) {
        older[i] = newer[i] + w[3 * i + 1] * z[i];
        newer[i] = w[3 * i] * z[i];
      }
    }
  }
  store(frames - 1);
}

template <typename Traits>
void launch(const TemporalTapsForward& params, cudaStream_t stream) {
  const int64_t threads =
      static_cast<int64_t>(params.batch) * params.pixels * params.channels / Traits::kWidth;
  const auto blocks = static_cast<unsigned>(divide_up(threads, Traits::kThreads));
  ACCEL_LAUNCH(temporal_taps_fwd_kernel<Traits>, blocks, Traits::kThreads, stream, params);
}

}  // namespace
}  // namespace accel_kernels

extern "C" int accel_temporal_taps_fwd(const accel_kernels::TemporalTapsForward* params,
                                       cudaStream_t stream) {
  using namespace accel_kernels;
  return dispatch_dtype<__half, __nv_bfloat16>(params->dtype, [&](auto tag) -> int {
    using scalar_t = typename decltype(tag)::type;
    if constexpr (sizeof(scalar_t) < 8) {  // fp64 serves tests: the scalar kernel is enough
      constexpr int kWidth = 16 / sizeof(scalar_t);
      if (params->channels % kWidth == 0 && is_aligned(params->x, 16) &&
          is_aligned(params->y, 16) && is_aligned(params->w, 16) && is_aligned(params->a, 16)) {
        launch<ForwardTraits<scalar_t, kWidth>>(*params, stream);
        return static_cast<int>(cudaGetLastError());
      }
    }
    launch<ForwardTraits<scalar_t, 1>>(*params, stream);
    return static_cast<int>(cudaGetLastError());
  });
}
