// diff_gate_shift, forward.

#include "common/launch.cuh"
#include "common/math.cuh"
#include "common/vector.cuh"
#include "cuda/diff_gate_shift.h"

namespace accel_kernels {
namespace {

template <typename scalar_, int kWidth_>
struct ForwardTraits {
  using scalar_t = scalar_;
  using acc_t = accumulate_t<scalar_t>;
  static constexpr int kWidth = kWidth_;  // channels of one thread: 4, or 1 for any C
  static constexpr int kLanes = 16;       // threads along the channels
  static constexpr int kPixels = 8;       // of one block
  static constexpr int kThreads = kLanes * kPixels;
  static constexpr int kChannels = kLanes * kWidth;  // of one block
  static constexpr int kFrames = 8;                  // at once
  static constexpr int kRanks = 8;                   // at once
  static constexpr int kPad = 4;  // of rows in shared memory: few bank conflicts, whole 16 bytes
};

// One block computes, for one clip, kChannels channels of kPixels pixels, 8 frames at a time. One
// thread holds kWidth channels of one pixel of the 8 frames; for each rank it reads kWidth values
// of m and 8 of z from shared memory (three 16-byte reads) and does 32 multiply-adds in fp32.
// Bytes per element: reads x once, writes y once, reads z and v (2 r / C) once for every kChannels
// channels, mostly from L2. Arithmetic: 2 r multiply-adds and two sigmoids an element. In fp16 that
// is 40 operations a byte at r = 32, where an H200 balances at 14 and an RTX 2080 Ti at 22, but 15
// at r = 8, which half of TDN's elements have: not worth tensor cores and m rounded to 16 bits.
template <typename Traits>
__global__ void __launch_bounds__(Traits::kThreads, 3)
    diff_gate_shift_fwd_kernel(const DiffGateShiftForward params, int pixel_tiles) {
  using scalar_t = typename Traits::scalar_t;
  using acc_t = typename Traits::acc_t;
  constexpr int kWidth = Traits::kWidth;
  constexpr int kFrames = Traits::kFrames;
  constexpr int kRanks = Traits::kRanks;
  constexpr int kPixels = Traits::kPixels;
  constexpr int kChannels = Traits::kChannels;

  alignas(16) __shared__ acc_t m_tile[kRanks][kChannels + Traits::kPad];
  alignas(16) __shared__ acc_t z_tile[kRanks][kPixels * kFrames + Traits::kPad];

  const int lane = threadIdx.x % Traits::kLanes;
  const int pixel = threadIdx.x / Traits::kLanes;
  const int n = blockIdx.x / pixel_tiles;
  const int first_pixel = (blockIdx.x % pixel_tiles) * kPixels;
  const int first_channel = blockIdx.y * kChannels;
  const int c = first_channel + lane * kWidth;
  const int p = first_pixel + pixel;
  const int channels = params.channels;
  const int pixels = params.pixels;
  const int frames = params.frames;
  const int rank = params.rank;
  const bool active = c < channels && p < pixels;
  const int64_t frame_size = static_cast<int64_t>(pixels) * channels;
  const int64_t clip = static_cast<int64_t>(n) * frames;
  const int64_t start = clip * frame_size + static_cast<int64_t>(p) * channels + c;
  const auto* x = static_cast<const scalar_t*>(params.x) + start;
  auto* y = static_cast<scalar_t*>(params.y) + start;

  // Frame s completes y[s-1]: two running sums replace a window of three frames.
  acc_t older[kWidth] = {};  // y[s-1] without its last tap
  acc_t newer[kWidth] = {};  // y[s] with its first tap only
  const auto store = [&](int t) {
    if (!active) return;
    Vector<scalar_t, kWidth> result;
#pragma unroll
    for (int i = 0; i < kWidth; ++i) result.value[i] = narrow<scalar_t>(older[i]);
    store_vector(y + t * frame_size, result);
  };

  for (int begin = 0; begin < frames; begin += kFrames) {
    Vector<scalar_t, kWidth> loaded[kFrames];
#pragma unroll
    for (int j = 0; j < kFrames; ++j) {
      if (active && begin + j < frames) {
        loaded[j] = load_vector<kWidth>(x + (begin + j) * frame_size);
      }
    }

    acc_t gates[kFrames][kWidth];
#pragma unroll
    for (int j = 0; j < kFrames; ++j) {
#pragma unroll
      for (int i = 0; i < kWidth; ++i) gates[j][i] = static_cast<acc_t>(0.5);
    }
    for (int side = 0; side < 2; ++side) {
      const auto* m = static_cast<const acc_t*>(params.m) +
                      static_cast<int64_t>(side) * channels * rank;
      const auto* offsets = static_cast<const acc_t*>(params.c) + int64_t{side} * channels;
      const auto* z = static_cast<const scalar_t*>(side == 0 ? params.z : params.v);
      acc_t f[kFrames][kWidth];
#pragma unroll
      for (int i = 0; i < kWidth; ++i) {
        const acc_t offset = active ? offsets[c + i] : acc_t{0};
#pragma unroll
        for (int j = 0; j < kFrames; ++j) f[j][i] = offset;
      }
      for (int first = 0; first < rank; first += kRanks) {
        __syncthreads();  // the tiles have been read
        for (int item = threadIdx.x; item < kRanks * kChannels; item += Traits::kThreads) {
          const int r = first + item % kRanks;
          const int channel = first_channel + item / kRanks;
          const bool exists = r < rank && channel < channels;
          m_tile[item % kRanks][item / kRanks] =
              exists ? m[static_cast<int64_t>(channel) * rank + r] : acc_t{0};
        }
        for (int item = threadIdx.x; item < kRanks * kPixels * kFrames; item += Traits::kThreads) {
          const int r = first + item % kRanks;
          const int q = item / kRanks % kPixels;
          const int t = begin + item / kRanks / kPixels;
          const bool exists = r < rank && first_pixel + q < pixels && t < frames;
          z_tile[item % kRanks][q * kFrames + t - begin] =
              exists ? widen(z[((clip + t) * pixels + first_pixel + q) * rank + r]) : acc_t{0};
        }
        __syncthreads();
#pragma unroll
        for (int r = 0; r < kRanks; ++r) {
          acc_t left[kWidth];
          acc_t right[kFrames];
          load_array<kWidth, true>(&m_tile[r][lane * kWidth], left);
          load_array<kFrames, true>(&z_tile[r][pixel * kFrames], right);
#pragma unroll
          for (int j = 0; j < kFrames; ++j) {
#pragma unroll
            for (int i = 0; i < kWidth; ++i) f[j][i] += left[i] * right[j];
          }
        }
      }
#pragma unroll
      for (int j = 0; j < kFrames; ++j) {
#pragma unroll
        for (int i = 0; i < kWidth; ++i) gates[j][i] += acc_t(0.5) * sigmoid(f[j][i]).value;
      }
    }

    acc_t w[3 * kWidth] = {};  // read here: the products above need the registers
    if (active) {
      load_array<3 * kWidth, false>(static_cast<const acc_t*>(params.w) + int64_t{3} * c, w);
    }
#pragma unroll
    for (int j = 0; j < kFrames; ++j) {
      const int s = begin + j;
      if (s >= frames) break;
      acc_t gated[kWidth];
#pragma unroll
      for (int i = 0; i < kWidth; ++i) {
        gated[i] = active ? widen(loaded[j].value[i]) * gates[j][i] : acc_t{0};
        older[i] += w[3 * i + 2] * gated[i];
      }
      if (s > 0) store(s - 1);
#pragma unroll
      for (int i = 0; i < kWidth; ++i) {
        older[i] = newer[i] + w[3 * i + 1] * gated[i];
        newer[i] = w[3 * i] * gated[i];
      }
    }
  }
  store(frames - 1);
}

template <typename Traits>
int launch(const DiffGateShiftForward& params, cudaStream_t stream) {
  const int pixel_tiles = divide_up(params.pixels, Traits::kPixels);
  const dim3 grid(static_cast<unsigned>(params.batch) * static_cast<unsigned>(pixel_tiles),
                  static_cast<unsigned>(divide_up(params.channels, Traits::kChannels)));
  ACCEL_LAUNCH(diff_gate_shift_fwd_kernel<Traits>, grid, Traits::kThreads, stream, params,
               pixel_tiles);
  return static_cast<int>(cudaGetLastError());
}

}  // namespace
}  // namespace accel_kernels

extern "C" int accel_diff_gate_shift_fwd(const accel_kernels::DiffGateShiftForward* params,
                                         cudaStream_t stream) {
  using namespace accel_kernels;
  return dispatch_dtype<__half, __nv_bfloat16>(params->dtype, [&](auto tag) -> int {
    using scalar_t = typename decltype(tag)::type;
    if constexpr (sizeof(scalar_t) < 8) {  // fp64 serves tests: the scalar kernel is enough
      constexpr int kBytes = 4 * sizeof(scalar_t);
      if (params->channels % 4 == 0 && is_aligned(params->x, kBytes) &&
          is_aligned(params->y, kBytes)) {
        return launch<ForwardTraits<scalar_t, 4>>(*params, stream);
      }
    }
    return launch<ForwardTraits<scalar_t, 1>>(*params, stream);
  });
}
