// ingest: stored bytes to normalized channels_last values, or to their differences.

#include <type_traits>

#include "common/launch.cuh"
#include "common/vector.cuh"
#include "cuda/ingest.h"

namespace accel_kernels {
namespace {

enum class IngestForm {
  kFrames,       // one frame per segment, 3 channels: bytes and elements lie in the same order
  kSegments,     // 3L channels: the color of an element follows from its place alone
  kPadded,       // zeros beyond the 3L channels
  kDifferences,  // 3(L-1) channels
};

template <typename scalar_, IngestForm kForm_>
struct IngestTraits {
  using scalar_t = scalar_;
  using acc_t = accumulate_t<scalar_t>;
  static constexpr IngestForm kForm = kForm_;
  static constexpr int kWidth = 16 / sizeof(scalar_t);  // neighbouring elements, stored at once
  static constexpr int kVectors = 4;  // of one thread: what all elements share is worked out once
  static constexpr int kThreads = 256;
  static constexpr int kElements = kThreads * kVectors * kWidth;  // of one block
};

// The affine map of each color, a byte's to an element's value.
template <typename acc_t>
struct ColorMaps {
  acc_t scale[3];
  acc_t offset[3];

  // The maps of the colors `first`, `first` + 1, `first` + 2, counted round.
  __device__ __forceinline__ ColorMaps from(int first) const {
    ColorMaps maps;
#pragma unroll
    for (int i = 0; i < 3; ++i) {
      const int second = (i + 1) % 3, third = (i + 2) % 3;
      maps.scale[i] = first == 0 ? scale[i] : first == 1 ? scale[second] : scale[third];
      maps.offset[i] = first == 0 ? offset[i] : first == 1 ? offset[second] : offset[third];
    }
    return maps;
  }
};

// Walks over the elements of out in their order, and over the bytes that they come from.
class Cursor {
 public:
  // At channel `channel` of pixel p of segment b.
  __device__ __forceinline__ Cursor(const IngestParams& params, int64_t b, int p, int channel)
      : params_(params), frame_size_(3 * params.pixels), p_(p), channel_(channel) {
    const int frame = channel / 3;
    color_ = channel - 3 * frame;
    pixel_ = params.frames + b * params.frames_per_segment * frame_size_ + int64_t{3} * p;
    source_ = pixel_ + frame * frame_size_ + color_;
  }

  __device__ __forceinline__ int channel() const { return channel_; }
  __device__ __forceinline__ int color() const { return color_; }
  __device__ __forceinline__ int byte() const { return source_[0]; }
  __device__ __forceinline__ int next_frame() const { return source_[frame_size_]; }

  __device__ __forceinline__ void advance() {
    if (++channel_ == params_.channels) {
      channel_ = 0;
      color_ = 0;
      pixel_ += 3;
      if (++p_ == params_.pixels) {
        p_ = 0;
        pixel_ += (params_.frames_per_segment - 1) * frame_size_;
      }
      source_ = pixel_;
    } else if (++color_ == 3) {
      color_ = 0;
      source_ += frame_size_ - 2;
    } else {
      ++source_;
    }
  }

