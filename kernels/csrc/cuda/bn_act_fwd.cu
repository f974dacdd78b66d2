// bn_act, forward: statistics of each channel, then norm, shortcut, ReLU and pooled mean.

#include "common/reduce.cuh"
#include "cuda/bn_act.cuh"

namespace accel_kernels {
namespace {

// One block computes mean and sum of squared distances of 64 channels over one unit of rows.
// Bytes per element: reads x once. Distances are from the unit's first row, as in the C++ twin.
template <typename Traits>
__global__ void __launch_bounds__(kThreads, Traits::kBlocksPerSm)
    bn_act_statistics_kernel(const BnActStatistics params, int rows) {
  using scalar_t = typename Traits::scalar_t;
  using acc_t = typename Traits::acc_t;
  constexpr int kRowsInFlight = Traits::kRowsOfOne;
  __shared__ typename BlockSums<2, acc_t>::Shared shared;
  const Place place(params.channels);
  const int64_t channels = params.channels;
  const int first = place.unit * params.rows_per_unit;
  const int last = min(first + params.rows_per_unit, rows);
  const auto* x = static_cast<const scalar_t*>(params.x);

  acc_t sums[2][kWidth] = {};
  if (place.count > 0) {
    scalar_t stored[kRowsInFlight][kWidth] = {};
    load_row<Traits::kVector>(x + first * channels + place.c, place.count, stored[0]);
    acc_t shift[kWidth];
#pragma unroll
    for (int i = 0; i < kWidth; ++i) shift[i] = widen(stored[0][i]);

    for (int row = first + place.row_lane; row < last; row += kRowsInFlight * kRowLanes) {
#pragma unroll
      for (int j = 0; j < kRowsInFlight; ++j) {
        const int here = row + j * kRowLanes;
        if (here < last) {
          load_row<Traits::kVector>(x + here * channels + place.c, place.count, stored[j]);
        }
      }
#pragma unroll
      for (int j = 0; j < kRowsInFlight; ++j) {
        if (row + j * kRowLanes >= last) break;
#pragma unroll
        for (int i = 0; i < kWidth; ++i) {
          const acc_t distance = widen(stored[j][i]) - shift[i];
          sums[0][i] += distance;
          sums[1][i] = multiply_add(distance, distance, sums[1][i]);
        }
      }
    }
  }
  const BlockSums<2, acc_t> block(sums, place, shared);
  const int channel = place.first_channel + static_cast<int>(threadIdx.x);
  if (threadIdx.x < kChannelsPerBlock && channel < params.channels) {
    const acc_t sum = block.total(0);
    const acc_t offset = sum / static_cast<acc_t>(last - first);
    auto* partial = static_cast<acc_t*>(params.partial) + place.unit * 2 * channels + channel;
    partial[0] = widen(x[first * channels + channel]) + offset;
    partial[channels] = block.total(1) - offset * sum;
  }
}

// Mean of the units' means first, then squares: what the units have plus what their means are
// apart. One block finishes 32 channels. Bytes: 16 per partial element, from L2.
template <typename acc_t>
__global__ void __launch_bounds__(kFinishThreads)
    bn_act_statistics_finish_kernel(const BnActStatistics params, int rows, int units) {
  __shared__ acc_t shared[kFinishWarps][kFinishLanes];
  const int64_t channels = params.channels;
  const int lane = static_cast<int>(threadIdx.x) % kFinishLanes;
  const int channel = static_cast<int>(blockIdx.x) * kFinishLanes + lane;
  const auto* partial =
      static_cast<const acc_t*>(params.partial) + min(channel, params.channels - 1);
  const auto count = static_cast<acc_t>(rows);
  const auto rows_of = [&](int unit) {
    return static_cast<acc_t>(min(params.rows_per_unit, rows - unit * params.rows_per_unit));
  };

  const acc_t first_mean = partial[0];
  const acc_t mean = first_mean + column_total(units, shared, [&](int unit) {
                       return rows_of(unit) / count *
                              (partial[unit * 2 * channels] - first_mean);
                     });
  const acc_t squares = column_total(units, shared, [&](int unit) {
    const acc_t distance = partial[unit * 2 * channels] - mean;
    return multiply_add(rows_of(unit) * distance, distance,
                        partial[unit * 2 * channels + channels]);
  });
  if (threadIdx.x >= kFinishLanes || channel >= params.channels) return;
  const acc_t var = squares > 0 ? squares / count : acc_t{0};
  static_cast<acc_t*>(params.mean)[channel] = mean;
  static_cast<acc_t*>(params.var)[channel] = var;
  if (params.running_mean != nullptr) {
    const auto momentum = static_cast<acc_t>(params.momentum);
    auto* running_mean = static_cast<acc_t*>(params.running_mean) + channel;
    auto* running_var = static_cast<acc_t*>(params.running_var) + channel;
    const acc_t unbiased = squares > 0 ? squares / (count - 1) : acc_t{0};
    *running_mean = (1 - momentum) * *running_mean + momentum * mean;
    *running_var = (1 - momentum) * *running_var + momentum * unbiased;
  }
}

// One block computes 64 channels of one unit of rows, with kPool of one frame. Bytes per element:
// reads x and the shortcut once, writes y once and the mask (1/16 of y in fp16).
template <typename Traits, bool kPool>
__global__ void __launch_bounds__(kThreads, Traits::kBlocksPerSm)
    bn_act_fwd_kernel(const BnActForward params, int rows, int unit_rows) {
  using scalar_t = typename Traits::scalar_t;
  using acc_t = typename Traits::acc_t;
  constexpr int kRowsInFlight = Traits::kRowsOfOne;
  const Place place(params.channels);
  const int64_t channels = params.channels;
  int first = place.unit * unit_rows;
  int last = min(first + unit_rows, rows);
  int frame = 0;
  int pixel_unit = 0;
  if constexpr (kPool) {
    const int pixel_units = (params.pixels + unit_rows - 1) / unit_rows;
    frame = place.unit / pixel_units;
    pixel_unit = place.unit % pixel_units;
    first = frame * params.pixels + pixel_unit * unit_rows;
    last = min(first + unit_rows, (frame + 1) * params.pixels);
  }

  acc_t pooled[1][kWidth] = {};
  if (place.count > 0) {
    const Affine<acc_t> affine(params, place);
    const auto* x = static_cast<const scalar_t*>(params.x) + place.c;
    const auto* shortcut = static_cast<const scalar_t*>(params.shortcut) + place.c;
    auto* y = static_cast<scalar_t*>(params.y) + place.c;
    auto* mask = static_cast<unsigned char*>(params.mask) + place.c / 8;
    const int64_t mask_row = (params.channels + 7) / 8;
    for (int row = first + place.row_lane; row < last; row += kRowsInFlight * kRowLanes) {
      scalar_t x_stored[kRowsInFlight][kWidth] = {};
      scalar_t shortcut_stored[kRowsInFlight][kWidth] = {};
#pragma unroll
      for (int j = 0; j < kRowsInFlight; ++j) {
        const int here = row + j * kRowLanes;
        if (here < last) {
          load_row<Traits::kVector>(x + here * channels, place.count, x_stored[j]);
        }
      }
      if (params.shortcut != nullptr) {
#pragma unroll
        for (int j = 0; j < kRowsInFlight; ++j) {
          const int here = row + j * kRowLanes;
          if (here < last) {
            load_row<Traits::kVector>(shortcut + here * channels, place.count, shortcut_stored[j]);
          }
        }
      }
#pragma unroll
      for (int j = 0; j < kRowsInFlight; ++j) {
        const int here = row + j * kRowLanes;
        if (here >= last) break;
        scalar_t result[kWidth];
        unsigned positive = 0;
#pragma unroll
        for (int i = 0; i < kWidth; ++i) {
          acc_t value = multiply_add(affine.scale[i], widen(x_stored[j][i]), affine.offset[i]);
          if (params.shortcut != nullptr) value += widen(shortcut_stored[j][i]);
          if (params.relu && value < 0) value = 0;  // keeps NaN
          positive |= (value <= 0 ? 0u : 1u) << i;
          result[i] = narrow<scalar_t>(value);
          if constexpr (kPool) pooled[0][i] += widen(result[i]);
        }
        store_row<Traits::kVector>(y + here * channels, place.count, result);
        if (params.mask != nullptr) {
          mask[here * mask_row] = static_cast<unsigned char>(positive);
        }
      }
    }
  }
  if constexpr (kPool) {
    __shared__ typename BlockSums<1, acc_t>::Shared shared;
    const BlockSums<1, acc_t> block(pooled, place, shared);
    const int channel = place.first_channel + static_cast<int>(threadIdx.x);
    if (threadIdx.x < kChannelsPerBlock && channel < params.channels) {
      const int64_t target = static_cast<int64_t>(pixel_unit) * params.frames + frame;
      static_cast<acc_t*>(params.pooled_partial)[target * channels + channel] =
          block.total(0) * (acc_t{1} / static_cast<acc_t>(params.pixels));
    }
  }
}

template <typename Traits>
int launch_statistics(const BnActStatistics& params, cudaStream_t stream) {
  using acc_t = typename Traits::acc_t;
  const int rows = static_cast<int>(params.rows());
  const int units = divide_up(rows, params.rows_per_unit);
  ACCEL_LAUNCH(bn_act_statistics_kernel<Traits>, blocks_of(units, params.channels), kThreads,
               stream, params, rows);
  ACCEL_LAUNCH(bn_act_statistics_finish_kernel<acc_t>,
               static_cast<unsigned>(divide_up(params.channels, kFinishLanes)), kFinishThreads,
               stream, params, rows, units);
  return static_cast<int>(cudaGetLastError());
}

template <typename Traits>
int launch_forward(const BnActForward& params, cudaStream_t stream) {
  using acc_t = typename Traits::acc_t;
  const int rows = static_cast<int>(params.rows());
  if (params.pooled == nullptr) {
    const int unit_rows = bn_act_rows_per_unit(params);
    ACCEL_LAUNCH((bn_act_fwd_kernel<Traits, false>),
                 blocks_of(divide_up(rows, unit_rows), params.channels), kThreads, stream, params,
                 rows, unit_rows);
  } else {
    const int pixel_units = divide_up(params.pixels, params.pixels_per_unit);
    ACCEL_LAUNCH((bn_act_fwd_kernel<Traits, true>),
                 blocks_of(int64_t{params.frames} * pixel_units, params.channels), kThreads,
                 stream, params, rows, params.pixels_per_unit);
    if (params.pooled_partial != params.pooled) {
      launch_column_sum<acc_t>(params.pooled_partial, params.pooled, pixel_units,
                               int64_t{params.frames} * params.channels, stream);
    }
  }
  return static_cast<int>(cudaGetLastError());
}

}  // namespace
}  // namespace accel_kernels

