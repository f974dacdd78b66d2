// mas_fuse, C++ twin of the CUDA operator: same formulas, same partial sums, raw pointers.
// Free of torch; the bindings spread the work units over threads.

#include <algorithm>
#include <cstdint>
#include <type_traits>
#include <vector>

#include "common/clones.h"
#include "common/host_math.h"
#include "common/host_reduce.h"
#include "common/lanes.h"
#include "cuda/mas_fuse.h"

namespace accel_kernels {
namespace {

constexpr int kForwardPixels = 64;  // of one forward work unit: long enough to reuse b and w

// Four cache lines ahead of `place`. The loops over frames read as many places at once as there
// are frames, often a multiple of 4096 bytes apart, which hardware prefetchers do not follow: this
// saves a quarter of the time.
ACCEL_INLINE void prefetch(const void* place) {
  __builtin_prefetch(static_cast<const char*>(place) + 256);
}

template <typename acc_t>
ACCEL_INLINE void share_row(const acc_t* __restrict d, acc_t* __restrict s0, acc_t* __restrict s1,
                            int channels) {
#pragma GCC ivdep
  for (int c = 0; c < channels; ++c) {
    const Sigmoid<acc_t> share = sigmoid(d[c] - d[channels + c]);
    s0[c] = share.value;
    s1[c] = share.complement;
  }
}

// The small operands of one pixel in the arithmetic type, channels fastest. Rows of channels have
// `stride` elements, whole vectors; zeros fill them, and the ranks up to kRank.
template <typename scalar_t, int kRank>
struct Operands {
  using acc_t = accumulate_t<scalar_t>;

  explicit Operands(const MasFuseShape& of)
      : shape(of),
        stride(divide_up(of.channels, Lanes<acc_t>::kCount) * Lanes<acc_t>::kCount),
        w(size_t{3} * stride),
        b(size_t{kRank} * stride),
        s0(stride),
        s1(stride),
        m(size_t{kRank} * of.frames),
        wide_d(size_t{2} * of.channels) {
    const auto* taps = static_cast<const acc_t*>(of.w);
    const auto* columns = static_cast<const acc_t*>(of.b);
    for (int64_t c = 0; c < of.channels; ++c) {
      for (int k = 0; k < 3; ++k) w[k * stride + c] = taps[3 * c + k];
      for (int j = 0; j < of.rank; ++j) b[j * stride + c] = columns[c * of.rank + j];
    }
  }

  ACCEL_INLINE void load_pixel(int64_t n, int64_t p) {
    const auto* d =
        static_cast<const scalar_t*>(shape.d) + (n * shape.pixels + p) * 2 * shape.channels;
    share_row(wide_row(d, wide_d.data(), 2 * shape.channels), s0.data(), s1.data(),
              shape.channels);
    for (int64_t t = 0; t < shape.frames; ++t) {
      const auto* values = static_cast<const scalar_t*>(shape.m) +
                           ((n * shape.frames + t) * shape.pixels + p) * shape.rank;
      for (int j = 0; j < shape.rank; ++j) m[t * kRank + j] = widen(values[j]);
    }
  }

