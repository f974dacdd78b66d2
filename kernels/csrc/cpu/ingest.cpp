// ingest, C++ twin of the CUDA operator: same formulas, raw pointers. Free of torch; the bindings
// spread the work units over threads.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <type_traits>
#include <vector>

#include "common/host_types.h"
#include "cuda/ingest.h"

namespace accel_kernels {
namespace {

constexpr int kPixels = 4096;  // of one work unit
constexpr int kLevels = 511;   // differences of bytes: -255..255; the bytes themselves are 0..255

// A byte has 256 values, a difference 511: each result is computed and rounded once, then looked up.
template <typename scalar_t>
struct Table {
  using acc_t = accumulate_t<scalar_t>;

  explicit Table(const IngestParams& params) : values(3 * kLevels) {
    for (int c = 0; c < 3; ++c) {
      const acc_t deviation = static_cast<const acc_t*>(params.std)[c];
      const acc_t scale = acc_t{1} / (deviation * acc_t{255});
      const acc_t offset =
          params.differences ? acc_t{0} : -static_cast<const acc_t*>(params.mean)[c] / deviation;
      for (int level = -255; level <= 255; ++level) {
        // With one rounding, as the CUDA kernel and the reference.
        const acc_t value = std::fma(static_cast<acc_t>(level), scale, offset);
        scalar_t& target = values[c * kLevels + level + 255];
        if constexpr (std::is_same_v<scalar_t, acc_t>) {
          target = value;
        } else {
          target = narrow(value, static_cast<scalar_t*>(nullptr));
        }
      }
    }
  }

  const scalar_t* of(int c) const { return values.data() + c * kLevels + 255; }

  std::vector<scalar_t> values;  // [3, kLevels]
};

template <typename scalar_t>
void ingest_units(const IngestParams& params, int64_t begin, int64_t end) {
  const Table<scalar_t> table(params);
  const int64_t frame_size = int64_t{3} * params.pixels;
  const int units_per_segment = divide_up(params.pixels, kPixels);
  const int groups = params.frames_per_segment - params.differences;  // of three channels
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t b = unit / units_per_segment;
    const int first = static_cast<int>(unit % units_per_segment) * kPixels;
    const int last = std::min(first + kPixels, params.pixels);
    const std::uint8_t* segment = params.frames + b * params.frames_per_segment * frame_size;
    for (int p = first; p < last; ++p) {
      auto* out = static_cast<scalar_t*>(params.out) +
                  (b * params.pixels + p) * static_cast<int64_t>(params.channels);
      for (int l = 0; l < groups; ++l) {
        const std::uint8_t* bytes = segment + l * frame_size + int64_t{3} * p;
        for (int c = 0; c < 3; ++c) {
          const int level = params.differences ? bytes[frame_size + c] - bytes[c] : bytes[c];
          *out++ = table.of(c)[level];
        }
      }
      for (int channel = 3 * groups; channel < params.channels; ++channel) *out++ = scalar_t{};
    }
  }
}

}  // namespace

int64_t ingest_units_cpp(const IngestParams& params) {
  return int64_t{params.batch} * divide_up(params.pixels, kPixels);
}

void ingest_cpp(const IngestParams& params, int64_t begin, int64_t end) {
  dispatch_dtype<Half, BFloat16>(params.dtype, [&](auto tag) {
    ingest_units<typename decltype(tag)::type>(params, begin, end);
  });
}

}  // namespace accel_kernels
