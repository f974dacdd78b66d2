// deform_conv, C++ twin of the CUDA kernels: columns and their gradients, raw pointers. Free of
// torch; the bindings spread groups of frames over threads and run the GEMMs.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "common/clones.h"
#include "common/host_matrix.h"
#include "cuda/deform_conv.h"

namespace accel_kernels {
namespace {

// Where the k*k taps of one pixel sample.
template <typename T>
struct Taps {
  explicit Taps(int kernel)
      : row(kernel * kernel), column(row), y(row), x(row), cell(kernel * kernel) {
    for (int q = 0; q < kernel * kernel; ++q) {
      row[q] = static_cast<T>(q / kernel - kernel / 2);
      column[q] = static_cast<T>(q % kernel - kernel / 2);
    }
  }

  std::vector<T> row, column;  // of the regular grid, relative to the pixel
  std::vector<T> y, x;         // position between the upper left corner and the next ones, 0 to 1
  std::vector<int> cell;       // upper left corner, a pixel of the padded frame
};

template <typename T>
ACCEL_INLINE void place_taps(const DeformConvShape& shape, int i, int j, const T* __restrict offset,
                             Taps<T>* taps) {
  const int count = shape.kernel * shape.kernel;
  const auto height = static_cast<T>(shape.height);
  const auto width = static_cast<T>(shape.width);
  const T* __restrict rows = taps->row.data();
  const T* __restrict columns = taps->column.data();
  T* __restrict fraction_y = taps->y.data();
  T* __restrict fraction_x = taps->x.data();
  int* __restrict cell = taps->cell.data();
#pragma GCC ivdep
  for (int q = 0; q < count; ++q) {
    const T wanted_y = static_cast<T>(i) + rows[q] + offset[2 * q];
    const T wanted_x = static_cast<T>(j) + columns[q] + offset[2 * q + 1];
    // Also false for NaN.
    const bool inside = (wanted_y > -1) & (wanted_y < height) & (wanted_x > -1) & (wanted_x < width);
    const T y = inside ? wanted_y : height;  // two rows of zeros begin there
    const T x = inside ? wanted_x : T{0};
    const int cut_y = static_cast<int>(y);
    const int cut_x = static_cast<int>(x);
    const int top = cut_y - (y < static_cast<T>(cut_y) ? 1 : 0);  // floor
    const int left = cut_x - (x < static_cast<T>(cut_x) ? 1 : 0);
    fraction_y[q] = y - static_cast<T>(top);
    fraction_x[q] = x - static_cast<T>(left);
    cell[q] = (top + 1) * (shape.width + 2) + left + 1;
  }
}

// A vector of neighbouring channels; what remains of them is done one by one.
template <typename T>
using Pack = typename Lanes<T>::type;

// By reference: vectors as results would need another calling convention without AVX.
template <typename Value, typename T>
ACCEL_INLINE void load(const T* source, Value* value) {
  std::memcpy(value, source, sizeof(*value));
}
template <typename Value, typename T>
ACCEL_INLINE void store(T* target, const Value& value) {
  std::memcpy(target, &value, sizeof(value));
}
ACCEL_INLINE float sum(const Lanes<float>::type& p) {
  return ((p[0] + p[4]) + (p[2] + p[6])) + ((p[1] + p[5]) + (p[3] + p[7]));
}
ACCEL_INLINE double sum(const Lanes<double>::type& p) { return (p[0] + p[2]) + (p[1] + p[3]); }

// The shares of the four pixels around a sample.
template <typename T>
struct Shares {
  ACCEL_INLINE Shares(T y, T x)
      : upper_left((1 - y) * (1 - x)),
        upper_right((1 - y) * x),
        lower_left(y * (1 - x)),
        lower_right(y * x) {}
  T upper_left, upper_right, lower_left, lower_right;
};

// The four pixels around a sample: one channel of them or a vector of channels.
template <typename Value>
struct Pixels {
  template <typename T>
  ACCEL_INLINE Pixels(const T* upper, const T* lower, int channels) {
    load(upper, &upper_left);
    load(upper + channels, &upper_right);
    load(lower, &lower_left);
    load(lower + channels, &lower_right);
  }
  Value upper_left, upper_right, lower_left, lower_right;
};

template <typename Value, typename T>
ACCEL_INLINE void sample_some(const T* upper, const T* lower, int channels, const Shares<T>& shares,
                              T* out) {
  const Pixels<Value> pixels(upper, lower, channels);
  const Value above =
      shares.upper_left * pixels.upper_left + shares.upper_right * pixels.upper_right;
  const Value below =
      shares.lower_left * pixels.lower_left + shares.lower_right * pixels.lower_right;
  store(out, Value(above + below));
}

template <typename T>
ACCEL_INLINE void sample(const T* upper, const T* lower, T y, T x, T* out, int channels) {
  constexpr int kLanes = Lanes<T>::kCount;
  const Shares<T> shares(y, x);
  int c = 0;
  for (; c + kLanes <= channels; c += kLanes) {
    sample_some<Pack<T>>(upper + c, lower + c, channels, shares, out + c);
  }
  for (; c < channels; ++c) sample_some<T>(upper + c, lower + c, channels, shares, out + c);
}

// Products of the column's gradient with the four pixels, summed over channels.
template <typename Value>
struct Products {
  Value upper_left = {}, upper_right = {}, lower_left = {}, lower_right = {};

