// diff_gate_shift, backward: all six gradients in one pass over grad and x.

#include "common/launch.cuh"
#include "common/math.cuh"
#include "common/reduce.cuh"
#include "common/vector.cuh"
#include "cuda/diff_gate_shift.h"

namespace accel_kernels {
namespace {

template <typename scalar_, int kWidth_, int kRanks_>
struct BackwardTraits {
  using scalar_t = scalar_;
  using acc_t = accumulate_t<scalar_t>;
  static constexpr int kWidth = kWidth_;  // channels of one lane: 4, 2, or 1 for any C
  static constexpr int kRanks = kRanks_;  // of the tiles: 8, 16 or 32
  static constexpr int kWarps = 4;
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kBlocksPerSm = 2;  // allows 255 registers
  static constexpr int kChannels = 32 * kWidth;  // of one block
  static constexpr int kFrames = DiffGateShiftUnits::kFramesPerUnit;
  static constexpr int kHalf = kFrames / 2;
  static constexpr int kRanksOfWarp = kRanks / kWarps;  // whose dm a warp adds up
  // Whether the tiles of all ranks of z and of v are in shared memory together.
  static constexpr bool kBothSides = kRanks <= 16;
  static constexpr int kSides = kBothSides ? 2 : 1;
  static constexpr int kPad = 4;  // of rows in shared memory: few bank conflicts, whole 16 bytes
  static_assert(kHalf * 8 == 32, "a warp's lanes hold dz of 4 frames and 8 ranks");
  static_assert((kSides * kRanks * (kChannels + kPad) +
                 kSides * kWarps * kFrames * (kRanks + kPad) +
                 kWarps * kHalf * (kChannels + kPad) + 3 * kChannels) * sizeof(acc_t) <= 48 * 1024,
                "the tiles must fit in static shared memory");
};

// Lane l returns the sum over all lanes of values[l]. Each step sends half of what is left to the
// lane that keeps it: 31 shuffles for 32 sums. (Recursive: every index is then a constant.)
template <int kStep = 16, typename acc_t>
__device__ __forceinline__ acc_t sum_over_lanes(acc_t (&values)[32], int lane) {
  const bool upper = (lane & kStep) != 0;
#pragma unroll
  for (int i = 0; i < kStep; ++i) {
    const acc_t mine = upper ? values[i + kStep] : values[i];
    const acc_t theirs = upper ? values[i] : values[i + kStep];
    values[i] = mine + __shfl_xor_sync(0xffffffffu, theirs, kStep);
  }
  if constexpr (kStep > 1) {
    return sum_over_lanes<kStep / 2>(values, lane);
  } else {
    return values[0];
  }
}

// One block computes dx, and one row of partial sums of dm, dc and dw, for the items of one unit
// and kChannels channels; a warp takes one item (a pixel of 8 frames), a lane kWidth channels.
// f and b of all 8 frames come first, as in the forward pass; then dx and the gradients df and db,
// which replace them in registers. df goes to shared memory, 4 frames at a time, where each warp
// adds up dm for its share of the ranks over the items of all warps; dz is a sum over channels,
// that is over the lanes. With several blocks along the channels, dz is summed once more.
// Bytes per element: reads x and grad once, writes dx once; z, v, dz and dv 4 r / C, with sums over
// kChannels channels each (fp32). Arithmetic: 6 r multiply-adds and two sigmoids an element, which
// take longer than the bytes on every GPU, but a few hundredths of a training step; tensor cores
// would round df to 16 bits. More ranks than kRanks: a pass for each kRanks of them.
template <typename Traits>
__global__ void __launch_bounds__(Traits::kThreads, Traits::kBlocksPerSm)
    diff_gate_shift_bwd_kernel(const DiffGateShiftBackward params, int frame_units, int64_t items,
                               int first_rank) {
  using scalar_t = typename Traits::scalar_t;
  using acc_t = typename Traits::acc_t;
  constexpr int kWidth = Traits::kWidth;
  constexpr int kFrames = Traits::kFrames;
  constexpr int kHalf = Traits::kHalf;
  constexpr int kRanks = Traits::kRanks;
  constexpr int kRanksOfWarp = Traits::kRanksOfWarp;
  constexpr int kChannels = Traits::kChannels;
  constexpr int kPad = Traits::kPad;
  using Values = Vector<scalar_t, kWidth>;

  alignas(16) __shared__ acc_t m_tile[Traits::kSides][kRanks][kChannels + kPad];
  alignas(16) __shared__ acc_t z_tile[Traits::kSides][Traits::kWarps * kFrames][kRanks + kPad];
  alignas(16) __shared__ acc_t w_tile[3][kChannels];  // registers are scarce
  alignas(16) __shared__ acc_t d_tile[Traits::kWarps * kHalf][kChannels + kPad];

  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x / 32;
  const int channels = params.channels;
  const int pixels = params.pixels;
  const int frames = params.frames;
  const int rank = params.rank;
  const int first_channel = blockIdx.y * kChannels;
  const int c = first_channel + lane * kWidth;
  const int64_t frame_size = static_cast<int64_t>(pixels) * channels;
  const int64_t begin = static_cast<int64_t>(blockIdx.x) * params.items_per_unit;
  const int64_t end = min(begin + params.items_per_unit, items);
  const bool first_pass = first_rank == 0;  // of several if r > kRanks

  const auto load_m = [&](int side, int slot, int first) {
    const auto* m = static_cast<const acc_t*>(params.m) +
                    static_cast<int64_t>(side) * channels * rank;
    for (int item = threadIdx.x; item < kRanks * kChannels; item += Traits::kThreads) {
      const int r = first + item % kRanks;
      const int channel = first_channel + item / kRanks;
      m_tile[slot][item % kRanks][item / kRanks] =
          r < rank && channel < channels ? m[static_cast<int64_t>(channel) * rank + r] : acc_t{0};
    }
  };

  acc_t dw[3][kWidth] = {};
  acc_t dc[2][kWidth] = {};
  acc_t dm[2][kRanksOfWarp][kWidth] = {};
  for (int i = threadIdx.x; i < 3 * kChannels; i += Traits::kThreads) {
    const int channel = first_channel + i / 3;
    w_tile[i % 3][i / 3] =
        channel < channels ? static_cast<const acc_t*>(params.w)[3 * channel + i % 3] : acc_t{0};
  }
  if constexpr (Traits::kBothSides) {
    load_m(0, 0, 0);
    load_m(1, 1, 0);
  }

  for (int64_t first_item = begin; first_item < end; first_item += Traits::kWarps) {
    const int64_t item = first_item + warp;
    const bool exists = item < end;
    const int p = static_cast<int>(item % pixels);
    const int first_frame = static_cast<int>(item / pixels % frame_units) * kFrames;
    const int64_t n = item / pixels / frame_units;
    const int count = exists ? min(kFrames, frames - first_frame) : 0;
    const bool active = exists && c < channels;
    const int64_t position = (n * frames + first_frame) * pixels + p;

    const int64_t start = position * channels + c;
    const auto load = [&](const void* source, int t) {  // of frame first_frame + t
      return load_vector<kWidth>(static_cast<const scalar_t*>(source) + start + t * frame_size);
    };
    const auto load_z = [&](int side, int slot, int first) {  // of the warp's item
      const auto* z = static_cast<const scalar_t*>(side == 0 ? params.z : params.v);
      for (int i = lane; i < kFrames * kRanks; i += 32) {
        const int r = first + i % kRanks;
        const int t = i / kRanks;
        const int64_t row = position + static_cast<int64_t>(t) * pixels;
        z_tile[slot][warp * kFrames + t][i % kRanks] =
            t < count && r < rank ? widen(z[row * rank + r]) : acc_t{0};
      }
    };
    // The tiles of a side for ranks from `first`; the one in shared memory if both sides fit.
    const auto slot_with = [&](int side, int first) {
      if constexpr (Traits::kBothSides) {
        return side;
      } else {
        __syncthreads();  // the tiles have been read
        load_m(side, 0, first);
        load_z(side, 0, first);
        __syncthreads();
        return 0;
      }
    };

    if constexpr (Traits::kBothSides) {
      __syncthreads();
      load_z(0, 0, 0);
      load_z(1, 1, 0);
      __syncthreads();
    }

    acc_t d[2][kFrames][kWidth];  // f and b, then their sigmoids, then df and db
#pragma unroll
    for (int side = 0; side < 2; ++side) {
      const auto* offsets = static_cast<const acc_t*>(params.c) + int64_t{side} * channels;
#pragma unroll
      for (int i = 0; i < kWidth; ++i) {
        const acc_t offset = c < channels ? offsets[c + i] : acc_t{0};
#pragma unroll
        for (int t = 0; t < kFrames; ++t) d[side][t][i] = offset;
      }
      for (int first = 0; first < rank; first += kRanks) {
        const int slot = slot_with(side, first);
#pragma unroll 1
        for (int r = 0; r < min(kRanks, rank - first); r += 4) {  // zeros beyond rank
          acc_t left[4][kWidth];
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            load_array<kWidth, true>(&m_tile[slot][r + j][lane * kWidth], left[j]);
          }
#pragma unroll
          for (int t = 0; t < kFrames; ++t) {
            acc_t right[4];
            load_array<4, true>(&z_tile[slot][warp * kFrames + t][r], right);
#pragma unroll
            for (int j = 0; j < 4; ++j) {
#pragma unroll
              for (int i = 0; i < kWidth; ++i) d[side][t][i] += left[j][i] * right[j];
            }
          }
        }
      }
#pragma unroll
      for (int t = 0; t < kFrames; ++t) {
#pragma unroll
        for (int i = 0; i < kWidth; ++i) {
          d[side][t][i] = sigmoid(d[side][t][i]).value;
        }
      }
    }

    // dx, the sums dw and dc, df and db.
    Values zeros;
#pragma unroll
    for (int i = 0; i < kWidth; ++i) zeros.value[i] = narrow<scalar_t>(acc_t{0});
    Values before = active && first_frame > 0 ? load(params.grad, -1) : zeros;
    Values here = active ? load(params.grad, 0) : zeros;
    const auto finish_frame = [&](int t) {
      const bool frame_exists = active && t < count;
      const bool next_exists = frame_exists && first_frame + t + 1 < frames;
      const Values after = next_exists ? load(params.grad, t + 1) : zeros;
      const Values x = frame_exists ? load(params.x, t) : zeros;
      acc_t w[3][kWidth];
#pragma unroll
      for (int k = 0; k < 3; ++k) load_array<kWidth, true>(&w_tile[k][lane * kWidth], w[k]);
      Values result;
#pragma unroll
      for (int i = 0; i < kWidth; ++i) {
        const acc_t g0 = widen(before.value[i]);
        const acc_t g1 = widen(here.value[i]);
        const acc_t g2 = widen(after.value[i]);
        const acc_t value = widen(x.value[i]);
        const acc_t h = w[0][i] * g2 + w[1][i] * g1 + w[2][i] * g0;
        const acc_t gate = acc_t(0.5) + acc_t(0.5) * (d[0][t][i] + d[1][t][i]);
        const acc_t gated = value * gate;
        dw[0][i] += gated * g2;
        dw[1][i] += gated * g1;
        dw[2][i] += gated * g0;
        result.value[i] = narrow<scalar_t>(h * gate);
#pragma unroll
        for (int side = 0; side < 2; ++side) {
          const acc_t s = d[side][t][i];
          d[side][t][i] = acc_t(0.5) * h * value * (s * (acc_t{1} - s));
          dc[side][i] += d[side][t][i];
        }
      }
      if (first_pass && frame_exists) {
        store_vector(static_cast<scalar_t*>(params.dx) + start + t * frame_size, result);
      }
      before = here;
      here = after;
    };
    // In halves: the branch keeps the compiler from filling the registers with all loads at once.
#pragma unroll
    for (int t = 0; t < kHalf; ++t) finish_frame(t);
    if (count > kHalf) {
#pragma unroll
      for (int t = kHalf; t < kFrames; ++t) finish_frame(t);
    } else {
#pragma unroll
      for (int t = kHalf; t < kFrames; ++t) {
#pragma unroll
        for (int i = 0; i < kWidth; ++i) d[0][t][i] = d[1][t][i] = 0;
      }
    }

    // dm and dz. The side whose tiles were loaded last comes first.
#pragma unroll
    for (int side = 1; side >= 0; --side) {
      const bool loaded = side == 1 && rank <= kRanks;
      const int slot = loaded ? Traits::kSides - 1 : slot_with(side, first_rank);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        __syncthreads();  // d_tile has been read
#pragma unroll
        for (int t = 0; t < kHalf; ++t) {
#pragma unroll
          for (int i = 0; i < kWidth; ++i) {
            d_tile[warp * kHalf + t][lane * kWidth + i] = d[side][half * kHalf + t][i];
          }
        }
        __syncthreads();
#pragma unroll 2
        for (int row = 0; row < Traits::kWarps * kHalf; ++row) {
          acc_t left[kWidth];
          acc_t right[kRanksOfWarp];
          load_array<kWidth, true>(&d_tile[row][lane * kWidth], left);
          const int source = row / kHalf * kFrames + half * kHalf + row % kHalf;
          load_array<kRanksOfWarp, true>(&z_tile[slot][source][warp * kRanksOfWarp], right);
#pragma unroll
          for (int j = 0; j < kRanksOfWarp; ++j) {
#pragma unroll
            for (int i = 0; i < kWidth; ++i) dm[side][j][i] += left[i] * right[j];
          }
        }
#pragma unroll 1
        for (int r = 0; r < min(kRanks, rank - first_rank); r += 8) {
          acc_t sums[32];  // [kHalf, 8]
#pragma unroll
          for (int j = 0; j < 8; ++j) {
            acc_t right[kWidth];
            load_array<kWidth, true>(&m_tile[slot][r + j][lane * kWidth], right);
#pragma unroll
            for (int t = 0; t < kHalf; ++t) {
              acc_t sum = 0;
#pragma unroll
              for (int i = 0; i < kWidth; ++i) sum += d[side][half * kHalf + t][i] * right[i];
              sums[t * 8 + j] = sum;
            }
          }
          const acc_t sum = sum_over_lanes(sums, lane);
          const int t = half * kHalf + lane / 8;
          const int j = first_rank + r + lane % 8;
          if (t < count && j < rank) {
            const int64_t target = (position + static_cast<int64_t>(t) * pixels) * rank + j;
            if (params.dz_partial == nullptr) {
              static_cast<scalar_t*>(side == 0 ? params.dz : params.dv)[target] =
                  narrow<scalar_t>(sum);
            } else {
              const int64_t rows = static_cast<int64_t>(params.batch) * frames * pixels;
              const int64_t tile = static_cast<int64_t>(side) * gridDim.y + blockIdx.y;
              static_cast<acc_t*>(params.dz_partial)[tile * rows * rank + target] = sum;
            }
          }
        }
      }
    }
  }

