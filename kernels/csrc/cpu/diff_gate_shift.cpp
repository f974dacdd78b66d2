// diff_gate_shift, C++ twin of the CUDA operator: same formulas, same kind of partial sums, raw
// pointers. Free of torch; the bindings spread the work units over threads.

#include "cuda/diff_gate_shift.h"

#include <algorithm>
#include <cstdint>
#include <type_traits>
#include <vector>

#include "common/clones.h"
#include "common/host_math.h"
#include "common/host_matrix.h"
#include "common/host_reduce.h"
#include "common/host_types.h"

namespace accel_kernels {
namespace {

// Work proceeds in tiles of one frame: 16 pixels x 64 channels, 4 KB in fp32. The coefficients of
// 64 channels stay in the L1 cache while all frames of the 16 pixels pass.
constexpr int kTilePixels = 16;
constexpr int kTileChannels = 64;
// Tiles 4096 bytes apart would share the lines of the cache.
constexpr int kTile = kTilePixels * kTileChannels + 64;
constexpr int kForwardPixels = 64;  // of one forward work unit

// Tiles and matrices have their rows padded with zeros to whole vectors.
template <typename acc_t>
constexpr int padded(int count) {
  return round_up(count, Lanes<acc_t>::kCount);
}

// target[p, :] = source[p, :], `count` values a row, zeros up to `width`.
template <typename scalar_t, typename acc_t>
ACCEL_INLINE void load_tile(const scalar_t* source, int64_t row, int rows, int count,
                            acc_t* target, int width) {
  for (int p = 0; p < rows; ++p, source += row, target += width) {
    if constexpr (std::is_same_v<scalar_t, acc_t>) {
      for (int i = 0; i < count; ++i) target[i] = source[i];
    } else {
      widen_row(source, target, count);
    }
    for (int i = count; i < width; ++i) target[i] = 0;
  }
}

template <typename scalar_t, typename acc_t>
ACCEL_INLINE void store_tile(const acc_t* source, int width, scalar_t* target, int64_t row,
                             int rows, int count) {
  for (int p = 0; p < rows; ++p, source += width, target += row) {
    if constexpr (std::is_same_v<scalar_t, acc_t>) {
      for (int i = 0; i < count; ++i) target[i] = source[i];
    } else {
      narrow_row(source, target, count);
    }
  }
}

// target[j, i] = source[i, j] for [rows, columns] values; target's rows are `stride` apart.
template <typename acc_t>
void transpose(const acc_t* source, int64_t rows, int64_t columns, acc_t* target, int64_t stride) {
  for (int64_t j = 0; j < columns; ++j) {
    for (int64_t i = 0; i < rows; ++i) target[j * stride + i] = source[i * columns + j];
  }
}

// m, c and w as the tiles read them.
template <typename acc_t>
struct Coefficients {
  Coefficients(const DiffGateShiftShape& shape, bool backward)
      : channels(padded<acc_t>(shape.channels)),
        rank(padded<acc_t>(shape.rank)),
        by_rank(size_t{2} * rank * channels),
        by_channel(backward ? by_rank.size() : 0),
        c(size_t{2} * channels),
        w(size_t{3} * channels) {
    for (int64_t side = 0; side < 2; ++side) {
      const auto* m = static_cast<const acc_t*>(shape.m) + side * shape.channels * shape.rank;
      transpose(m, shape.channels, shape.rank, by_rank.data() + side * rank * channels, channels);
      for (int i = 0; backward && i < shape.channels; ++i) {
        std::copy_n(m + int64_t{i} * shape.rank, shape.rank,
                    by_channel.data() + (side * channels + i) * rank);
      }
      std::copy_n(static_cast<const acc_t*>(shape.c) + side * shape.channels, shape.channels,
                  c.data() + side * channels);
    }
    transpose(static_cast<const acc_t*>(shape.w), shape.channels, 3, w.data(), channels);
  }

