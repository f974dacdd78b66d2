// bn_act, backward: sums of each channel (the gradients of weight and bias), then dx and dshortcut.

#include <type_traits>

#include "cuda/bn_act.cuh"

namespace accel_kernels {
namespace {

// Where y > 0 comes from: it is everywhere, the mask, the sign of n.
constexpr int kOpen = 0;
constexpr int kMask = 1;
constexpr int kSign = 2;

// Rows of grad (with the pooled gradient added) and x, and the gradient where y > 0.
template <typename Traits, int kGate>
struct GatedRows {
  using scalar_t = typename Traits::scalar_t;
  using acc_t = typename Traits::acc_t;
  static constexpr int kRowsInFlight = Traits::kRowsOfTwo;

  __device__ GatedRows(const BnActBackward& params_, const Place& place_)
      : params(params_), place(place_) {}

  // Rows row, row + 32, ...; those from `last` on are left as they are.
  __device__ __forceinline__ void load(int row, int last) {
    const int64_t channels = params.channels;
#pragma unroll
    for (int j = 0; j < kRowsInFlight; ++j) {
      const int64_t here = row + j * kRowLanes;
      if (here >= last) break;
      const int64_t offset = here * channels + place.c;
      load_row<Traits::kVector>(static_cast<const scalar_t*>(params.grad) + offset, place.count,
                                grad_stored[j]);
      if (params.x != nullptr) {
        load_row<Traits::kVector>(static_cast<const scalar_t*>(params.x) + offset, place.count,
                                  x_stored[j]);
      }
      if constexpr (kGate == kMask) {
        mask[j] = static_cast<const unsigned char*>(
            params.mask)[here * ((params.channels + 7) / 8) + place.c / 8];
      }
    }
  }

  // x and the gated gradient of the j-th row that was loaded.
  __device__ __forceinline__ void get(int j, int row, const Affine<acc_t>& affine,
                                      acc_t (&x)[kWidth], acc_t (&gated)[kWidth]) {
    if (params.grad_pooled != nullptr) {
      const int here = (row + j * kRowLanes) / params.pixels;
      if (here != frame) {
        frame = here;
        const auto* source = static_cast<const acc_t*>(params.grad_pooled) +
                             static_cast<int64_t>(frame) * params.channels;
        load_channels(source, place, acc_t{0}, pooled);
        const acc_t share = acc_t{1} / static_cast<acc_t>(params.pixels);
#pragma unroll
        for (int i = 0; i < kWidth; ++i) pooled[i] *= share;
      }
    }
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      x[i] = widen(x_stored[j][i]);
      acc_t value = widen(grad_stored[j][i]) + pooled[i];
      if constexpr (kGate == kMask) {
        if ((mask[j] >> i & 1u) == 0) value = 0;
      }
      if constexpr (kGate == kSign) {
        if (multiply_add(affine.scale[i], x[i], affine.offset[i]) <= 0) value = 0;
      }
      gated[i] = value;
    }
  }

