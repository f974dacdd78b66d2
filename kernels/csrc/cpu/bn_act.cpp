// bn_act, C++ twin of the CUDA operator: same formulas, same partial sums, raw pointers.
// Free of torch; the bindings spread the work units over threads.

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

#include "common/clones.h"
#include "common/host_reduce.h"
#include "common/host_types.h"
#include "cuda/bn_act.h"

namespace accel_kernels {
namespace {

constexpr int64_t kUnitElements = 32768;  // of one work unit that needs no partial sums

// Rows are taken in runs of about this many elements: what a run needs stays in the L1 cache.
constexpr int kRunElements = 2048;

int rows_per_run(int channels) { return std::max(kRunElements / channels, 1); }

// A row of an activation in the arithmetic type: fp32 and fp64 in place, 16-bit types widened.
template <typename scalar_t, typename acc_t>
ACCEL_INLINE const acc_t* widened(const scalar_t* source, acc_t* storage, int count) {
  if constexpr (std::is_same_v<scalar_t, acc_t>) {
    return source;
  } else {
    widen_row(source, storage, count);
    return storage;
  }
}

// Runs body(first, last) over the rows [begin, end) in runs; no run crosses a frame of `pixels`
// rows if there is one (0: none).
template <typename Body>
ACCEL_INLINE void for_runs(int64_t begin, int64_t end, int channels, int pixels, const Body& body) {
  const int64_t run_rows = rows_per_run(channels);
  for (int64_t first = begin; first < end;) {
    int64_t last = std::min(first + run_rows, end);
    if (pixels != 0) last = std::min(last, (first / pixels + 1) * pixels);
    body(first, last);
    first = last;
  }
}

template <typename acc_t>
ACCEL_INLINE void add_row(const acc_t* __restrict row, acc_t* __restrict sum, int64_t count) {
#pragma GCC ivdep
  for (int64_t i = 0; i < count; ++i) sum[i] += row[i];
}

// ---- Statistics ----

// Adds `rows` (1 or 4) rows to both sums; four at a time load and store the sums less often.
template <int kRows, typename acc_t>
ACCEL_INLINE void shifted_sums(const acc_t* __restrict x, const acc_t* __restrict shift,
                               acc_t* __restrict sum, acc_t* __restrict squares,
                               int64_t channels) {
  static_assert(kRows == 1 || kRows == 4);
#pragma GCC ivdep
  for (int64_t c = 0; c < channels; ++c) {
    const acc_t a = x[c] - shift[c];
    if constexpr (kRows == 1) {
      sum[c] += a;
      squares[c] += a * a;
    } else {
      const acc_t b = x[c + channels] - shift[c];
      const acc_t d = x[c + 2 * channels] - shift[c];
      const acc_t e = x[c + 3 * channels] - shift[c];
      sum[c] += (a + b) + (d + e);
      squares[c] += (a * a + b * b) + (d * d + e * e);
    }
  }
}

// Each unit sums distances from its own first row: the squares then exceed the unit's variance by
// at most its number of rows (512), however far the mean is from zero.
template <typename scalar_t>
ACCEL_CLONES void statistics_units(const BnActStatistics& params, int64_t begin, int64_t end) {
  using acc_t = accumulate_t<scalar_t>;
  const int channels = params.channels;
  const auto* x = static_cast<const scalar_t*>(params.x);
  std::vector<acc_t> wide(size_t{1} * rows_per_run(channels) * channels);
  std::vector<acc_t> shift(channels);
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t first = unit * params.rows_per_unit;
    const int64_t last = std::min(first + params.rows_per_unit, params.rows());
    auto* sum = static_cast<acc_t*>(params.partial) + unit * 2 * channels;
    acc_t* squares = sum + channels;
    std::fill_n(sum, 2 * channels, acc_t{0});
    const acc_t* first_row = widened(x + first * channels, shift.data(), channels);
    std::copy_n(first_row, channels, shift.data());
    for_runs(first, last, channels, 0, [&](int64_t row, int64_t run_end) ACCEL_INLINE_LAMBDA {
      const auto rows = static_cast<int>(run_end - row);
      const acc_t* values = widened(x + row * channels, wide.data(), rows * channels);
      int i = 0;
      for (; i + 4 <= rows; i += 4) {
        shifted_sums<4>(values + i * channels, shift.data(), sum, squares, channels);
      }
      for (; i < rows; ++i) {
        shifted_sums<1>(values + i * channels, shift.data(), sum, squares, channels);
      }
    });
    const auto rows = static_cast<acc_t>(last - first);
    for (int c = 0; c < channels; ++c) {
      const acc_t offset = sum[c] / rows;
      squares[c] -= offset * sum[c];
      sum[c] = shift[c] + offset;
    }
  }
}

// Mean of means first, then squares: what the units have plus what their means are apart.
template <typename acc_t>
void finish_statistics(const BnActStatistics& params) {
  const int channels = params.channels;
  const int64_t rows = params.rows();
  const int64_t units = divide_up(rows, params.rows_per_unit);
  const auto* partial = static_cast<const acc_t*>(params.partial);
  auto* mean = static_cast<acc_t*>(params.mean);
  auto* var = static_cast<acc_t*>(params.var);
  const auto count = static_cast<acc_t>(rows);
  const auto rows_of = [&](int64_t unit) {
    const int64_t first = unit * params.rows_per_unit;
    return static_cast<acc_t>(std::min<int64_t>(params.rows_per_unit, rows - first));
  };

  std::fill_n(mean, channels, acc_t{0});
  for (int64_t unit = 1; unit < units; ++unit) {
    const acc_t* unit_mean = partial + unit * 2 * channels;
    const acc_t share = rows_of(unit) / count;
    for (int c = 0; c < channels; ++c) mean[c] += share * (unit_mean[c] - partial[c]);
  }
  for (int c = 0; c < channels; ++c) mean[c] += partial[c];

  std::fill_n(var, channels, acc_t{0});
  for (int64_t unit = 0; unit < units; ++unit) {
    const acc_t* unit_mean = partial + unit * 2 * channels;
    const acc_t* squares = unit_mean + channels;
    const acc_t unit_rows = rows_of(unit);
    for (int c = 0; c < channels; ++c) {
      const acc_t distance = unit_mean[c] - mean[c];
      var[c] += squares[c] + unit_rows * distance * distance;
    }
  }
  auto* running_mean = static_cast<acc_t*>(params.running_mean);
  auto* running_var = static_cast<acc_t*>(params.running_var);
  const auto momentum = static_cast<acc_t>(params.momentum);
  for (int c = 0; c < channels; ++c) {
    const acc_t squares = std::max(var[c], acc_t{0});
    var[c] = squares / count;
    if (running_mean == nullptr) continue;
    running_mean[c] = (1 - momentum) * running_mean[c] + momentum * mean[c];
    running_var[c] = (1 - momentum) * running_var[c] + momentum * (squares / (count - 1));
  }
}

// ---- Apply ----

// n = scale * x + offset, for all channels.
template <typename acc_t>
struct Affine {
  explicit Affine(const BnActNorm& params) : scale(params.channels), offset(params.channels) {
    const auto* weight = static_cast<const acc_t*>(params.weight);
    const auto* bias = static_cast<const acc_t*>(params.bias);
    const auto* mean = static_cast<const acc_t*>(params.mean);
    const auto* var = static_cast<const acc_t*>(params.var);
    for (int c = 0; c < params.channels; ++c) {
      scale[c] = weight[c] / std::sqrt(var[c] + static_cast<acc_t>(params.eps));
      offset[c] = bias[c] - mean[c] * scale[c];
    }
  }
  std::vector<acc_t> scale;
  std::vector<acc_t> offset;
};

template <bool kShortcut, bool kRelu, typename acc_t>
ACCEL_INLINE void apply_row(const acc_t* __restrict x, const acc_t* __restrict shortcut,
                            const acc_t* __restrict scale, const acc_t* __restrict offset,
                            acc_t* __restrict y, int channels) {
#pragma GCC ivdep
  for (int c = 0; c < channels; ++c) {
    acc_t value = scale[c] * x[c] + offset[c];
    if constexpr (kShortcut) value += shortcut[c];
    if constexpr (kRelu) value = value < 0 ? 0 : value;  // keeps NaN
    y[c] = value;
  }
}

// One bit for each y > 0, the first in the lowest place. NaN counts as positive, as in PyTorch's
// ReLU.
template <typename acc_t>
ACCEL_INLINE unsigned positive_bits(const acc_t* y, int count) {
  unsigned bits = 0;
  for (int i = 0; i < count; ++i) bits |= (y[i] <= 0 ? 0u : 1u) << i;
  return bits;
}
#if defined(__SSE2__)
ACCEL_INLINE unsigned eight_positive_bits(const float* y) {
  const auto four = [y](int i) {
    return _mm_movemask_ps(_mm_cmpnle_ps(_mm_loadu_ps(y + i), _mm_setzero_ps()));
  };
  return static_cast<unsigned>(four(0) | four(4) << 4);
}
#endif
template <typename acc_t>
ACCEL_INLINE unsigned eight_positive_bits(const acc_t* y) {
  return positive_bits(y, 8);
}

template <typename acc_t>
ACCEL_INLINE void pack_mask(const acc_t* __restrict y, std::uint8_t* __restrict bits, int channels) {
  int c = 0;
  for (; c + 8 <= channels; c += 8) {
    bits[c / 8] = static_cast<std::uint8_t>(eight_positive_bits(y + c));
  }
  if (c < channels) bits[c / 8] = static_cast<std::uint8_t>(positive_bits(y + c, channels - c));
}

template <typename scalar_t, bool kShortcut, bool kRelu>
ACCEL_CLONES void forward_units(const BnActForward& params, int64_t begin, int64_t end) {
  using acc_t = accumulate_t<scalar_t>;
  constexpr bool kInPlace = std::is_same_v<scalar_t, acc_t>;
  const int channels = params.channels;
  const Affine<acc_t> affine(params);
  const auto* x = static_cast<const scalar_t*>(params.x);
  const auto* shortcut = static_cast<const scalar_t*>(params.shortcut);
  auto* y = static_cast<scalar_t*>(params.y);
  auto* mask = static_cast<std::uint8_t*>(params.mask);
  const size_t run_elements = size_t{1} * rows_per_run(channels) * channels;
  std::vector<acc_t> wide_x(run_elements);
  std::vector<acc_t> wide_shortcut(run_elements);
  std::vector<acc_t> wide_y(run_elements);

  const bool pool = params.pooled != nullptr;
  const int pixel_units = pool ? divide_up(params.pixels, params.pixels_per_unit) : 0;
  const int64_t unit_rows = std::max<int64_t>(kUnitElements / channels, 1);
  for (int64_t unit = begin; unit < end; ++unit) {
    int64_t first = unit * unit_rows;
    int64_t last = std::min(first + unit_rows, params.rows());
    acc_t* pooled = nullptr;
    if (pool) {
      const int64_t frame = unit / pixel_units;
      const int64_t pixel_unit = unit % pixel_units;
      const int64_t pixel = pixel_unit * params.pixels_per_unit;
      first = frame * params.pixels + pixel;
      last = first + std::min<int64_t>(params.pixels_per_unit, params.pixels - pixel);
      pooled = static_cast<acc_t*>(params.pooled_partial) +
               (pixel_unit * params.frames + frame) * channels;
      std::fill_n(pooled, channels, acc_t{0});
    }
    for_runs(first, last, channels, 0, [&](int64_t row, int64_t run_end) ACCEL_INLINE_LAMBDA {
      const int64_t start = row * channels;
      const int length = static_cast<int>(run_end - row) * channels;
      const acc_t* values = widened(x + start, wide_x.data(), length);
      const acc_t* other = values;
      if constexpr (kShortcut) other = widened(shortcut + start, wide_shortcut.data(), length);
      acc_t* out = wide_y.data();
      if constexpr (kInPlace) out = y + start;
      for (int i = 0; i < length; i += channels) {
        apply_row<kShortcut, kRelu>(values + i, other + i, affine.scale.data(),
                                    affine.offset.data(), out + i, channels);
      }
      if (mask != nullptr) {
        std::uint8_t* bits = mask + row * mask_bytes(channels);
        if (channels % 8 == 0) {
          pack_mask(out, bits, length);
        } else {
          for (int i = 0; i < length; i += channels, bits += mask_bytes(channels)) {
            pack_mask(out + i, bits, channels);
          }
        }
      }
      if constexpr (!kInPlace) narrow_row(out, y + start, length);
      if (pool) {
        const acc_t* rounded = widened(y + start, wide_y.data(), length);
        for (int i = 0; i < length; i += channels) add_row(rounded + i, pooled, channels);
      }
    });
    if (pool) {
      const acc_t share = acc_t{1} / static_cast<acc_t>(params.pixels);
      for (int c = 0; c < channels; ++c) pooled[c] *= share;
    }
  }
}

// ---- Backward ----

// out = grad where the bit is set, else 0.
template <typename acc_t>
ACCEL_INLINE void gate_row(const acc_t* grad, const std::uint8_t* bits, acc_t* out, int channels) {
  using bits_t = std::conditional_t<sizeof(acc_t) == 8, std::int64_t, std::int32_t>;
  using Lanes __attribute__((vector_size(8 * sizeof(bits_t)))) = bits_t;
  const Lanes select = {1, 2, 4, 8, 16, 32, 64, 128};
  int c = 0;
  for (; c + 8 <= channels; c += 8) {
    Lanes lanes;
    std::memcpy(&lanes, grad + c, sizeof(lanes));
    const Lanes byte = Lanes{} + static_cast<bits_t>(bits[c / 8]);
    lanes &= (byte & select) != 0;
    std::memcpy(out + c, &lanes, sizeof(lanes));
  }
  for (; c < channels; ++c) out[c] = (bits[c / 8] >> (c % 8) & 1) != 0 ? grad[c] : 0;
}

// What both backward passes read: rows of grad, with the pooled gradient added and zeros where the
// mask says so, and of x.
template <typename scalar_t>
struct GradientRun {
  using acc_t = accumulate_t<scalar_t>;