  int channels;  // C and r, padded
  int rank;
  std::vector<acc_t> by_rank;     // m as [2, r, C]
  std::vector<acc_t> by_channel;  // m as [2, C, r], for the backward pass
  std::vector<acc_t> c;           // [2, C]
  std::vector<acc_t> w;           // [3, C]
};

// z and v of all frames of a run of pixels: [2, frames, kTilePixels, r].
template <typename acc_t>
struct Differences {
  Differences(int frames, int rank)
      : frames(frames), rank(rank), values(size_t{2} * frames * kTilePixels * rank) {}

  template <typename scalar_t>
  ACCEL_INLINE void load(const DiffGateShiftShape& shape, int64_t position, int frames_here,
                         int rows) {
    const int64_t frame_size = int64_t{shape.pixels} * shape.rank;
    for (int side = 0; side < 2; ++side) {
      const auto* source =
          static_cast<const scalar_t*>(side == 0 ? shape.z : shape.v) + position * shape.rank;
      for (int t = 0; t < frames_here; ++t) {
        load_tile(source + t * frame_size, shape.rank, rows, shape.rank, tile(side, t), rank);
      }
    }
  }
  ACCEL_INLINE acc_t* tile(int side, int t) {
    return values.data() + (int64_t{side} * frames + t) * kTilePixels * rank;
  }