  const MasFuseShape& shape;
  int64_t stride;
  std::vector<acc_t> w;   // [3, stride]
  std::vector<acc_t> b;   // [kRank, stride]
  std::vector<acc_t> s0;  // [stride], of the pixel that was loaded: the share of motion
  std::vector<acc_t> s1;  // and of x
  std::vector<acc_t> m;   // [T, kRank], of the pixel that was loaded
  std::vector<acc_t> wide_d;
};

// One pixel of one clip, all frames, the channels of one vector (`count` of them unless kFull) from
// `c` on. Everything but x and out stays in registers.
template <bool kFull, typename scalar_t, int kRank>
ACCEL_INLINE void forward_block(const Operands<scalar_t, kRank>& operands, const scalar_t* x,
                                scalar_t* out, int64_t frame_size, int c, int count) {
  using acc_t = accumulate_t<scalar_t>;
  using Vector = typename Lanes<acc_t>::type;
  Vector w[3], b[kRank], s0, s1;
  for (int k = 0; k < 3; ++k) load_lanes<true>(&operands.w[k * operands.stride + c], 0, w[k]);
  for (int j = 0; j < kRank; ++j) load_lanes<true>(&operands.b[j * operands.stride + c], 0, b[j]);
  load_lanes<true>(&operands.s0[c], 0, s0);
  load_lanes<true>(&operands.s1[c], 0, s1);
  const acc_t* m = operands.m.data();
  const int frames = operands.shape.frames;

  // Frame t completes out[t-1]: two running sums replace a window of three frames.
  Vector older = {};  // out[t-1] without its last tap
  Vector newer = {};  // out[t] with its first tap only
  for (int t = 0; t < frames; ++t) {
    Vector here;
    load_lanes<kFull>(x + c + t * frame_size, count, here);
    prefetch(x + c + t * frame_size);
    prefetch(out + c + t * frame_size);
    Vector y = m[t * kRank] * b[0];
    for (int j = 1; j < kRank; ++j) y += m[t * kRank + j] * b[j];
    const Vector q = s0 * y + s1 * here;
    older += w[2] * q;
    if (t > 0) store_lanes<kFull>(older, out + c + (t - 1) * frame_size, count);
    older = newer + w[1] * q;
    newer = w[0] * q;
  }
  store_lanes<kFull>(older, out + c + (frames - 1) * frame_size, count);
}

template <typename scalar_t, int kRank>
ACCEL_CLONES void forward_units(const MasFuseForward& params, int64_t begin, int64_t end) {
  constexpr int kLanes = Lanes<accumulate_t<scalar_t>>::kCount;
  const int channels = params.channels;
  const int64_t frame_size = static_cast<int64_t>(params.pixels) * channels;
  const int pixel_units = divide_up(params.pixels, kForwardPixels);
  Operands<scalar_t, kRank> operands(params);
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t n = unit / pixel_units;
    const int first = static_cast<int>(unit % pixel_units) * kForwardPixels;
    const int last = std::min(first + kForwardPixels, params.pixels);
    for (int p = first; p < last; ++p) {
      operands.load_pixel(n, p);
      const int64_t offset = n * params.frames * frame_size + static_cast<int64_t>(p) * channels;
      const auto* x = static_cast<const scalar_t*>(params.x) + offset;
      auto* out = static_cast<scalar_t*>(params.out) + offset;
      int c = 0;
      for (; c + kLanes <= channels; c += kLanes) {
        forward_block<true>(operands, x, out, frame_size, c, kLanes);
      }
      if (c < channels) forward_block<false>(operands, x, out, frame_size, c, channels - c);
    }
  }
}

// What backward_block reads and writes of one pixel, each at its first frame and channel.
template <typename scalar_t>
struct BackwardPixel {
  using acc_t = accumulate_t<scalar_t>;
  const scalar_t* x;
  const scalar_t* grad;
  scalar_t* dx;  // or null
  scalar_t* dd;  // [2, C], or null
  acc_t* dm;  // [T, kRank, lanes], to be added to and then summed over lanes
  acc_t* dw;  // [3, stride], to be added to
  acc_t* db;  // [kRank, stride], to be added to
};

// The backward of forward_block.
template <bool kFull, typename scalar_t, int kRank>
ACCEL_INLINE void backward_block(const Operands<scalar_t, kRank>& operands,
                                 const BackwardPixel<scalar_t>& pixel, int64_t frame_size, int c,
                                 int count) {
  using acc_t = accumulate_t<scalar_t>;
  using Vector = typename Lanes<acc_t>::type;
  const int64_t stride = operands.stride;
  Vector w[3], b[kRank], s0, s1, dw[3], db[kRank];
  for (int k = 0; k < 3; ++k) {
    load_lanes<true>(&operands.w[k * stride + c], 0, w[k]);
    load_lanes<true>(pixel.dw + k * stride + c, 0, dw[k]);
  }
  for (int j = 0; j < kRank; ++j) {
    load_lanes<true>(&operands.b[j * stride + c], 0, b[j]);
    load_lanes<true>(pixel.db + j * stride + c, 0, db[j]);
  }
  load_lanes<true>(&operands.s0[c], 0, s0);
  load_lanes<true>(&operands.s1[c], 0, s1);
  const acc_t* m = operands.m.data();
  const int frames = operands.shape.frames;

  Vector ds = {};
  Vector before = {};
  Vector here;
  load_lanes<kFull>(pixel.grad + c, count, here);
  for (int t = 0; t < frames; ++t) {
    Vector after = {};
    if (t + 1 < frames) load_lanes<kFull>(pixel.grad + c + (t + 1) * frame_size, count, after);
    Vector x;
    load_lanes<kFull>(pixel.x + c + t * frame_size, count, x);
    prefetch(pixel.x + c + t * frame_size);
    prefetch(pixel.grad + c + t * frame_size);
    Vector y = m[t * kRank] * b[0];
    for (int j = 1; j < kRank; ++j) y += m[t * kRank + j] * b[j];
    const Vector h = w[0] * after + w[1] * here + w[2] * before;
    const Vector q = s0 * y + s1 * x;
    dw[0] += q * after;
    dw[1] += q * here;
    dw[2] += q * before;
    ds += h * (y - x);
    const Vector dy = s0 * h;
    for (int j = 0; j < kRank; ++j) {
      db[j] += m[t * kRank + j] * dy;
      acc_t* target = pixel.dm + (t * kRank + j) * Lanes<acc_t>::kCount;
      Vector dm;
      load_lanes<true>(target, 0, dm);
      dm += b[j] * dy;
      store_lanes<true>(dm, target, 0);
    }
    if (pixel.dx != nullptr) {
      const Vector dx = s1 * h;
      prefetch(pixel.dx + c + t * frame_size);
      store_lanes<kFull>(dx, pixel.dx + c + t * frame_size, count);
    }
    before = here;
    here = after;
  }

  for (int k = 0; k < 3; ++k) store_lanes<true>(dw[k], pixel.dw + k * stride + c, 0);
  for (int j = 0; j < kRank; ++j) store_lanes<true>(db[j], pixel.db + j * stride + c, 0);
  if (pixel.dd != nullptr) {
    const Vector dd = s0 * s1 * ds;
    const Vector negative = -dd;
    store_lanes<kFull>(dd, pixel.dd + c, count);
    store_lanes<kFull>(negative, pixel.dd + operands.shape.channels + c, count);
  }
}

template <typename scalar_t, int kRank>
ACCEL_CLONES void backward_units(const MasFuseBackward& params, int64_t begin, int64_t end) {
  using acc_t = accumulate_t<scalar_t>;
  constexpr int kLanes = Lanes<acc_t>::kCount;
  const int channels = params.channels;
  const int rank = params.rank;
  const int frames = params.frames;
  const int64_t frame_size = static_cast<int64_t>(params.pixels) * channels;
  const int pixel_units = divide_up(params.pixels, params.pixels_per_unit);
  Operands<scalar_t, kRank> operands(params);
  const int64_t stride = operands.stride;
  std::vector<acc_t> sums((3 + kRank) * stride);
  acc_t* dw = sums.data();
  acc_t* db = dw + 3 * stride;
  std::vector<acc_t> dm(size_t{kRank} * frames * kLanes);
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t n = unit / pixel_units;
    const int first = static_cast<int>(unit % pixel_units) * params.pixels_per_unit;
    const int last = std::min(first + params.pixels_per_unit, params.pixels);
    std::fill(sums.begin(), sums.end(), acc_t{0});
    for (int p = first; p < last; ++p) {
      operands.load_pixel(n, p);
      std::fill(dm.begin(), dm.end(), acc_t{0});
      const int64_t offset = n * frames * frame_size + static_cast<int64_t>(p) * channels;
      BackwardPixel<scalar_t> pixel{};
      pixel.x = static_cast<const scalar_t*>(params.x) + offset;
      pixel.grad = static_cast<const scalar_t*>(params.grad) + offset;
      if (params.dx != nullptr) pixel.dx = static_cast<scalar_t*>(params.dx) + offset;
      if (params.dd != nullptr) {
        pixel.dd = static_cast<scalar_t*>(params.dd) +
                   (n * params.pixels + p) * int64_t{2} * channels;
      }
      pixel.dm = dm.data();
      pixel.dw = dw;
      pixel.db = db;
      int c = 0;
      for (; c + kLanes <= channels; c += kLanes) {
        backward_block<true>(operands, pixel, frame_size, c, kLanes);
      }
      if (c < channels) backward_block<false>(operands, pixel, frame_size, c, channels - c);
      if (params.dm == nullptr) continue;
      for (int t = 0; t < frames; ++t) {
        auto* target = static_cast<scalar_t*>(params.dm) +
                       ((n * frames + t) * params.pixels + p) * rank;
        for (int j = 0; j < rank; ++j) {
          const acc_t sum = sum_lanes(dm.data() + (t * kRank + j) * kLanes);
          target[j] = narrow(sum, static_cast<scalar_t*>(nullptr));
        }
      }
    }

    auto* dw_target = static_cast<acc_t*>(params.dw_partial) + unit * channels * 3;
    auto* db_target = static_cast<acc_t*>(params.db_partial) + unit * channels * rank;
    for (int c = 0; c < channels; ++c) {
      for (int k = 0; k < 3; ++k) dw_target[3 * c + k] = dw[k * stride + c];
      for (int j = 0; j < rank; ++j) db_target[rank * c + j] = db[j * stride + c];
    }
  }
}

// Calls function(Tag<scalar_t>, integral constant). Code for the published ranks 1, 2, 4 and 8 in
// fp32 only: it is what trains on CPUs, and every instance takes seconds to compile.
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