 private:
  const IngestParams& params_;
  const int64_t frame_size_;
  const std::uint8_t* pixel_;   // its first byte in the first frame of its segment
  const std::uint8_t* source_;  // the byte of this element
  int p_;
  int channel_;
  int color_;
};

// One thread computes kVectors times 16 bytes of out, whatever pixels and channels they are: stores
// are whole lines also where a pixel has 15 channels. Bytes per element: reads 1 (2 for
// differences, the second from L1), writes one element. With so few bytes the arithmetic of an
// index shows: it is worked out once per vector, in 32 bits, and carried along from there.
template <typename Traits>
__global__ void __launch_bounds__(Traits::kThreads) ingest_kernel(const IngestParams params) {
  using scalar_t = typename Traits::scalar_t;
  using acc_t = typename Traits::acc_t;
  constexpr IngestForm kForm = Traits::kForm;
  constexpr int kWidth = Traits::kWidth;

  ColorMaps<acc_t> colors;
#pragma unroll
  for (int c = 0; c < 3; ++c) {
    const acc_t std = static_cast<const acc_t*>(params.std)[c];
    colors.scale[c] = acc_t{1} / (std * acc_t{255});
    colors.offset[c] = kForm == IngestForm::kDifferences
                           ? acc_t{0}
                           : -static_cast<const acc_t*>(params.mean)[c] / std;
  }

  const int64_t end = static_cast<int64_t>(params.batch) * params.pixels * params.channels;
  const int64_t block_begin = static_cast<int64_t>(blockIdx.x) * Traits::kElements;
  const int64_t block_position = block_begin / params.channels;  // b * P + p
  const auto block_channel = static_cast<unsigned>(block_begin - block_position * params.channels);
  const int64_t block_b = block_position / params.pixels;
  const auto block_p = static_cast<unsigned>(block_position - block_b * params.pixels);
  const bool aligned = is_aligned(params.out, 16);

#pragma unroll
  for (int v = 0; v < Traits::kVectors; ++v) {
    const unsigned shift = (v * Traits::kThreads + threadIdx.x) * kWidth;
    const int64_t begin = block_begin + shift;
    if (begin >= end) return;
    const int count = end - begin < kWidth ? static_cast<int>(end - begin) : kWidth;
    const unsigned channel = block_channel + shift;  // counted from the block's first pixel
    const unsigned pixels = channel / params.channels;
    const unsigned p = block_p + pixels;
    const unsigned frames = p / params.pixels;
    Cursor cursor(params, block_b + frames, static_cast<int>(p - frames * params.pixels),
                  static_cast<int>(channel - pixels * params.channels));

    Vector<scalar_t, kWidth> result;
    if constexpr (kForm == IngestForm::kPadded) {
#pragma unroll
      for (int i = 0; i < kWidth; ++i) {
        acc_t value = 0;
        if (i < count && cursor.channel() < 3 * params.frames_per_segment) {
          const ColorMaps<acc_t> maps = colors.from(cursor.color());
          value = maps.offset[0] + static_cast<acc_t>(cursor.byte()) * maps.scale[0];
        }
        result.value[i] = narrow<scalar_t>(value);
        cursor.advance();
      }
    } else {
      const ColorMaps<acc_t> maps = colors.from(cursor.color());
      if (kForm == IngestForm::kFrames && count == kWidth && is_aligned(params.frames, kWidth)) {
        const auto bytes = load_vector<kWidth>(params.frames + begin);
#pragma unroll
        for (int i = 0; i < kWidth; ++i) {
          result.value[i] = narrow<scalar_t>(
              maps.offset[i % 3] + static_cast<acc_t>(bytes.value[i]) * maps.scale[i % 3]);
        }
      } else {
#pragma unroll
        for (int i = 0; i < kWidth; ++i) {
          int byte = 0;
          if (i < count) {
            byte = cursor.byte();
            if (kForm == IngestForm::kDifferences) byte = cursor.next_frame() - byte;
          }
          result.value[i] = narrow<scalar_t>(maps.offset[i % 3] +
                                             static_cast<acc_t>(byte) * maps.scale[i % 3]);
          cursor.advance();
        }
      }
    }

    auto* out = static_cast<scalar_t*>(params.out) + begin;
    if (aligned && count == kWidth) {
      store_vector(out, result);
    } else {
#pragma unroll
      for (int i = 0; i < kWidth; ++i) {
        if (i < count) out[i] = result.value[i];
      }
    }
  }
}

// Calls function with the form of this call as a constant.
template <typename Function>
int dispatch_form(const IngestParams& params, const Function& function) {
  if (params.differences) {
    return function(std::integral_constant<IngestForm, IngestForm::kDifferences>{});
  }
  if (params.channels > 3 * params.frames_per_segment) {
    return function(std::integral_constant<IngestForm, IngestForm::kPadded>{});
  }
  if (params.frames_per_segment > 1) {
    return function(std::integral_constant<IngestForm, IngestForm::kSegments>{});
  }
  return function(std::integral_constant<IngestForm, IngestForm::kFrames>{});
}

}  // namespace
}  // namespace accel_kernels

extern "C" int accel_ingest(const accel_kernels::IngestParams* params, cudaStream_t stream) {
  using namespace accel_kernels;
  return dispatch_dtype<__half, __nv_bfloat16>(params->dtype, [&](auto tag) -> int {
    return dispatch_form(*params, [&](auto form) {
      using Traits = IngestTraits<typename decltype(tag)::type, decltype(form)::value>;
      const int64_t elements =
          static_cast<int64_t>(params->batch) * params->pixels * params->channels;
      const auto blocks = static_cast<unsigned>(divide_up(elements, Traits::kElements));
      ACCEL_LAUNCH(ingest_kernel<Traits>, blocks, Traits::kThreads, stream, *params);
      return static_cast<int>(cudaGetLastError());
    });
  });
}