  explicit GradientRun(const BnActBackward& backward)
      : params(backward),
        channels(backward.channels),
        affine(backward),
        wide_grad(size_t{1} * rows_per_run(channels) * channels),
        wide_x(wide_grad.size()) {}

  // `target`: where grad goes if the mask changes it.
  ACCEL_INLINE void load(int64_t row, int length, acc_t* target) {
    const int64_t start = row * channels;
    grad = widened(static_cast<const scalar_t*>(params.grad) + start, wide_grad.data(), length);
    x = params.x == nullptr
            ? grad  // any numbers: they are not used
            : widened(static_cast<const scalar_t*>(params.x) + start, wide_x.data(), length);
    if (params.grad_pooled != nullptr) {
      const auto* pooled =
          static_cast<const acc_t*>(params.grad_pooled) + row / params.pixels * channels;
      const acc_t share = acc_t{1} / static_cast<acc_t>(params.pixels);
      for (int i = 0; i < length; i += channels) {
        for (int c = 0; c < channels; ++c) wide_grad[i + c] = grad[i + c] + share * pooled[c];
      }
      grad = wide_grad.data();
    }
    if (params.relu && params.mask != nullptr) {
      const int mask_row = mask_bytes(channels);
      const auto* bits = static_cast<const std::uint8_t*>(params.mask) + row * mask_row;
      const int step = channels % 8 == 0 ? length : channels;  // rows of whole bytes adjoin
      for (int i = 0; i < length; i += step, bits += mask_row) {
        gate_row(grad + i, bits, target + i, step);
      }
      grad = target;
    }
  }

