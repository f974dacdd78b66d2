// mas_fuse, forward.

#include "common/launch.cuh"
#include "common/math.cuh"
#include "common/vector.cuh"
#include "cuda/mas_fuse.cuh"
#include "cuda/mas_fuse.h"

namespace accel_kernels {
namespace {

template <typename scalar_, int kWidth_, int kRank_>
struct ForwardTraits {
  using scalar_t = scalar_;
  using acc_t = accumulate_t<scalar_t>;
  static constexpr int kWidth = kWidth_;  // channels of one thread: 16 or 8 bytes, or 1 for any C
  static constexpr int kRank = kRank_;    // columns of b in registers
  static constexpr int kFramesInFlight = 4;
  static constexpr int kThreads = 128;
  static constexpr int kBlocksPerSm = 3;  // allows 168 registers: b alone takes up to 32
};

// One thread computes kWidth channels of one pixel of one clip, for all frames; warps run along c,
// then p. Bytes per element: reads x and writes out once, and d once per clip (2/T); the r values of
// m are the same for all threads of a pixel, b and w stay in L1/L2.
template <typename Traits>
__global__ void __launch_bounds__(Traits::kThreads, Traits::kBlocksPerSm)
    mas_fuse_fwd_kernel(const MasFuseForward params) {
  using scalar_t = typename Traits::scalar_t;
  using acc_t = typename Traits::acc_t;
  constexpr int kWidth = Traits::kWidth;
  constexpr int kRank = Traits::kRank;
  constexpr int kFramesInFlight = Traits::kFramesInFlight;

  const int channels = params.channels;
  const int frames = params.frames;
  const unsigned frame_size = static_cast<unsigned>(params.pixels) * channels;
  const unsigned threads_per_clip = frame_size / kWidth;
  const unsigned index = blockIdx.x * Traits::kThreads + threadIdx.x;
  const unsigned n = index / threads_per_clip;
  if (n >= static_cast<unsigned>(params.batch)) return;
  const unsigned position = (index - n * threads_per_clip) * kWidth;  // p * C + c
  const int p = static_cast<int>(position / channels);
  const int c = static_cast<int>(position % channels);

  acc_t s0[kWidth], s1[kWidth];
  load_shares<kWidth, scalar_t>(params, static_cast<int64_t>(n) * params.pixels + p, c, s0, s1);
  acc_t w[3 * kWidth];
  load_array<3 * kWidth, false>(static_cast<const acc_t*>(params.w) + 3 * c, w);
  acc_t b[kWidth][kRank];
  load_columns<kWidth, kRank, acc_t>(params, c, 0, b);

  const int64_t clip = static_cast<int64_t>(n) * frames * frame_size;
  const auto* x = static_cast<const scalar_t*>(params.x) + clip + position;
  auto* out = static_cast<scalar_t*>(params.out) + clip + position;

  // Frame s completes out[s-1]: two running sums replace a window of three frames.
  acc_t older[kWidth] = {};  // out[s-1] without its last tap
  acc_t newer[kWidth] = {};  // out[s] with its first tap only
  const auto store = [&](int t) {
    Vector<scalar_t, kWidth> result;
#pragma unroll
    for (int i = 0; i < kWidth; ++i) result.value[i] = narrow<scalar_t>(older[i]);
    store_vector(out + t * static_cast<int64_t>(frame_size), result);
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
      acc_t y[kWidth];
      motion<kWidth, kRank, scalar_t>(
          params, (static_cast<int64_t>(n) * frames + s) * params.pixels + p, c, 0, b, y);
      acc_t q[kWidth];
#pragma unroll
      for (int i = 0; i < kWidth; ++i) {
        q[i] = s0[i] * y[i] + s1[i] * widen(loaded[j].value[i]);
        older[i] += w[3 * i + 2] * q[i];
      }
      if (s > 0) store(s - 1);
#pragma unroll
      for (int i = 0; i < kWidth; ++i) {
        older[i] = newer[i] + w[3 * i + 1] * q[i];
        newer[i] = w[3 * i] * q[i];
      }
    }
  }
  store(frames - 1);
}

template <typename Traits>
int launch(const MasFuseForward& params, cudaStream_t stream) {
  const int64_t threads =
      static_cast<int64_t>(params.batch) * params.pixels * params.channels / Traits::kWidth;
  const auto blocks = static_cast<unsigned>(divide_up(threads, Traits::kThreads));
  ACCEL_LAUNCH(mas_fuse_fwd_kernel<Traits>, blocks, Traits::kThreads, stream, params);
  return static_cast<int>(cudaGetLastError());
}

}  // namespace
}  // namespace accel_kernels

extern "C" int accel_mas_fuse_fwd(const accel_kernels::MasFuseForward* params,
                                  cudaStream_t stream) {
  using namespace accel_kernels;
  return dispatch_dtype<__half, __nv_bfloat16>(params->dtype, [&](auto tag) -> int {
    using scalar_t = typename decltype(tag)::type;
    if constexpr (sizeof(scalar_t) < 8) {  // fp64 serves tests: the scalar kernel is enough
      constexpr int kWidth = 16 / sizeof(scalar_t);
      if (params->channels % kWidth == 0 && is_aligned(params->x, 16) &&
          is_aligned(params->out, 16) && is_aligned(params->d, 16)) {
        return dispatch_register_rank(params->rank, [&](auto rank) {
          constexpr int kRank = decltype(rank)::value;
          constexpr int kBytes = kRank > 4 ? 8 : 16;
          return launch<ForwardTraits<scalar_t, kBytes / sizeof(scalar_t), kRank>>(*params, stream);
        });
      }
    }
    return launch<ForwardTraits<scalar_t, 1, kMasFuseRegisterRank>>(*params, stream);
  });
}