  int frames;
  int rank;
  std::vector<acc_t> values;
};

// What the sigmoids are taken of: f = m z + c for one tile of one side.
template <typename acc_t>
ACCEL_INLINE void preactivations(const Coefficients<acc_t>& coefficients, int side,
                                 const acc_t* z, int rank, int first_channel, int rows, int width,
                                 acc_t* f) {
  const acc_t* m = coefficients.by_rank.data() +
                   int64_t{side} * coefficients.rank * coefficients.channels + first_channel;
  const acc_t* c = coefficients.c.data() + int64_t{side} * coefficients.channels + first_channel;
  multiply_add<acc_t>({z, coefficients.rank}, {m, coefficients.channels}, {c, 0}, f, width,
                      round_up(rows, 4), rank, width);
}

// Two sigmoids for the price of one division.
template <typename acc_t>
ACCEL_INLINE void sigmoids(acc_t f, acc_t b, Sigmoid<acc_t>& of_f, Sigmoid<acc_t>& of_b) {
  const acc_t one = 1;
  const acc_t e0 = exp_nonpositive(-std::abs(f));
  const acc_t e1 = exp_nonpositive(-std::abs(b));
  const acc_t inverse = one / ((one + e0) * (one + e1));
  const acc_t larger0 = (one + e1) * inverse;
  const acc_t larger1 = (one + e0) * inverse;
  of_f = {f >= 0 ? larger0 : e0 * larger0, f >= 0 ? e0 * larger0 : larger0};
  of_b = {b >= 0 ? larger1 : e1 * larger1, b >= 0 ? e1 * larger1 : larger1};
}

template <typename acc_t>
ACCEL_INLINE void gate_tile(const acc_t* __restrict x, const acc_t* __restrict f,
                            const acc_t* __restrict b, acc_t* __restrict gated, int length) {
#pragma GCC ivdep
  for (int i = 0; i < length; ++i) {
    Sigmoid<acc_t> s0, s1;
    sigmoids(f[i], b[i], s0, s1);
    gated[i] = x[i] * (acc_t(0.5) + acc_t(0.5) * (s0.value + s1.value));
  }
}

template <typename acc_t>
ACCEL_INLINE void taps_row(const acc_t* __restrict before, const acc_t* __restrict here,
                           const acc_t* __restrict after, const acc_t* __restrict w, int stride,
                           acc_t* __restrict out, int width) {
  const acc_t* __restrict second = w + stride;
  const acc_t* __restrict third = w + 2 * stride;
#pragma GCC ivdep
  for (int i = 0; i < width; ++i) {
    out[i] = w[i] * before[i] + second[i] * here[i] + third[i] * after[i];
  }
}

template <typename scalar_t>
ACCEL_CLONES void forward_units(const DiffGateShiftForward& params, int64_t begin, int64_t end) {
  using acc_t = accumulate_t<scalar_t>;
  const int channels = params.channels;
  const int frames = params.frames;
  const int pixel_units = divide_up(params.pixels, kForwardPixels);
  const int64_t frame_size = static_cast<int64_t>(params.pixels) * channels;

  const Coefficients<acc_t> coefficients(params, false);
  Differences<acc_t> differences(frames, coefficients.rank);
  std::vector<acc_t> tiles(size_t{8} * kTile);  // zeros, x, f, b, y, then three gated
  acc_t* zeros = tiles.data();
  acc_t* x_tile = zeros + kTile;
  acc_t* f_tile = zeros + 2 * kTile;
  acc_t* b_tile = zeros + 3 * kTile;
  acc_t* y_tile = zeros + 4 * kTile;
  acc_t* ring = zeros + 5 * kTile;
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t n = unit / pixel_units;
    const int first = static_cast<int>(unit % pixel_units) * kForwardPixels;
    const int last = std::min(first + kForwardPixels, params.pixels);
    for (int p = first; p < last; p += kTilePixels) {
      const int rows = std::min(kTilePixels, last - p);
      const int64_t position = n * frames * params.pixels + p;
      differences.template load<scalar_t>(params, position, frames, rows);
      for (int c = 0; c < channels; c += kTileChannels) {
        const int count = std::min(kTileChannels, channels - c);
        const int width = padded<acc_t>(count);
        const auto* x = static_cast<const scalar_t*>(params.x) + position * channels + c;
        auto* y = static_cast<scalar_t*>(params.y) + position * channels + c;
        const acc_t* before = zeros;
        const acc_t* here = zeros;
        for (int t = 0; t <= frames; ++t) {  // frame t completes y[t-1]
          const acc_t* after = zeros;
          if (t < frames) {
            acc_t* gated = ring + t % 3 * kTile;
            load_tile(x + t * frame_size, channels, rows, count, x_tile, width);
            preactivations(coefficients, 0, differences.tile(0, t), params.rank, c, rows, width,
                           f_tile);
            preactivations(coefficients, 1, differences.tile(1, t), params.rank, c, rows, width,
                           b_tile);
            gate_tile(x_tile, f_tile, b_tile, gated, rows * width);
            after = gated;
          }
          if (t > 0) {
            for (int i = 0; i < rows * width; i += width) {
              taps_row(before + i, here + i, after + i, coefficients.w.data() + c,
                       coefficients.channels, y_tile + i, width);
            }
            store_tile(y_tile, width, y + (t - 1) * frame_size, channels, rows, count);
          }
          before = here;
          here = after;
        }
      }
    }
  }
}

// One pixel of one frame: dx, the gradients of f and b in their place, and what belongs to the sums
// dw ([3, C]) and dc ([2, C]), whose rows are `stride` apart.
template <typename acc_t>
ACCEL_INLINE void backward_row(const acc_t* __restrict before, const acc_t* __restrict here,
                               const acc_t* __restrict after, const acc_t* __restrict x,
                               const acc_t* __restrict w, int stride, acc_t* __restrict f,
                               acc_t* __restrict b, acc_t* __restrict dx, acc_t* __restrict dw,
                               acc_t* __restrict dc, int width) {
  const acc_t* __restrict w_second = w + stride;
  const acc_t* __restrict w_third = w + 2 * stride;
  acc_t* __restrict dw_second = dw + stride;
  acc_t* __restrict dw_third = dw + 2 * stride;
  acc_t* __restrict dc_second = dc + stride;
#pragma GCC ivdep
  for (int i = 0; i < width; ++i) {
    const acc_t h = w[i] * after[i] + w_second[i] * here[i] + w_third[i] * before[i];
    Sigmoid<acc_t> s0, s1;
    sigmoids(f[i], b[i], s0, s1);
    const acc_t gate = acc_t(0.5) + acc_t(0.5) * (s0.value + s1.value);
    const acc_t half = acc_t(0.5) * h * x[i];
    const acc_t gated = x[i] * gate;
    const acc_t df = half * (s0.value * s0.complement);
    const acc_t db = half * (s1.value * s1.complement);
    dx[i] = h * gate;
    f[i] = df;
    b[i] = db;
    dc[i] += df;
    dc_second[i] += db;
    dw[i] += gated * after[i];
    dw_second[i] += gated * here[i];
    dw_third[i] += gated * before[i];
  }
}

template <typename scalar_t>
ACCEL_CLONES void backward_units(const DiffGateShiftBackward& params, int64_t begin, int64_t end) {
  using acc_t = accumulate_t<scalar_t>;
  constexpr int kFrames = DiffGateShiftUnits::kFramesPerUnit;
  const int channels = params.channels;
  const int rank = params.rank;
  const int64_t frame_size = static_cast<int64_t>(params.pixels) * channels;
  const DiffGateShiftUnits units(params, params.items_per_unit);

  const Coefficients<acc_t> coefficients(params, true);
  const int wide_channels = coefficients.channels;
  const int wide_rank = coefficients.rank;
  Differences<acc_t> differences(kFrames, wide_rank);
  Differences<acc_t> gradients(kFrames, wide_rank);  // dz and dv
  std::vector<acc_t> dm(size_t{2} * wide_rank * wide_channels);  // [2, r, C]
  std::vector<acc_t> dc(size_t{2} * wide_channels);
  std::vector<acc_t> dw(size_t{3} * wide_channels);
  std::vector<acc_t> tiles(size_t{8} * kTile);  // zeros, x, f, b, dx, then three of grad
  acc_t* zeros = tiles.data();
  acc_t* x_tile = zeros + kTile;
  acc_t* side_tiles[2] = {zeros + 2 * kTile, zeros + 3 * kTile};
  acc_t* dx_tile = zeros + 4 * kTile;
  acc_t* ring = zeros + 5 * kTile;

  for (int64_t unit = begin; unit < end; ++unit) {
    std::fill(dm.begin(), dm.end(), acc_t{0});
    std::fill(dc.begin(), dc.end(), acc_t{0});
    std::fill(dw.begin(), dw.end(), acc_t{0});
    const int64_t last_item = std::min((unit + 1) * params.items_per_unit, units.items);
    int rows = 0;
    for (int64_t item = unit * params.items_per_unit; item < last_item; item += rows) {
      const int p = static_cast<int>(item % params.pixels);
      const int first = static_cast<int>(item / params.pixels % units.frame_units) * kFrames;
      const int64_t n = item / params.pixels / units.frame_units;
      const int count_frames = std::min(kFrames, params.frames - first);
      rows = static_cast<int>(
          std::min<int64_t>({kTilePixels, params.pixels - p, last_item - item}));
      const int64_t position = (n * params.frames + first) * params.pixels + p;
      differences.template load<scalar_t>(params, position, count_frames, rows);
      std::fill(gradients.values.begin(), gradients.values.end(), acc_t{0});

      for (int c = 0; c < channels; c += kTileChannels) {
        const int count = std::min(kTileChannels, channels - c);
        const int width = padded<acc_t>(count);
        const auto* x = static_cast<const scalar_t*>(params.x) + position * channels + c;
        const auto* grad = static_cast<const scalar_t*>(params.grad) + position * channels + c;
        auto* dx = static_cast<scalar_t*>(params.dx) + position * channels + c;
        const acc_t* before = zeros;
        if (first > 0) {
          load_tile(grad - frame_size, channels, rows, count, ring + 2 * kTile, width);
          before = ring + 2 * kTile;
        }
        load_tile(grad, channels, rows, count, ring, width);
        const acc_t* here = ring;
        for (int s = 0; s < count_frames; ++s) {
          const acc_t* after = zeros;
          if (first + s + 1 < params.frames) {
            acc_t* tile = ring + (s + 1) % 3 * kTile;
            load_tile(grad + (s + 1) * frame_size, channels, rows, count, tile, width);
            after = tile;
          }
          load_tile(x + s * frame_size, channels, rows, count, x_tile, width);
          for (int side = 0; side < 2; ++side) {
            preactivations(coefficients, side, differences.tile(side, s), rank, c, rows, width,
                           side_tiles[side]);
          }
          for (int i = 0; i < rows * width; i += width) {
            backward_row(before + i, here + i, after + i, x_tile + i, coefficients.w.data() + c,
                         wide_channels, side_tiles[0] + i, side_tiles[1] + i, dx_tile + i,
                         dw.data() + c, dc.data() + c, width);
          }
          store_tile(dx_tile, width, dx + s * frame_size, channels, rows, count);
          for (int side = 0; side < 2; ++side) {
            const acc_t* df = side_tiles[side];
            acc_t* dm_tile = dm.data() + int64_t{side} * wide_rank * wide_channels + c;
            multiply_add<acc_t>({differences.tile(side, s), 1, wide_rank}, {df, width},
                                {dm_tile, wide_channels}, dm_tile, wide_channels, wide_rank, rows,
                                width);
            const acc_t* m = coefficients.by_channel.data() +
                             (int64_t{side} * wide_channels + c) * wide_rank;
            acc_t* dz_tile = gradients.tile(side, s);
            multiply_add<acc_t>({df, width}, {m, wide_rank}, {dz_tile, wide_rank}, dz_tile,
                                wide_rank, round_up(rows, 4), width, wide_rank);
          }
          before = here;
          here = after;
        }
      }
      for (int side = 0; side < 2; ++side) {
        auto* dz = static_cast<scalar_t*>(side == 0 ? params.dz : params.dv) + position * rank;
        for (int s = 0; s < count_frames; ++s) {
          store_tile(gradients.tile(side, s), wide_rank, dz + int64_t{s} * params.pixels * rank,
                     rank, rows, rank);
        }
      }
    }

    auto* dm_row = static_cast<acc_t*>(params.dm_partial) + unit * 2 * channels * rank;
    auto* dc_row = static_cast<acc_t*>(params.dc_partial) + unit * 2 * channels;
    auto* dw_row = static_cast<acc_t*>(params.dw_partial) + unit * 3 * channels;
    for (int64_t side = 0; side < 2; ++side) {
      const acc_t* sums = dm.data() + side * wide_rank * wide_channels;
      for (int j = 0; j < rank; ++j) {
        for (int i = 0; i < channels; ++i) {
          dm_row[(side * channels + i) * rank + j] = sums[int64_t{j} * wide_channels + i];
        }
      }
      std::copy_n(dc.data() + side * wide_channels, channels, dc_row + side * channels);
    }
    for (int k = 0; k < 3; ++k) {
      for (int i = 0; i < channels; ++i) dw_row[3 * i + k] = dw[int64_t{k} * wide_channels + i];
    }
  }
}

}  // namespace