  const BnActBackward& params;
  int channels;
  Affine<acc_t> affine;
  const acc_t* grad = nullptr;
  const acc_t* x = nullptr;
  std::vector<acc_t> wide_grad;
  std::vector<acc_t> wide_x;
};

// kSign: only where n > 0, which without a mask is where y > 0.
template <bool kSign, typename acc_t>
ACCEL_INLINE acc_t gated(acc_t grad, acc_t x, acc_t scale, acc_t offset) {
  if constexpr (kSign) return scale * x + offset <= 0 ? 0 : grad;
  return grad;
}

template <bool kSign, typename acc_t>
ACCEL_INLINE void sums_row(const acc_t* __restrict grad, const acc_t* __restrict x,
                           const acc_t* __restrict scale, const acc_t* __restrict offset,
                           const acc_t* __restrict mean, acc_t* __restrict sum,
                           acc_t* __restrict products, int channels) {
#pragma GCC ivdep
  for (int c = 0; c < channels; ++c) {
    const acc_t value = gated<kSign>(grad[c], x[c], scale[c], offset[c]);
    sum[c] += value;
    products[c] += value * (x[c] - mean[c]);
  }
}

template <typename scalar_t, bool kSign>
ACCEL_CLONES void sums_units(const BnActBackward& params, int64_t begin, int64_t end) {
  using acc_t = accumulate_t<scalar_t>;
  const int channels = params.channels;
  const int pixels = params.grad_pooled == nullptr ? 0 : params.pixels;
  const auto* mean = static_cast<const acc_t*>(params.mean);
  GradientRun<scalar_t> run(params);
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t first = unit * params.rows_per_unit;
    const int64_t last = std::min(first + params.rows_per_unit, params.rows());
    auto* sum = static_cast<acc_t*>(params.partial) + unit * 2 * channels;
    std::fill_n(sum, 2 * channels, acc_t{0});
    for_runs(first, last, channels, pixels, [&](int64_t row, int64_t run_end) ACCEL_INLINE_LAMBDA {
      const int length = static_cast<int>(run_end - row) * channels;
      run.load(row, length, run.wide_grad.data());
      for (int i = 0; i < length; i += channels) {
        sums_row<kSign>(run.grad + i, run.x + i, run.affine.scale.data(), run.affine.offset.data(),
                        mean, sum, sum + channels, channels);
      }
    });
  }
}