  const int64_t unit = blockIdx.x;
  auto* dm_row = static_cast<acc_t*>(params.dm_partial) + unit * 2 * channels * rank;
#pragma unroll
  for (int side = 0; side < 2; ++side) {
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
#pragma unroll
      for (int j = 0; j < kRanksOfWarp; ++j) {
        const int r = first_rank + warp * kRanksOfWarp + j;
        if (r < rank && c < channels) {
          dm_row[(static_cast<int64_t>(side) * channels + c + i) * rank + r] = dm[side][j][i];
        }
      }
    }
  }
  if (!first_pass) return;
  auto* dc_row = static_cast<acc_t*>(params.dc_partial) + unit * 2 * channels;
  auto* dw_row = static_cast<acc_t*>(params.dw_partial) + unit * 3 * channels;
#pragma unroll
  for (int k = 0; k < 5; ++k) {  // dc, then dw
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      d_tile[warp][lane * kWidth + i] = k < 2 ? dc[k % 2][i] : dw[(k + 1) % 3][i];
    }
    __syncthreads();
    const int channel = first_channel + static_cast<int>(threadIdx.x);
    if (threadIdx.x < kChannels && channel < channels) {
      acc_t sum = 0;
#pragma unroll
      for (int other = 0; other < Traits::kWarps; ++other) sum += d_tile[other][threadIdx.x];
      if (k < 2) {
        dc_row[static_cast<int64_t>(k) * channels + channel] = sum;
      } else {
        dw_row[int64_t{3} * channel + k - 2] = sum;
      }
    }
  }
}