  const BnActBackward& params;
  const Place& place;
  scalar_t grad_stored[kRowsInFlight][kWidth] = {};
  scalar_t x_stored[kRowsInFlight][kWidth] = {};
  unsigned mask[kRowsInFlight] = {};
  int frame = -1;
  acc_t pooled[kWidth] = {};
};

// One block sums 64 channels over one unit of rows. Bytes per element: reads grad and x once, and
// the mask.
template <typename Traits, int kGate>
__global__ void __launch_bounds__(kThreads, Traits::kBlocksPerSm)
    bn_act_bwd_sums_kernel(const BnActBackward params, int rows) {
  using acc_t = typename Traits::acc_t;
  __shared__ typename BlockSums<2, acc_t>::Shared shared;
  const Place place(params.channels);
  const int first = place.unit * params.rows_per_unit;
  const int last = min(first + params.rows_per_unit, rows);

  acc_t sums[2][kWidth] = {};
  if (place.count > 0) {
    const Affine<acc_t> affine(params, place);
    acc_t mean[kWidth];
    load_channels(params.mean, place, acc_t{0}, mean);
    GatedRows<Traits, kGate> source(params, place);
    constexpr int kRowsInFlight = Traits::kRowsOfTwo;
    for (int row = first + place.row_lane; row < last; row += kRowsInFlight * kRowLanes) {
      source.load(row, last);
#pragma unroll
      for (int j = 0; j < kRowsInFlight; ++j) {
        if (row + j * kRowLanes >= last) break;
        acc_t x[kWidth];
        acc_t gated[kWidth];
        source.get(j, row, affine, x, gated);
#pragma unroll
        for (int i = 0; i < kWidth; ++i) {
          sums[0][i] += gated[i];
          sums[1][i] = multiply_add(gated[i], x[i] - mean[i], sums[1][i]);
        }
      }
    }
  }
  const BlockSums<2, acc_t> block(sums, place, shared);
  const int channel = place.first_channel + static_cast<int>(threadIdx.x);
  if (threadIdx.x < kChannelsPerBlock && channel < params.channels) {
    auto* partial = static_cast<acc_t*>(params.partial) +
                    static_cast<int64_t>(place.unit) * 2 * params.channels + channel;
    partial[0] = block.total(0);
    partial[params.channels] = block.total(1);
  }
}

// One block finishes 32 channels. Bytes: 8 per partial element, from L2.
template <typename acc_t>
__global__ void __launch_bounds__(kFinishThreads)
    bn_act_bwd_sums_finish_kernel(const BnActBackward params, int units) {
  __shared__ acc_t shared[kFinishWarps][kFinishLanes];
  const int64_t channels = params.channels;
  const int lane = static_cast<int>(threadIdx.x) % kFinishLanes;
  const int channel = static_cast<int>(blockIdx.x) * kFinishLanes + lane;
  const auto* partial =
      static_cast<const acc_t*>(params.partial) + min(channel, params.channels - 1);
  const acc_t sum =
      column_total(units, shared, [&](int unit) { return partial[unit * 2 * channels]; });
  const acc_t products = column_total(
      units, shared, [&](int unit) { return partial[unit * 2 * channels + channels]; });
  if (threadIdx.x >= kFinishLanes || channel >= params.channels) return;
  const acc_t var = static_cast<const acc_t*>(params.var)[channel];
  static_cast<acc_t*>(params.dbias)[channel] = sum;
  static_cast<acc_t*>(params.dweight)[channel] = products * reciprocal_deviation(var, params.eps);
}

// One block computes 64 channels of one unit of rows. Bytes per element: reads grad and x (not x
// where neither the statistics nor the sign need it), writes dx and dshortcut.
template <typename Traits, int kGate>
__global__ void __launch_bounds__(kThreads, Traits::kBlocksPerSm)
    bn_act_bwd_kernel(const BnActBackward params, int rows, int unit_rows) {
  using scalar_t = typename Traits::scalar_t;
  using acc_t = typename Traits::acc_t;
  const Place place(params.channels);
  if (place.count == 0) return;
  const int64_t channels = params.channels;
  const int first = place.unit * unit_rows;
  const int last = min(first + unit_rows, rows);
  const Affine<acc_t> affine(params, place);

  // dx = scale * g1 + (slope * x + constant): these carry the statistics' dependence on x.
  acc_t slope[kWidth] = {};
  acc_t constant[kWidth] = {};
  if (params.dbias != nullptr) {
    const acc_t count = params.count == nullptr ? static_cast<acc_t>(rows)
                                                : *static_cast<const acc_t*>(params.count);
    acc_t mean[kWidth], var[kWidth], dweight[kWidth], dbias[kWidth];
    load_channels(params.mean, place, acc_t{0}, mean);
    load_channels(params.var, place, acc_t{1}, var);
    load_channels(params.dweight, place, acc_t{0}, dweight);
    load_channels(params.dbias, place, acc_t{0}, dbias);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      const acc_t rstd = reciprocal_deviation(var[i], params.eps);
      slope[i] = -affine.scale[i] * rstd * dweight[i] / count;
      constant[i] = -affine.scale[i] * dbias[i] / count - slope[i] * mean[i];
    }
  }

