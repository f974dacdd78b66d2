// temporal_taps, C++ twin of the CUDA operator: same formulas, same partial sums, raw pointers.
// Free of torch; the bindings spread the work units over threads.

#include <algorithm>
#include <cstdint>
#include <type_traits>
#include <vector>

#include "common/clones.h"
#include "common/frame_window.h"
#include "common/host_reduce.h"
#include "cuda/temporal_taps.h"

namespace accel_kernels {
namespace {

constexpr int kForwardPixels = 64;  // of one forward work unit: long enough to reuse the taps

// [3, C] from w's [C, 3], so that the loops over channels read neighbouring values.
template <typename acc_t>
void transpose_taps(const TemporalTapsShape& shape, int64_t n, acc_t* taps) {
  const int channels = shape.channels;
  const auto* w =
      static_cast<const acc_t*>(shape.w) + (shape.w_per_sample ? n * channels * 3 : int64_t{0});
  for (int c = 0; c < channels; ++c) {
    for (int k = 0; k < 3; ++k) taps[k * channels + c] = w[3 * c + k];
  }
}

// coefficients[t, k, c]: what y[t] multiplies x[t+k-1] by. One frame (t = 0) if there is no a.
template <typename acc_t>
void fill_coefficients(const TemporalTapsForward& params, int64_t n, const acc_t* taps,
                       acc_t* coefficients) {
  const int channels = params.channels;
  const auto* a = static_cast<const acc_t*>(params.a);
  const int rows = a == nullptr ? 1 : params.frames;
  for (int t = 0; t < rows; ++t) {
    for (int k = 0; k < 3; ++k) {
      acc_t* row = coefficients + (int64_t{3} * t + k) * channels;
      const acc_t* tap = taps + (params.transposed ? 2 - k : k) * channels;
      const int frame = params.transposed ? t : t + k - 1;
      if (a == nullptr) {
        std::copy_n(tap, channels, row);
      } else if (frame < 0 || frame >= params.frames) {
        std::fill_n(row, channels, acc_t{0});
      } else {
        const acc_t* gate = a + (n * params.frames + frame) * channels;
        for (int c = 0; c < channels; ++c) row[c] = tap[c] * gate[c];
      }
    }
  }
}

template <typename acc_t>
ACCEL_INLINE void stencil_row(const acc_t* __restrict before, const acc_t* __restrict here,
                        const acc_t* __restrict after, const acc_t* __restrict coefficients,
                        acc_t* __restrict out, int channels) {
  const acc_t* __restrict first = coefficients;
  const acc_t* __restrict second = coefficients + channels;
  const acc_t* __restrict third = coefficients + 2 * channels;
#pragma GCC ivdep
  for (int c = 0; c < channels; ++c) {
    out[c] = first[c] * before[c] + second[c] * here[c] + third[c] * after[c];
  }
}

template <typename scalar_t>
ACCEL_CLONES void forward_units(const TemporalTapsForward& params, int64_t begin, int64_t end) {
  using acc_t = accumulate_t<scalar_t>;
  constexpr bool kInPlace = std::is_same_v<scalar_t, acc_t>;
  const int channels = params.channels;
  const int64_t frame_size = static_cast<int64_t>(params.pixels) * channels;
  const int pixel_units = divide_up(params.pixels, kForwardPixels);
  const int64_t coefficient_step = params.a == nullptr ? 0 : int64_t{3} * channels;
  const int run_pixels = pixels_per_run(channels);

  std::vector<acc_t> taps(size_t{3} * channels);
  std::vector<acc_t> coefficients(size_t{3} * channels * (params.a ? params.frames : 1));
  std::vector<acc_t> wide_y(size_t{1} * run_pixels * channels);
  FrameWindow<scalar_t> x(run_pixels * channels);
  int64_t prepared = -1;
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t n = unit / pixel_units;
    if (n != prepared) {
      transpose_taps(params, n, taps.data());
      fill_coefficients(params, n, taps.data(), coefficients.data());
      prepared = n;
    }
    const int first = static_cast<int>(unit % pixel_units) * kForwardPixels;
    const int last = std::min(first + kForwardPixels, params.pixels);
    for (int p = first; p < last; p += run_pixels) {
      const int length = std::min(run_pixels, last - p) * channels;
      const int64_t run = n * params.frames * frame_size + static_cast<int64_t>(p) * channels;
      x.start(static_cast<const scalar_t*>(params.x) + run, length, frame_size, params.frames, 0);
      for (int t = 0; t < params.frames; ++t, x.advance()) {
        auto* y = static_cast<scalar_t*>(params.y) + run + t * frame_size;
        acc_t* out;
        if constexpr (kInPlace) {
          out = y;
        } else {
          out = wide_y.data();
        }
        const acc_t* row = coefficients.data() + t * coefficient_step;
        for (int i = 0; i < length; i += channels) {
          stencil_row(x.before + i, x.here + i, x.after + i, row, out + i, channels);
        }
        if constexpr (!kInPlace) narrow_row(out, y, length);
      }
    }
  }
}

// One frame of one pixel: dx, and the products that belong to the sums dw ([3, C]) and da.
template <typename acc_t>
ACCEL_INLINE void backward_row(const acc_t* __restrict before, const acc_t* __restrict here,
                         const acc_t* __restrict after, const acc_t* __restrict x,
                         const acc_t* __restrict taps, const acc_t* __restrict a,
                         acc_t* __restrict dx, acc_t* __restrict dw, acc_t* __restrict da,
                         int channels) {
  acc_t* __restrict dw_second = dw + channels;
  acc_t* __restrict dw_third = dw + 2 * channels;
#pragma GCC ivdep
  for (int c = 0; c < channels; ++c) {
    const acc_t h =
        taps[c] * after[c] + taps[channels + c] * here[c] + taps[2 * channels + c] * before[c];
    const acc_t z = a[c] * x[c];
    dx[c] = a[c] * h;
    da[c] += x[c] * h;
    dw[c] += z * after[c];
    dw_second[c] += z * here[c];
    dw_third[c] += z * before[c];
  }
}

template <typename scalar_t>
ACCEL_CLONES void backward_units(const TemporalTapsBackward& params, int64_t begin, int64_t end) {
  using acc_t = accumulate_t<scalar_t>;
  constexpr bool kInPlace = std::is_same_v<scalar_t, acc_t>;
  const int channels = params.channels;
  const int64_t frame_size = static_cast<int64_t>(params.pixels) * channels;
  const TemporalTapsUnits units(params);
  const auto* a = static_cast<const acc_t*>(params.a);
  const int64_t a_step = a == nullptr ? 0 : channels;
  const int64_t da_step = params.da_partial == nullptr ? 0 : channels;

  const int run_pixels = pixels_per_run(channels);
  const size_t run_elements = size_t{1} * run_pixels * channels;

  const std::vector<acc_t> ones(channels, acc_t{1});
  std::vector<acc_t> taps(size_t{3} * channels);
  std::vector<acc_t> dw(size_t{3} * channels);
  std::vector<acc_t> unwanted_da(channels);
  std::vector<acc_t> wide_x(run_elements);
  std::vector<acc_t> wide_dx(run_elements);  // dx before narrowing, or when it is not wanted
  FrameWindow<scalar_t> grad(run_pixels * channels);
  for (int64_t unit = begin; unit < end; ++unit) {
    const int pixel_unit = static_cast<int>(unit % units.pixel_units);
    const int frame_unit = static_cast<int>(unit / units.pixel_units % units.frame_units);
    const int64_t n = unit / units.pixel_units / units.frame_units;
    const int first_frame = frame_unit * kFramesPerUnit;
    const int last_frame = std::min(first_frame + kFramesPerUnit, params.frames);
    const int first = pixel_unit * params.pixels_per_unit;
    const int last = std::min(first + params.pixels_per_unit, params.pixels);

    transpose_taps(params, n, taps.data());
    std::fill(dw.begin(), dw.end(), acc_t{0});
    acc_t* da = unwanted_da.data();
    if (params.da_partial != nullptr) {
      const int64_t row = (pixel_unit * int64_t{params.batch} + n) * params.frames + first_frame;
      da = static_cast<acc_t*>(params.da_partial) + row * channels;
      std::fill_n(da, int64_t{last_frame - first_frame} * channels, acc_t{0});
    }
    const acc_t* gates =
        a == nullptr ? ones.data() : a + (n * params.frames + first_frame) * channels;

    for (int p = first; p < last; p += run_pixels) {
      const int length = std::min(run_pixels, last - p) * channels;
      const int64_t run = n * params.frames * frame_size + static_cast<int64_t>(p) * channels;
      grad.start(static_cast<const scalar_t*>(params.grad) + run, length, frame_size,
                 params.frames, first_frame);
      for (int s = first_frame; s < last_frame; ++s, grad.advance()) {
        const int64_t offset = run + s * frame_size;
        const auto* narrow_x = static_cast<const scalar_t*>(params.x) + offset;
        const acc_t* x;
        acc_t* dx = wide_dx.data();
        if constexpr (kInPlace) {
          x = narrow_x;
          if (params.dx != nullptr) dx = static_cast<scalar_t*>(params.dx) + offset;
        } else {
          widen_row(narrow_x, wide_x.data(), length);
          x = wide_x.data();
        }
        for (int i = 0; i < length; i += channels) {
          backward_row(grad.before + i, grad.here + i, grad.after + i, x + i, taps.data(),
                       gates + (s - first_frame) * a_step, dx + i, dw.data(),
                       da + (s - first_frame) * da_step, channels);
        }
        if constexpr (!kInPlace) {
          if (params.dx != nullptr) {
            narrow_row(dx, static_cast<scalar_t*>(params.dx) + offset, length);
          }
        }
      }
    }

    const int64_t row = static_cast<int64_t>(frame_unit) * units.pixel_units + pixel_unit;
    auto* dw_target =
        static_cast<acc_t*>(params.dw_partial) + (row * params.batch + n) * channels * 3;
    for (int c = 0; c < channels; ++c) {
      for (int k = 0; k < 3; ++k) dw_target[3 * c + k] = dw[k * channels + c];
    }
  }
}

}  // namespace