template <typename acc_t>
void finish_sums(const BnActBackward& params) {
  const int channels = params.channels;
  const int64_t units = divide_up(params.rows(), params.rows_per_unit);
  std::vector<acc_t> sums(size_t{2} * channels);
  column_sum<acc_t>(params.partial, sums.data(), units, int64_t{2} * channels);
  const auto* var = static_cast<const acc_t*>(params.var);
  auto* dbias = static_cast<acc_t*>(params.dbias);
  auto* dweight = static_cast<acc_t*>(params.dweight);
  for (int c = 0; c < channels; ++c) {
    dbias[c] = sums[c];
    dweight[c] = sums[channels + c] / std::sqrt(var[c] + static_cast<acc_t>(params.eps));
  }
}

// dx = scale * g1 + (slope * x + constant): the last two carry the statistics' dependence on x.
template <typename acc_t>
struct Correction {
  Correction(const BnActBackward& params, const Affine<acc_t>& affine)
      : slope(params.channels), constant(params.channels) {
    if (params.dbias == nullptr) return;
    const auto* mean = static_cast<const acc_t*>(params.mean);
    const auto* var = static_cast<const acc_t*>(params.var);
    const auto* dweight = static_cast<const acc_t*>(params.dweight);
    const auto* dbias = static_cast<const acc_t*>(params.dbias);
    const acc_t count = params.count == nullptr ? static_cast<acc_t>(params.rows())
                                                : *static_cast<const acc_t*>(params.count);
    for (int c = 0; c < params.channels; ++c) {
      const acc_t rstd = 1 / std::sqrt(var[c] + static_cast<acc_t>(params.eps));
      slope[c] = -affine.scale[c] * rstd * dweight[c] / count;
      constant[c] = -affine.scale[c] * dbias[c] / count - slope[c] * mean[c];
    }
  }
  std::vector<acc_t> slope;
  std::vector<acc_t> constant;
};

