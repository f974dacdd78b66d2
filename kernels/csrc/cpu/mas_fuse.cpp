// mas_fuse, C++ twin of the CUDA operator: same formulas, same partial sums, raw pointers.
// Free of torch; the bindings spread the work units over threads.

#include <algorithm>
#include <cstdint>
#include <type_traits>
#include <vector>

#include "common/clones.h"
#include "common/frame_window.h"
#include "common/host_math.h"
#include "common/host_reduce.h"
#include "common/project_row.h"
#include "cuda/mas_fuse.h"

namespace accel_kernels {
namespace {

constexpr int kForwardPixels = 64;  // of one forward work unit

// What all frames of a run of neighbouring pixels share: b and w with channels fastest, and the
// shares s0, s1 of motion and appearance.
template <typename scalar_t, int kRank>
struct Mixture {
  using acc_t = accumulate_t<scalar_t>;

  explicit Mixture(const MasFuseShape& of)
      : shape(of),
        b(size_t{kRank} * of.channels),
        w(size_t{3} * of.channels),
        s0(size_t{1} * pixels_per_run(of.channels) * of.channels),
        s1(s0.size()),
        wide_d(size_t{2} * of.channels) {
    const auto* columns_of_b = static_cast<const acc_t*>(of.b);
    const auto* taps = static_cast<const acc_t*>(of.w);
    for (int64_t c = 0; c < of.channels; ++c) {
      for (int j = 0; j < of.rank; ++j) b[j * of.channels + c] = columns_of_b[c * of.rank + j];
      for (int k = 0; k < 3; ++k) w[k * of.channels + c] = taps[3 * c + k];
    }
  }

  // Fills s0 and s1 for pixels [first, first + count) of clip n.
  ACCEL_INLINE void start(int64_t n, int first, int count) {
    const int channels = shape.channels;
    for (int i = 0; i < count; ++i) {
      const auto* narrow_d = static_cast<const scalar_t*>(shape.d) +
                             (n * shape.pixels + first + i) * int64_t{2} * channels;
      const acc_t* d = wide_row(narrow_d, wide_d.data(), 2 * channels);
      acc_t* __restrict motion = s0.data() + i * channels;
      acc_t* __restrict appearance = s1.data() + i * channels;
      for (int c = 0; c < channels; ++c) {
        const Sigmoid<acc_t> share = sigmoid(d[c] - d[channels + c]);
        motion[c] = share.value;
        appearance[c] = share.complement;
      }
    }
  }

  // m of one pixel of frame `frame` (counted over all clips), padded with zeros.
  ACCEL_INLINE void load_m(int64_t frame, int pixel, acc_t (&values)[kRank]) const {
    const auto* m =
        static_cast<const scalar_t*>(shape.m) + (frame * shape.pixels + pixel) * shape.rank;
    for (int j = 0; j < kRank; ++j) values[j] = j < shape.rank ? widen(m[j]) : acc_t{0};
  }

