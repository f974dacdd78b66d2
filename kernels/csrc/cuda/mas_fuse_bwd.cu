// mas_fuse, backward: all five gradients in one pass over grad and x.

#include "common/launch.cuh"
#include "common/math.cuh"
#include "common/reduce.cuh"
#include "common/vector.cuh"
#include "cuda/mas_fuse.cuh"
#include "cuda/mas_fuse.h"

namespace accel_kernels {
namespace {

template <typename scalar_, int kWidth_, int kRank_>
struct BackwardTraits {
  using scalar_t = scalar_;
  using acc_t = accumulate_t<scalar_t>;
  static constexpr int kWidth = kWidth_;  // channels of one lane: 2, or 1 for any C
  static constexpr int kRank = kRank_;    // columns of b whose gradients a block computes
  static constexpr int kWarps = 4;
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kBlocksPerSm = sizeof(acc_t) < 8 ? 3 : 2;  // allows 168, 255 registers
  static constexpr int kChannels = 32 * kWidth;                   // of one block
  static constexpr int kFrames = kRank > 4 ? 4 : 8;  // at a time: 32 sums for dm at most
  static constexpr int kSums = 3 + kRank;            // per channel: dw, then db
  static_assert(kWarps * kSums * kChannels * sizeof(acc_t) <= 48 * 1024,
                "the sums of all warps must fit in static shared memory");
};

// Sums each of kCount values over the 32 lanes of a warp with about kCount shuffles (not 5 kCount):
// in every step a lane gives away half of what it still has. Lane l ends with the sums of values
// l * kCount / 32 and following (at least one; with kCount < 32 several lanes have the same).
template <int kCount, int kStep, int kSize, typename acc_t>
__device__ __forceinline__ void sum_over_warp(acc_t (&values)[kSize], int lane) {
  if constexpr (kStep > 0) {
    if constexpr (kCount > 1) {
      constexpr int kHalf = kCount / 2;
      const bool upper = (lane & kStep) != 0;
#pragma unroll
      for (int i = 0; i < kHalf; ++i) {
        const acc_t kept = upper ? values[i + kHalf] : values[i];
        const acc_t given = upper ? values[i] : values[i + kHalf];
        values[i] = kept + __shfl_xor_sync(0xffffffffu, given, kStep);
      }
      sum_over_warp<kHalf, kStep / 2>(values, lane);
    } else {
      values[0] += __shfl_xor_sync(0xffffffffu, values[0], kStep);
      sum_over_warp<1, kStep / 2>(values, lane);
    }
  }
}

// One block computes, for kChannels channels and pixels_per_unit pixels of one clip: dx, dd, its
// channels' share of dm, and one row of partial sums of dw and db. A warp reads 32 lanes x 2
// channels of one pixel (128 bytes in fp16), frame after frame; the 4 warps take the pixels in
// turn. Bytes per element: reads x and grad once, writes dx once; d, dd, m and dm are small.
// blockIdx.z counts groups of kRank columns of b; the first group also does all that is not theirs.
template <typename Traits>
__global__ void __launch_bounds__(Traits::kThreads, Traits::kBlocksPerSm)
    mas_fuse_bwd_kernel(const MasFuseBackward params, int pixel_units) {
  using scalar_t = typename Traits::scalar_t;
  using acc_t = typename Traits::acc_t;
  using Loaded = Vector<scalar_t, Traits::kWidth>;
  constexpr int kWidth = Traits::kWidth;
  constexpr int kRank = Traits::kRank;
  constexpr int kFrames = Traits::kFrames;
  constexpr int kProducts = kFrames * kRank;

  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x / 32;
  const int pixel_unit = blockIdx.x % pixel_units;
  const int n = blockIdx.x / pixel_units;
  const int first_channel = blockIdx.y * Traits::kChannels;
  const int first_rank = blockIdx.z * kRank;
  const bool first_group = blockIdx.z == 0;
  const int c = first_channel + lane * kWidth;
  const int channels = params.channels;
  const int frames = params.frames;
  const bool active = c < channels;  // every lane takes part in the shuffles
  const int64_t frame_size = static_cast<int64_t>(params.pixels) * channels;

  acc_t dw[3][kWidth] = {};
  acc_t db[kWidth][kRank] = {};
  acc_t w[3 * kWidth] = {};
  acc_t b[kWidth][kRank] = {};
  if (active) {
    load_array<3 * kWidth, false>(static_cast<const acc_t*>(params.w) + 3 * c, w);
    load_columns<kWidth, kRank, acc_t>(params, c, first_rank, b);
  }

  const int begin = pixel_unit * params.pixels_per_unit;
  const int end = min(begin + params.pixels_per_unit, params.pixels);
  for (int p = begin + warp; p < end; p += Traits::kWarps) {
    const int64_t pixel = static_cast<int64_t>(n) * params.pixels + p;
    const int64_t offset = static_cast<int64_t>(n) * frames * frame_size +
                           static_cast<int64_t>(p) * channels + c;
    const auto* x = static_cast<const scalar_t*>(params.x) + offset;
    const auto* grad = static_cast<const scalar_t*>(params.grad) + offset;
    acc_t s0[kWidth] = {};
    acc_t s1[kWidth] = {};
    if (active) load_shares<kWidth, scalar_t>(params, pixel, c, s0, s1);
    acc_t ds[kWidth] = {};

    Loaded g_loaded[kFrames + 2] = {};  // one frame more on either side
    if (active) g_loaded[kFrames + 1] = load_vector<kWidth>(grad);
    for (int first = 0; first < frames; first += kFrames) {
      Loaded x_loaded[kFrames] = {};
      g_loaded[0] = g_loaded[kFrames];
      g_loaded[1] = g_loaded[kFrames + 1];
#pragma unroll
      for (int j = 0; j < kFrames; ++j) {
        g_loaded[j + 2] = Loaded{};
        if (active && first + j + 1 < frames) {
          g_loaded[j + 2] = load_vector<kWidth>(grad + (first + j + 1) * frame_size);
        }
        if (active && first + j < frames) {
          x_loaded[j] = load_vector<kWidth>(x + (first + j) * frame_size);
        }
      }
      acc_t dm[kProducts] = {};
#pragma unroll
      for (int j = 0; j < kFrames; ++j) {
        const int t = first + j;
        if (t >= frames || !active) continue;
        const int64_t row = (static_cast<int64_t>(n) * frames + t) * params.pixels + p;
        acc_t y[kWidth];
        motion<kWidth, kRank, scalar_t>(params, row, c, first_rank, b, y);
        const auto* m = static_cast<const scalar_t*>(params.m) + row * params.rank + first_rank;
        Loaded result;
#pragma unroll
        for (int i = 0; i < kWidth; ++i) {
          const acc_t before = widen(g_loaded[j].value[i]);
          const acc_t here = widen(g_loaded[j + 1].value[i]);
          const acc_t after = widen(g_loaded[j + 2].value[i]);
          const acc_t value = widen(x_loaded[j].value[i]);
          const acc_t h = w[3 * i] * after + w[3 * i + 1] * here + w[3 * i + 2] * before;
          const acc_t q = s0[i] * y[i] + s1[i] * value;
          dw[0][i] += q * after;
          dw[1][i] += q * here;
          dw[2][i] += q * before;
          ds[i] += h * (y[i] - value);
          const acc_t dy = s0[i] * h;
#pragma unroll
          for (int r = 0; r < kRank; ++r) {
            if (first_rank + r < params.rank) db[i][r] += widen(m[r]) * dy;
            dm[j * kRank + r] += b[i][r] * dy;
          }
          result.value[i] = narrow<scalar_t>(s1[i] * h);
        }
        if (params.dx != nullptr && first_group) {
          store_vector(static_cast<scalar_t*>(params.dx) + offset + t * frame_size, result);
        }
      }
      if (params.dm == nullptr) continue;
      sum_over_warp<kProducts, 16>(dm, lane);
      constexpr int kLanesPerSum = kProducts < 32 ? 32 / kProducts : 1;
      const int t = first + lane / kLanesPerSum / kRank;
      const int r = first_rank + lane / kLanesPerSum % kRank;
      if (lane % kLanesPerSum == 0 && t < frames && r < params.rank) {
        const int64_t row = (static_cast<int64_t>(n) * frames + t) * params.pixels + p;
        if (params.dm_partial == nullptr) {
          static_cast<scalar_t*>(params.dm)[row * params.rank + r] = narrow<scalar_t>(dm[0]);
        } else {
          const int64_t rows = static_cast<int64_t>(params.batch) * frames * params.pixels;
          static_cast<acc_t*>(params.dm_partial)[(blockIdx.y * rows + row) * params.rank + r] =
              dm[0];
        }
      }
    }

    if (params.dd != nullptr && active && first_group) {
      Loaded positive, negative;
#pragma unroll
      for (int i = 0; i < kWidth; ++i) {
        const acc_t dd = s0[i] * s1[i] * ds[i];
        positive.value[i] = narrow<scalar_t>(dd);
        negative.value[i] = narrow<scalar_t>(-dd);
      }
      auto* target = static_cast<scalar_t*>(params.dd) + pixel * 2 * channels + c;
      store_vector(target, positive);
      store_vector(target + channels, negative);
    }
  }

  __shared__ acc_t sums[Traits::kWarps][Traits::kSums][Traits::kChannels];
#pragma unroll
  for (int i = 0; i < kWidth; ++i) {
#pragma unroll
    for (int k = 0; k < 3; ++k) sums[warp][k][lane * kWidth + i] = dw[k][i];
#pragma unroll
    for (int r = 0; r < kRank; ++r) sums[warp][3 + r][lane * kWidth + i] = db[i][r];
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
    const int64_t target = static_cast<int64_t>(blockIdx.x) * channels + channel;
    if (row >= 3) {
      const int r = first_rank + row - 3;
      if (r < params.rank) static_cast<acc_t*>(params.db_partial)[target * params.rank + r] = sum;
    } else if (first_group) {
      static_cast<acc_t*>(params.dw_partial)[target * 3 + row] = sum;
    }
  }
}

// dm = sum over channel blocks of their shares, rounded once. Bytes: 4 per partial element.
template <typename scalar_t>
__global__ void __launch_bounds__(256)
    mas_fuse_dm_kernel(const accumulate_t<scalar_t>* __restrict__ partial,
                       scalar_t* __restrict__ dm, int blocks, int64_t elements) {
  const int64_t index = static_cast<int64_t>(blockIdx.x) * 256 + threadIdx.x;
  if (index >= elements) return;
  accumulate_t<scalar_t> sum = partial[index];
  for (int block = 1; block < blocks; ++block) sum += partial[block * elements + index];
  dm[index] = narrow<scalar_t>(sum);
}

template <typename Traits>
int launch(const MasFuseBackward& params, cudaStream_t stream) {
  using scalar_t = typename Traits::scalar_t;
  using acc_t = typename Traits::acc_t;
  const int pixel_units = divide_up(params.pixels, params.pixels_per_unit);
  const int units = static_cast<int>(mas_fuse_bwd_units(params));
  const int blocks = divide_up(params.channels, Traits::kChannels);
  const dim3 grid(static_cast<unsigned>(units), static_cast<unsigned>(blocks),
                  static_cast<unsigned>(divide_up(params.rank, Traits::kRank)));
  ACCEL_LAUNCH(mas_fuse_bwd_kernel<Traits>, grid, Traits::kThreads, stream, params, pixel_units);
  if (units > 1) {
    const int64_t channels = params.channels;
    launch_column_sum<acc_t>(params.dw_partial, params.dw, units, 3 * channels, stream);
    launch_column_sum<acc_t>(params.db_partial, params.db, units, params.rank * channels, stream);
  }
  if (params.dm_partial != nullptr) {
    const int64_t elements =
        static_cast<int64_t>(params.batch) * params.frames * params.pixels * params.rank;
    ACCEL_LAUNCH(mas_fuse_dm_kernel<scalar_t>, static_cast<unsigned>(divide_up(elements, 256)), 256,
                 stream, static_cast<const acc_t*>(params.dm_partial),
                 static_cast<scalar_t*>(params.dm), blocks, elements);
  }
  return static_cast<int>(cudaGetLastError());
}

// Calls function with the traits that fit the tensors.
template <typename Function>
int dispatch(const MasFuseBackward& params, const Function& function) {
  return dispatch_dtype<__half, __nv_bfloat16>(params.dtype, [&](auto tag) -> int {
    using scalar_t = typename decltype(tag)::type;
    if constexpr (sizeof(scalar_t) < 8) {  // fp64 serves tests: the scalar kernel is enough
      constexpr int kBytes = 2 * sizeof(scalar_t);
      if (params.channels % 2 == 0 && is_aligned(params.x, kBytes) &&
          is_aligned(params.grad, kBytes) && is_aligned(params.dx, kBytes) &&
          is_aligned(params.d, kBytes) && is_aligned(params.dd, kBytes)) {
        return dispatch_register_rank(params.rank, [&](auto rank) {
          return function(Tag<BackwardTraits<scalar_t, 2, decltype(rank)::value>>{});
        });
      }
    }
    return function(Tag<BackwardTraits<scalar_t, 1, kMasFuseRegisterRank>>{});
  });
}

}  // namespace
}  // namespace accel_kernels

extern "C" int accel_mas_fuse_bwd_channel_blocks(const accel_kernels::MasFuseBackward* params) {
  using namespace accel_kernels;
  return dispatch(*params, [&](auto tag) {
    return divide_up(params->channels, decltype(tag)::type::kChannels);
  });
}

extern "C" int accel_mas_fuse_bwd(const accel_kernels::MasFuseBackward* params,
                                  cudaStream_t stream) {
  using namespace accel_kernels;
  return dispatch(*params, [&](auto tag) {
    return launch<typename decltype(tag)::type>(*params, stream);
  });
}