int64_t temporal_taps_fwd_units_cpp(const TemporalTapsForward& params) {
  return int64_t{params.batch} * divide_up(params.pixels, kForwardPixels);
}

void temporal_taps_fwd_cpp(const TemporalTapsForward& params, int64_t begin, int64_t end) {
  dispatch_dtype<Half, BFloat16>(params.dtype, [&](auto tag) {
    forward_units<typename decltype(tag)::type>(params, begin, end);
  });
}

void temporal_taps_bwd_cpp(const TemporalTapsBackward& params, int64_t begin, int64_t end) {
  dispatch_dtype<Half, BFloat16>(params.dtype, [&](auto tag) {
    backward_units<typename decltype(tag)::type>(params, begin, end);
  });
}

void temporal_taps_bwd_finish_cpp(const TemporalTapsBackward& params) {
  const TemporalTapsUnits units(params);
  dispatch_dtype<Half, BFloat16>(params.dtype, [&](auto tag) {
    using acc_t = accumulate_t<typename decltype(tag)::type>;
    if (params.dw_partial != params.dw) {
      column_sum<acc_t>(params.dw_partial, params.dw, units.dw_rows, units.dw_columns);
    }
    if (params.da_partial != params.da) {
      column_sum<acc_t>(params.da_partial, params.da, units.pixel_units, units.da_columns);
    }
  });
}

}  // namespace accel_kernels