template <bool kSign, bool kCorrection, typename acc_t>
ACCEL_INLINE void backward_row(const acc_t* __restrict grad, const acc_t* __restrict x,
                               const acc_t* __restrict scale, const acc_t* __restrict offset,
                               const acc_t* __restrict slope, const acc_t* __restrict constant,
                               acc_t* __restrict dx, int channels) {
#pragma GCC ivdep
  for (int c = 0; c < channels; ++c) {
    const acc_t here = kCorrection || kSign ? x[c] : acc_t{0};
    const acc_t value = gated<kSign>(grad[c], here, scale[c], offset[c]);
    dx[c] = kCorrection ? scale[c] * value + (slope[c] * here + constant[c]) : scale[c] * value;
  }
}

template <typename scalar_t, bool kSign, bool kCorrection>
ACCEL_CLONES void backward_units(const BnActBackward& params, int64_t begin, int64_t end) {
  using acc_t = accumulate_t<scalar_t>;
  constexpr bool kInPlace = std::is_same_v<scalar_t, acc_t>;
  const int channels = params.channels;
  const int pixels = params.grad_pooled == nullptr ? 0 : params.pixels;
  const int64_t unit_rows = std::max<int64_t>(kUnitElements / channels, 1);
  GradientRun<scalar_t> run(params);
  const Correction<acc_t> correction(params, run.affine);
  std::vector<acc_t> wide_dx(run.wide_grad.size());
  auto* dx = static_cast<scalar_t*>(params.dx);
  auto* dshortcut = static_cast<scalar_t*>(params.dshortcut);
  const int64_t first_row = begin * unit_rows;
  const int64_t last_row = std::min(end * unit_rows, params.rows());
  for_runs(first_row, last_row, channels, pixels,
           [&](int64_t row, int64_t run_end) ACCEL_INLINE_LAMBDA {
    const int64_t start = row * channels;
    const int length = static_cast<int>(run_end - row) * channels;
    acc_t* gated_grad = run.wide_grad.data();
    acc_t* dx_out = wide_dx.data();
    if constexpr (kInPlace) {
      if (dshortcut != nullptr) gated_grad = dshortcut + start;
      if (dx != nullptr) dx_out = dx + start;
    }
    run.load(row, length, gated_grad);
    if (dx != nullptr) {
      for (int i = 0; i < length; i += channels) {
        backward_row<kSign, kCorrection>(run.grad + i, run.x + i, run.affine.scale.data(),
                                         run.affine.offset.data(), correction.slope.data(),
                                         correction.constant.data(), dx_out + i, channels);
      }
      if constexpr (!kInPlace) narrow_row(dx_out, dx + start, length);
    }
    if (dshortcut != nullptr) {
      if constexpr (!kInPlace) {
        narrow_row(run.grad, dshortcut + start, length);
      } else if (run.grad != gated_grad) {
        std::copy_n(run.grad, length, gated_grad);
      }
    }
  });
}