  // The gradient of the sample's position.
  template <typename T>
  ACCEL_INLINE void combine(T y, T x, Value* dy, Value* dx) const {
    *dy = (1 - x) * (lower_left - upper_left) + x * (lower_right - upper_right);
    *dx = (1 - y) * (upper_right - upper_left) + y * (lower_right - lower_left);
  }
};

template <typename Value, typename T>
ACCEL_INLINE void add_share(T* target, T share, const Value& g) {
  Value value;
  load(target, &value);
  store(target, Value(value + share * g));
}

template <typename Value, bool kWantDx, typename T>
ACCEL_INLINE void sample_gradient_some(const T* upper, const T* lower, T* dx_upper, T* dx_lower,
                                       int channels, const Shares<T>& shares, const T* dcolumn,
                                       Products<Value>* products) {
  const Pixels<Value> pixels(upper, lower, channels);
  Value g;
  load(dcolumn, &g);
  products->upper_left += g * pixels.upper_left;
  products->upper_right += g * pixels.upper_right;
  products->lower_left += g * pixels.lower_left;
  products->lower_right += g * pixels.lower_right;
  if constexpr (kWantDx) {
    add_share(dx_upper, shares.upper_left, g);
    add_share(dx_upper + channels, shares.upper_right, g);
    add_share(dx_lower, shares.lower_left, g);
    add_share(dx_lower + channels, shares.lower_right, g);
  }
}

// One sample's gradients: (dy, dx) of its position, and its share for each of four pixels.
template <bool kWantDx, typename T>
ACCEL_INLINE void sample_gradient(const T* upper, const T* lower, T* dx_upper, T* dx_lower, T y,
                                  T x, const T* dcolumn, int channels, T* position) {
  constexpr int kLanes = Lanes<T>::kCount;
  const Shares<T> shares(y, x);
  Products<Pack<T>> packed;
  Products<T> single;
  int c = 0;
  for (; c + kLanes <= channels; c += kLanes) {
    sample_gradient_some<Pack<T>, kWantDx>(upper + c, lower + c, dx_upper + c, dx_lower + c,
                                           channels, shares, dcolumn + c, &packed);
  }
  for (; c < channels; ++c) {
    sample_gradient_some<T, kWantDx>(upper + c, lower + c, dx_upper + c, dx_lower + c, channels,
                                     shares, dcolumn + c, &single);
  }
  Pack<T> dy, dx;
  packed.combine(y, x, &dy, &dx);
  single.combine(y, x, &position[0], &position[1]);
  position[0] += sum(dy);
  position[1] += sum(dx);
}

template <typename T>
ACCEL_CLONES void fill_columns(const DeformConvShape& shape, const T* padded, int first_frame,
                               int64_t begin_row, int64_t end_row, T* columns) {
  const int channels = shape.channels;
  const int count = shape.kernel * shape.kernel;
  const int64_t pixels = int64_t{shape.height} * shape.width;
  const int64_t row_step = (int64_t{shape.width} + 2) * channels;
  const T* offset = static_cast<const T*>(shape.offset) + first_frame * pixels * count * 2;
  Taps<T> taps(shape.kernel);
  for (int64_t row = begin_row; row < end_row; ++row) {
    const auto p = static_cast<int>(row % pixels);
    const T* frame = padded + row / pixels * deform_conv_padded_size(shape);
    place_taps(shape, p / shape.width, p % shape.width, offset + row * count * 2, &taps);
    for (int q = 0; q < count; ++q, columns += channels) {
      const T* upper = frame + int64_t{taps.cell[q]} * channels;
      sample(upper, upper + row_step, taps.y[q], taps.x[q], columns, channels);
    }
  }
}

template <typename T, bool kWantDx>
ACCEL_CLONES void add_gradients(const DeformConvShape& shape, const T* padded, int first_frame,
                                int64_t begin_row, int64_t end_row, const T* dcolumns, T* padded_dx,
                                T* doffset) {
  const int channels = shape.channels;
  const int count = shape.kernel * shape.kernel;
  const int64_t pixels = int64_t{shape.height} * shape.width;
  const int64_t row_step = (int64_t{shape.width} + 2) * channels;
  const int64_t first = first_frame * pixels * count * 2;
  const T* offset = static_cast<const T*>(shape.offset) + first;
  Taps<T> taps(shape.kernel);
  T unwanted[2];
  for (int64_t row = begin_row; row < end_row; ++row) {
    const auto p = static_cast<int>(row % pixels);
    const int64_t frame = row / pixels * deform_conv_padded_size(shape);
    place_taps(shape, p / shape.width, p % shape.width, offset + row * count * 2, &taps);
    for (int q = 0; q < count; ++q, dcolumns += channels) {
      const int64_t corner = frame + int64_t{taps.cell[q]} * channels;
      T* dx = kWantDx ? padded_dx + corner : nullptr;
      T* position = doffset == nullptr ? unwanted : doffset + first + (row * count + q) * 2;
      sample_gradient<kWantDx>(padded + corner, padded + corner + row_step, dx,
                                  kWantDx ? dx + row_step : nullptr, taps.y[q], taps.x[q], dcolumns,
                                  channels, position);
    }
  }
}

template <typename Function>
void dispatch_wide(DType dtype, const Function& function) {
  if (dtype == DType::kDouble) {
    function(double{});
  } else {
    function(float{});
  }
}

}  // namespace

void deform_conv_pad_cpp(const DeformConvShape& shape, int first_frame, int frames, void* padded) {
  dispatch_wide(shape.dtype, [&](auto zero) {
    using T = decltype(zero);
    const int64_t line = int64_t{shape.width} * shape.channels;
    const auto* source = static_cast<const T*>(shape.x) + first_frame * shape.height * line;
    auto* target = static_cast<T*>(padded);
    std::fill_n(target, frames * deform_conv_padded_size(shape), zero);
    for (int frame = 0; frame < frames; ++frame) {
      T* row = target + frame * deform_conv_padded_size(shape);
      for (int i = 0; i < shape.height; ++i, source += line) {
        row += line + 2 * shape.channels;
        std::copy_n(source, line, row + shape.channels);
      }
    }
  });
}

void deform_conv_crop_cpp(const DeformConvShape& shape, const void* padded_dx, int first_frame,
                          int frames, void* dx) {
  dispatch_wide(shape.dtype, [&](auto zero) {
    using T = decltype(zero);
    const int64_t line = int64_t{shape.width} * shape.channels;
    auto* target = static_cast<T*>(dx) + first_frame * shape.height * line;
    for (int frame = 0; frame < frames; ++frame) {
      const T* row = static_cast<const T*>(padded_dx) + frame * deform_conv_padded_size(shape);
      for (int i = 0; i < shape.height; ++i, target += line) {
        row += line + 2 * shape.channels;
        std::copy_n(row + shape.channels, line, target);
      }
    }
  });
}

void deform_conv_columns_cpp(const DeformConvShape& shape, const void* padded, int first_frame,
                             int64_t begin_row, int64_t end_row, void* columns) {
  dispatch_wide(shape.dtype, [&](auto zero) {
    using T = decltype(zero);
    fill_columns(shape, static_cast<const T*>(padded), first_frame, begin_row, end_row,
                 static_cast<T*>(columns));
  });
}

void deform_conv_gradient_cpp(const DeformConvShape& shape, const void* padded, int first_frame,
                              int64_t begin_row, int64_t end_row, const void* dcolumns,
                              void* padded_dx, void* doffset) {
  dispatch_wide(shape.dtype, [&](auto zero) {
    using T = decltype(zero);
    const auto add = padded_dx == nullptr ? add_gradients<T, false> : add_gradients<T, true>;
    add(shape, static_cast<const T*>(padded), first_frame, begin_row, end_row,
        static_cast<const T*>(dcolumns), static_cast<T*>(padded_dx), static_cast<T*>(doffset));
  });
}

}  // namespace accel_kernels