int64_t diff_gate_shift_fwd_units_cpp(const DiffGateShiftForward& params) {
  return int64_t{params.batch} * divide_up(params.pixels, kForwardPixels);
}

void diff_gate_shift_fwd_cpp(const DiffGateShiftForward& params, int64_t begin, int64_t end) {
  dispatch_dtype<Half, BFloat16>(params.dtype, [&](auto tag) {
    forward_units<typename decltype(tag)::type>(params, begin, end);
  });
}

void diff_gate_shift_bwd_cpp(const DiffGateShiftBackward& params, int64_t begin, int64_t end) {
  dispatch_dtype<Half, BFloat16>(params.dtype, [&](auto tag) {
    backward_units<typename decltype(tag)::type>(params, begin, end);
  });
}

void diff_gate_shift_bwd_finish_cpp(const DiffGateShiftBackward& params) {
  const int64_t rows = DiffGateShiftUnits(params, params.items_per_unit).count;
  if (rows == 1) return;
  const int64_t channels = params.channels;
  dispatch_dtype<Half, BFloat16>(params.dtype, [&](auto tag) {
    using acc_t = accumulate_t<typename decltype(tag)::type>;
    column_sum<acc_t>(params.dm_partial, params.dm, rows, 2 * channels * params.rank);
    column_sum<acc_t>(params.dc_partial, params.dc, rows, 2 * channels);
    column_sum<acc_t>(params.dw_partial, params.dw, rows, 3 * channels);
  });
}

}  // namespace accel_kernels