// dz and dv from the sums of each channel tile: partial is [2, tiles, size].
template <typename scalar_t>
__global__ void __launch_bounds__(256)
    diff_gate_shift_dz_kernel(const accumulate_t<scalar_t>* __restrict__ partial,
                              scalar_t* __restrict__ dz, scalar_t* __restrict__ dv, int tiles,
                              int64_t size) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * 256 + threadIdx.x;
  if (i >= size) return;
  const int64_t side = blockIdx.y;
  const auto* source = partial + side * tiles * size + i;
  accumulate_t<scalar_t> sum = source[0];
  for (int tile = 1; tile < tiles; ++tile) sum += source[tile * size];
  (side == 0 ? dz : dv)[i] = narrow<scalar_t>(sum);
}

template <typename Traits>
int launch(const DiffGateShiftBackward& params, cudaStream_t stream) {
  using scalar_t = typename Traits::scalar_t;
  using acc_t = typename Traits::acc_t;
  const DiffGateShiftUnits units(params, params.items_per_unit);
  const int tiles = divide_up(params.channels, Traits::kChannels);
  const dim3 grid(static_cast<unsigned>(units.count), static_cast<unsigned>(tiles));
  for (int first_rank = 0; first_rank < params.rank; first_rank += Traits::kRanks) {
    ACCEL_LAUNCH(diff_gate_shift_bwd_kernel<Traits>, grid, Traits::kThreads, stream, params,
                 units.frame_units, units.items, first_rank);
  }
  if (params.dz_partial != nullptr) {
    const int64_t size =
        static_cast<int64_t>(params.batch) * params.frames * params.pixels * params.rank;
    const dim3 blocks(static_cast<unsigned>(divide_up(size, 256)), 2);
    ACCEL_LAUNCH(diff_gate_shift_dz_kernel<scalar_t>, blocks, 256, stream,
                 static_cast<const acc_t*>(params.dz_partial), static_cast<scalar_t*>(params.dz),
                 static_cast<scalar_t*>(params.dv), tiles, size);
  }
  if (units.count > 1) {
    const int64_t channels = params.channels;
    launch_column_sum<acc_t>(params.dm_partial, params.dm, units.count, 2 * channels * params.rank,
                             stream);
    launch_column_sum<acc_t>(params.dc_partial, params.dc, units.count, 2 * channels, stream);
    launch_column_sum<acc_t>(params.dw_partial, params.dw, units.count, 3 * channels, stream);
  }
  return static_cast<int>(cudaGetLastError());
}

}  // namespace
}  // namespace accel_kernels

extern "C" int accel_diff_gate_shift_bwd(const accel_kernels::DiffGateShiftBackward* params,
                                         cudaStream_t stream) {
  using namespace accel_kernels;
  return dispatch_dtype<__half, __nv_bfloat16>(params->dtype, [&](auto tag) -> int {
    using scalar_t = typename decltype(tag)::type;
    if constexpr (sizeof(scalar_t) < 8) {  // fp64 serves tests: the general kernel is enough
      constexpr int kWidth = 8 / sizeof(scalar_t);
      if (diff_gate_shift_bwd_width(*params, sizeof(scalar_t)) == kWidth) {
        if (params->rank <= 8) return launch<BackwardTraits<scalar_t, kWidth, 8>>(*params, stream);
        if (params->rank <= 16) {
          return launch<BackwardTraits<scalar_t, kWidth, 16>>(*params, stream);
        }
        return launch<BackwardTraits<scalar_t, kWidth, 32>>(*params, stream);
      }
    }
    return launch<BackwardTraits<scalar_t, 1, 32>>(*params, stream);
  });
}