  const MasFuseShape& shape;
  std::vector<acc_t> b;   // [kRank, C]
  std::vector<acc_t> w;   // [3, C]
  std::vector<acc_t> s0;  // [run, C]
  std::vector<acc_t> s1;
  std::vector<acc_t> wide_d;  // [2, C]
};

// One pixel of frame t: completes out[t-1], of which `older` lacks the last tap.
template <int kRank, typename acc_t>
ACCEL_INLINE void forward_row(const acc_t* __restrict x, const acc_t (&m)[kRank],
                              const acc_t* __restrict s0, const acc_t* __restrict s1,
                              const acc_t* __restrict b, const acc_t* __restrict w,
                              acc_t* __restrict older, acc_t* __restrict newer,
                              acc_t* __restrict out, int channels) {
  const acc_t* __restrict second = w + channels;
  const acc_t* __restrict third = w + 2 * channels;
#pragma GCC ivdep
  for (int c = 0; c < channels; ++c) {
    acc_t y = m[0] * b[c];
    for (int j = 1; j < kRank; ++j) y += m[j] * b[j * channels + c];
    const acc_t q = s0[c] * y + s1[c] * x[c];
    out[c] = older[c] + third[c] * q;
    older[c] = newer[c] + second[c] * q;
    newer[c] = w[c] * q;
  }
}

template <typename scalar_t, int kRank>
ACCEL_CLONES void forward_units(const MasFuseForward& params, int64_t begin, int64_t end) {
  using acc_t = accumulate_t<scalar_t>;
  constexpr bool kInPlace = std::is_same_v<scalar_t, acc_t>;
  const int channels = params.channels;
  const int frames = params.frames;
  const int64_t frame_size = static_cast<int64_t>(params.pixels) * channels;
  const int pixel_units = divide_up(params.pixels, kForwardPixels);
  const int run_pixels = pixels_per_run(channels);
  const size_t run_elements = size_t{1} * run_pixels * channels;

  Mixture<scalar_t, kRank> mixture(params);
  std::vector<acc_t> older(run_elements);
  std::vector<acc_t> newer(run_elements);
  std::vector<acc_t> wide_x(run_elements);
  std::vector<acc_t> wide_out(run_elements);
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t n = unit / pixel_units;
    const int first = static_cast<int>(unit % pixel_units) * kForwardPixels;
    const int last = std::min(first + kForwardPixels, params.pixels);
    for (int p = first; p < last; p += run_pixels) {
      const int count = std::min(run_pixels, last - p);
      const int length = count * channels;
      mixture.start(n, p, count);
      std::fill_n(older.data(), length, acc_t{0});
      std::fill_n(newer.data(), length, acc_t{0});
      const int64_t run = n * frames * frame_size + static_cast<int64_t>(p) * channels;
      for (int t = 0; t < frames; ++t) {
        const auto* narrow_x = static_cast<const scalar_t*>(params.x) + run + t * frame_size;
        auto* narrow_out = static_cast<scalar_t*>(params.out) + run + (t - 1) * frame_size;
        const acc_t* x = wide_row(narrow_x, wide_x.data(), length);
        acc_t* out = wide_out.data();
        if constexpr (kInPlace) {
          if (t > 0) out = narrow_out;
        }
        for (int i = 0; i < count; ++i) {
          acc_t m[kRank];
          mixture.load_m(n * frames + t, p + i, m);
          const int at = i * channels;
          forward_row(x + at, m, mixture.s0.data() + at, mixture.s1.data() + at, mixture.b.data(),
                      mixture.w.data(), older.data() + at, newer.data() + at, out + at, channels);
        }
        if constexpr (!kInPlace) {
          if (t > 0) narrow_row(out, narrow_out, length);
        }
      }
      auto* final_out = static_cast<scalar_t*>(params.out) + run + (frames - 1) * frame_size;
      if constexpr (kInPlace) {
        std::copy_n(older.data(), length, final_out);
      } else {
        narrow_row(older.data(), final_out, length);
      }
    }
  }
}

// One pixel of one frame: dx, weighted = s0 h, and what belongs to ds (before s0 s1), dw and db.
template <int kRank, typename acc_t>
ACCEL_INLINE void backward_row(const acc_t* __restrict before, const acc_t* __restrict here,
                               const acc_t* __restrict after, const acc_t* __restrict x,
                               const acc_t (&m)[kRank], const acc_t* __restrict s0,
                               const acc_t* __restrict s1, const acc_t* __restrict b,
                               const acc_t* __restrict w, acc_t* __restrict dx,
                               acc_t* __restrict weighted, acc_t* __restrict ds,
                               acc_t* __restrict dw, acc_t* __restrict db, int channels) {
#pragma GCC ivdep
  for (int c = 0; c < channels; ++c) {
    acc_t y = m[0] * b[c];
    for (int j = 1; j < kRank; ++j) y += m[j] * b[j * channels + c];
    const acc_t h =
        w[c] * after[c] + w[channels + c] * here[c] + w[2 * channels + c] * before[c];
    const acc_t q = s0[c] * y + s1[c] * x[c];
    const acc_t motion = s0[c] * h;
    dx[c] = s1[c] * h;
    weighted[c] = motion;
    ds[c] += h * (y - x[c]);
    dw[c] += q * after[c];
    dw[channels + c] += q * here[c];
    dw[2 * channels + c] += q * before[c];
    for (int j = 0; j < kRank; ++j) db[j * channels + c] += m[j] * motion;
  }
}

template <typename acc_t>
ACCEL_INLINE void share_gradient_row(const acc_t* __restrict ds, const acc_t* __restrict s0,
                                     const acc_t* __restrict s1, acc_t* __restrict dd,
                                     int channels) {
  for (int c = 0; c < channels; ++c) {
    const acc_t value = s0[c] * s1[c] * ds[c];
    dd[c] = value;
    dd[channels + c] = -value;
  }
}

template <typename scalar_t, int kRank>
ACCEL_CLONES void backward_units(const MasFuseBackward& params, int64_t begin, int64_t end) {
  using acc_t = accumulate_t<scalar_t>;
  constexpr bool kInPlace = std::is_same_v<scalar_t, acc_t>;
  const int channels = params.channels;
  const int rank = params.rank;
  const int frames = params.frames;
  const int64_t frame_size = static_cast<int64_t>(params.pixels) * channels;
  const int pixel_units = divide_up(params.pixels, params.pixels_per_unit);
  const int run_pixels = pixels_per_run(channels);
  const size_t run_elements = size_t{1} * run_pixels * channels;

  Mixture<scalar_t, kRank> mixture(params);
  std::vector<acc_t> sums(size_t{3 + kRank} * channels);
  acc_t* dw = sums.data();
  acc_t* db = dw + 3 * channels;
  std::vector<acc_t> ds(run_elements);
  std::vector<acc_t> weighted(run_elements);
  std::vector<acc_t> wide_x(run_elements);
  std::vector<acc_t> wide_dx(run_elements);  // dx before narrowing, or when it is not wanted
  std::vector<acc_t> wide_dd(size_t{2} * channels);
  FrameWindow<scalar_t> grad(run_pixels * channels);
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t n = unit / pixel_units;
    const int first = static_cast<int>(unit % pixel_units) * params.pixels_per_unit;
    const int last = std::min(first + params.pixels_per_unit, params.pixels);
    std::fill(sums.begin(), sums.end(), acc_t{0});
    for (int p = first; p < last; p += run_pixels) {
      const int count = std::min(run_pixels, last - p);
      const int length = count * channels;
      mixture.start(n, p, count);
      std::fill_n(ds.data(), length, acc_t{0});
      const int64_t run = n * frames * frame_size + static_cast<int64_t>(p) * channels;
      grad.start(static_cast<const scalar_t*>(params.grad) + run, length, frame_size, frames, 0);
      for (int t = 0; t < frames; ++t, grad.advance()) {
        const int64_t offset = run + t * frame_size;
        const auto* narrow_x = static_cast<const scalar_t*>(params.x) + offset;
        const acc_t* x = wide_row(narrow_x, wide_x.data(), length);
        acc_t* dx = wide_dx.data();
        if constexpr (kInPlace) {
          if (params.dx != nullptr) dx = static_cast<scalar_t*>(params.dx) + offset;
        }
        for (int i = 0; i < count; ++i) {
          const int at = i * channels;
          acc_t m[kRank];
          mixture.load_m(n * frames + t, p + i, m);
          backward_row(grad.before + at, grad.here + at, grad.after + at, x + at, m,
                       mixture.s0.data() + at, mixture.s1.data() + at, mixture.b.data(),
                       mixture.w.data(), dx + at, weighted.data() + at, ds.data() + at, dw, db,
                       channels);
          if (params.dm == nullptr) continue;
          acc_t dm[kRank];
          project_row<kRank>(weighted.data() + at, mixture.b.data(), channels, dm);
          auto* target = static_cast<scalar_t*>(params.dm) +
                         ((n * frames + t) * params.pixels + p + i) * rank;
          for (int j = 0; j < rank; ++j) {
            target[j] = narrow(dm[j], static_cast<scalar_t*>(nullptr));
          }
        }
        if constexpr (!kInPlace) {
          if (params.dx != nullptr) {
            narrow_row(dx, static_cast<scalar_t*>(params.dx) + offset, length);
          }
        }
      }
      if (params.dd == nullptr) continue;
      for (int i = 0; i < count; ++i) {
        auto* target =
            static_cast<scalar_t*>(params.dd) + (n * params.pixels + p + i) * int64_t{2} * channels;
        acc_t* dd;
        if constexpr (kInPlace) {
          dd = target;
        } else {
          dd = wide_dd.data();
        }
        share_gradient_row(ds.data() + i * channels, mixture.s0.data() + i * channels,
                           mixture.s1.data() + i * channels, dd, channels);
        if constexpr (!kInPlace) narrow_row(dd, target, 2 * channels);
      }
    }

    auto* dw_target = static_cast<acc_t*>(params.dw_partial) + unit * channels * 3;
    auto* db_target = static_cast<acc_t*>(params.db_partial) + unit * channels * rank;
    for (int c = 0; c < channels; ++c) {
      for (int k = 0; k < 3; ++k) dw_target[3 * c + k] = dw[k * channels + c];
      for (int j = 0; j < rank; ++j) db_target[rank * c + j] = db[j * channels + c];
    }
  }
}