  GatedRows<Traits, kGate> source(params, place);
  constexpr int kRowsInFlight = Traits::kRowsOfTwo;
  for (int row = first + place.row_lane; row < last; row += kRowsInFlight * kRowLanes) {
    source.load(row, last);
#pragma unroll
    for (int j = 0; j < kRowsInFlight; ++j) {
      const int64_t here = row + j * kRowLanes;
      if (here >= last) break;
      acc_t x[kWidth];
      acc_t gated[kWidth];
      source.get(j, row, affine, x, gated);
      const int64_t offset = here * channels + place.c;
      scalar_t result[kWidth];
      if (params.dx != nullptr) {
#pragma unroll
        for (int i = 0; i < kWidth; ++i) {
          const acc_t correction = multiply_add(slope[i], x[i], constant[i]);
          result[i] = narrow<scalar_t>(multiply_add(affine.scale[i], gated[i], correction));
        }
        store_row<Traits::kVector>(static_cast<scalar_t*>(params.dx) + offset, place.count, result);
      }
      if (params.dshortcut != nullptr) {
#pragma unroll
        for (int i = 0; i < kWidth; ++i) result[i] = narrow<scalar_t>(gated[i]);
        store_row<Traits::kVector>(static_cast<scalar_t*>(params.dshortcut) + offset, place.count,
                                   result);
      }
    }
  }
}

// Calls function(Tag<Traits>{}, gate): the access width that the tensors allow, and the gate.
template <typename Function>
int dispatch(const BnActBackward& params, const Function& function) {
  return dispatch_dtype<__half, __nv_bfloat16>(params.dtype, [&](auto tag) -> int {
    using scalar_t = typename decltype(tag)::type;
    const auto with_gate = [&](auto traits) -> int {
      if (!params.relu) return function(traits, std::integral_constant<int, kOpen>{});
      if (params.mask != nullptr) {
        return function(traits, std::integral_constant<int, kMask>{});
      }
      return function(traits, std::integral_constant<int, kSign>{});
    };
    if constexpr (sizeof(scalar_t) < 8) {  // fp64 serves tests: no vectors needed
      if (params.channels % kWidth == 0 && is_aligned(params.grad, 16) &&
          is_aligned(params.x, 16) && is_aligned(params.dx, 16) &&
          is_aligned(params.dshortcut, 16)) {
        return with_gate(Tag<BnActTraits<scalar_t, true>>{});
      }
    }
    return with_gate(Tag<BnActTraits<scalar_t, false>>{});
  });
}

}  // namespace
}  // namespace accel_kernels

extern "C" int accel_bn_act_bwd_sums(const accel_kernels::BnActBackward* params,
                                     cudaStream_t stream) {
  using namespace accel_kernels;
  return dispatch(*params, [&](auto traits, auto gate) {
    using Traits = typename decltype(traits)::type;
    const int rows = static_cast<int>(params->rows());
    const int units = divide_up(rows, params->rows_per_unit);
    ACCEL_LAUNCH((bn_act_bwd_sums_kernel<Traits, gate()>), blocks_of(units, params->channels),
                 kThreads, stream, *params, rows);
    ACCEL_LAUNCH(bn_act_bwd_sums_finish_kernel<typename Traits::acc_t>,
                 static_cast<unsigned>(divide_up(params->channels, kFinishLanes)), kFinishThreads,
                 stream, *params, units);
    return static_cast<int>(cudaGetLastError());
  });
}

extern "C" int accel_bn_act_bwd(const accel_kernels::BnActBackward* params, cudaStream_t stream) {
  using namespace accel_kernels;
  return dispatch(*params, [&](auto traits, auto gate) {
    using Traits = typename decltype(traits)::type;
    const int rows = static_cast<int>(params->rows());
    const int unit_rows = bn_act_rows_per_unit(*params);
    ACCEL_LAUNCH((bn_act_bwd_kernel<Traits, gate()>),
                 blocks_of(divide_up(rows, unit_rows), params->channels), kThreads, stream,
                 *params, rows, unit_rows);
    return static_cast<int>(cudaGetLastError());
  });
}