template <typename Function>
void dispatch_bool(bool value, const Function& function) {
  if (value) {
    function(std::true_type{});
  } else {
    function(std::false_type{});
  }
}

int64_t plain_units(const BnActShape& shape) {
  return divide_up(shape.rows(), std::max<int64_t>(kUnitElements / shape.channels, 1));
}

}  // namespace

int64_t bn_act_statistics_units_cpp(const BnActStatistics& params) {
  return divide_up(params.rows(), params.rows_per_unit);
}

void bn_act_statistics_cpp(const BnActStatistics& params, int64_t begin, int64_t end) {
  dispatch_dtype<Half, BFloat16>(params.dtype, [&](auto tag) {
    statistics_units<typename decltype(tag)::type>(params, begin, end);
  });
}

void bn_act_statistics_finish_cpp(const BnActStatistics& params) {
  dispatch_dtype<Half, BFloat16>(params.dtype, [&](auto tag) {
    finish_statistics<accumulate_t<typename decltype(tag)::type>>(params);
  });
}

int64_t bn_act_fwd_units_cpp(const BnActForward& params) {
  if (params.pooled == nullptr) return plain_units(params);
  return int64_t{params.frames} * divide_up(params.pixels, params.pixels_per_unit);
}

void bn_act_fwd_cpp(const BnActForward& params, int64_t begin, int64_t end) {
  dispatch_dtype<Half, BFloat16>(params.dtype, [&](auto tag) {
    dispatch_bool(params.shortcut != nullptr, [&](auto shortcut) {
      dispatch_bool(params.relu != 0, [&](auto relu) {
        forward_units<typename decltype(tag)::type, shortcut(), relu()>(params, begin, end);
      });
    });
  });
}

void bn_act_fwd_finish_cpp(const BnActForward& params) {
  if (params.pooled == params.pooled_partial) return;
  dispatch_dtype<Half, BFloat16>(params.dtype, [&](auto tag) {
    using acc_t = accumulate_t<typename decltype(tag)::type>;
    const int64_t units = divide_up(params.pixels, params.pixels_per_unit);
    column_sum<acc_t>(params.pooled_partial, params.pooled, units,
                      int64_t{params.frames} * params.channels);
  });
}

int64_t bn_act_bwd_sums_units_cpp(const BnActBackward& params) {
  return divide_up(params.rows(), params.rows_per_unit);
}

void bn_act_bwd_sums_cpp(const BnActBackward& params, int64_t begin, int64_t end) {
  dispatch_dtype<Half, BFloat16>(params.dtype, [&](auto tag) {
    dispatch_bool(params.relu && params.mask == nullptr, [&](auto sign) {
      sums_units<typename decltype(tag)::type, sign()>(params, begin, end);
    });
  });
}

void bn_act_bwd_sums_finish_cpp(const BnActBackward& params) {
  dispatch_dtype<Half, BFloat16>(params.dtype, [&](auto tag) {
    finish_sums<accumulate_t<typename decltype(tag)::type>>(params);
  });
}

int64_t bn_act_bwd_units_cpp(const BnActBackward& params) { return plain_units(params); }

void bn_act_bwd_cpp(const BnActBackward& params, int64_t begin, int64_t end) {
  dispatch_dtype<Half, BFloat16>(params.dtype, [&](auto tag) {
    dispatch_bool(params.relu && params.mask == nullptr, [&](auto sign) {
      dispatch_bool(params.dbias != nullptr, [&](auto correction) {
        backward_units<typename decltype(tag)::type, sign(), correction()>(params, begin, end);
      });
    });
  });
}

}  // namespace accel_kernels