extern "C" int accel_bn_act_statistics(const accel_kernels::BnActStatistics* params,
                                       cudaStream_t stream) {
  using namespace accel_kernels;
  return dispatch_dtype<__half, __nv_bfloat16>(params->dtype, [&](auto tag) -> int {
    using scalar_t = typename decltype(tag)::type;
    if constexpr (sizeof(scalar_t) < 8) {  // fp64 serves tests: no vectors needed
      if (params->channels % kWidth == 0 && is_aligned(params->x, 16)) {
        return launch_statistics<BnActTraits<scalar_t, true>>(*params, stream);
      }
    }
    return launch_statistics<BnActTraits<scalar_t, false>>(*params, stream);
  });
}

extern "C" int accel_bn_act_fwd(const accel_kernels::BnActForward* params, cudaStream_t stream) {
  using namespace accel_kernels;
  return dispatch_dtype<__half, __nv_bfloat16>(params->dtype, [&](auto tag) -> int {
    using scalar_t = typename decltype(tag)::type;
    if constexpr (sizeof(scalar_t) < 8) {
      if (params->channels % kWidth == 0 && is_aligned(params->x, 16) &&
          is_aligned(params->shortcut, 16) && is_aligned(params->y, 16)) {
        return launch_forward<BnActTraits<scalar_t, true>>(*params, stream);
      }
    }
    return launch_forward<BnActTraits<scalar_t, false>>(*params, stream);
  });
}