// Calls function(Tag<scalar_t>, integral constant). Code for the published ranks 1, 2, 4 and 8 in fp32
// only: it is what trains on CPUs, and every instance takes seconds to compile.
template <typename Function>
void dispatch(const MasFuseShape& shape, const Function& function) {
  dispatch_dtype<Half, BFloat16>(shape.dtype, [&](auto tag) {
    const auto call = [&](auto rank) { function(tag, rank); };
    if constexpr (std::is_same_v<typename decltype(tag)::type, float>) {
      dispatch_rank<1, 2, 4, 8, kMasFuseMaxRank>(shape.rank, call);
    } else {
      dispatch_rank<8, kMasFuseMaxRank>(shape.rank, call);
    }
  });
}

}  // namespace

int64_t mas_fuse_fwd_units_cpp(const MasFuseForward& params) {
  return int64_t{params.batch} * divide_up(params.pixels, kForwardPixels);
}

void mas_fuse_fwd_cpp(const MasFuseForward& params, int64_t begin, int64_t end) {
  dispatch(params, [&](auto tag, auto rank) {
    forward_units<typename decltype(tag)::type, rank()>(params, begin, end);
  });
}

void mas_fuse_bwd_cpp(const MasFuseBackward& params, int64_t begin, int64_t end) {
  dispatch(params, [&](auto tag, auto rank) {
    backward_units<typename decltype(tag)::type, rank()>(params, begin, end);
  });
}

void mas_fuse_bwd_finish_cpp(const MasFuseBackward& params) {
  const int64_t units = mas_fuse_bwd_units(params);
  if (units == 1) return;  // the partial sums are the sums
  dispatch_dtype<Half, BFloat16>(params.dtype, [&](auto tag) {
    using acc_t = accumulate_t<typename decltype(tag)::type>;
    const int64_t channels = params.channels;
    column_sum<acc_t>(params.dw_partial, params.dw, units, 3 * channels);
    column_sum<acc_t>(params.db_partial, params.db, units, params.rank * channels);
  });
}

}  // namespace accel_kernels
