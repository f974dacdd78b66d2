// ingest: stored bytes to normalized channels_last values, or to their differences.

#include "common/launch.cuh"
#include "common/vector.cuh"
#include "cuda/ingest.h"

namespace accel_kernels {
namespace {

template <typename scalar_>
struct IngestTraits {
  using scalar_t = scalar_;
  using acc_t = accumulate_t<scalar_t>;
  static constexpr int kWidth = 16 / sizeof(scalar_t);  // neighbouring elements of one thread
  static constexpr int kThreads = 256;
};

// One thread computes 16 bytes of out, whatever pixels and channels they are: stores are whole
// lines also where a pixel has 15 channels. Bytes per element: reads 1 (2 for differences, the
// second from L1), writes one element.
template <typename Traits>
__global__ void __launch_bounds__(Traits::kThreads) ingest_kernel(const IngestParams params) {
  using scalar_t = typename Traits::scalar_t;
  using acc_t = typename Traits::acc_t;
  constexpr int kWidth = Traits::kWidth;

  acc_t scale[3], offset[3];
#pragma unroll
  for (int c = 0; c < 3; ++c) {
    const acc_t std = static_cast<const acc_t*>(params.std)[c];
    scale[c] = acc_t{1} / (std * acc_t{255});
    offset[c] = params.differences ? acc_t{0} : -static_cast<const acc_t*>(params.mean)[c] / std;
  }

  const int64_t begin =
      (static_cast<int64_t>(blockIdx.x) * Traits::kThreads + threadIdx.x) * kWidth;
  const int64_t end = static_cast<int64_t>(params.batch) * params.pixels * params.channels;
  if (begin >= end) return;
  int64_t position = begin / params.channels;  // b * P + p
  int channel = static_cast<int>(begin % params.channels);
  const int stored = 3 * params.frames_per_segment;
  const int64_t frame_size = static_cast<int64_t>(params.pixels) * 3;

  Vector<scalar_t, kWidth> result;
#pragma unroll
  for (int i = 0; i < kWidth; ++i) {
    acc_t value = 0;
    if (channel < stored && begin + i < end) {
      const int64_t b = position / params.pixels;
      const int64_t p = position - b * params.pixels;
      const int l = channel / 3;
      const int c = channel - 3 * l;
      const auto* source =
          params.frames + (b * params.frames_per_segment + l) * frame_size + 3 * p + c;
      acc_t byte = source[0];
      if (params.differences) byte = static_cast<acc_t>(source[frame_size]) - byte;
      const acc_t factor = c == 0 ? scale[0] : c == 1 ? scale[1] : scale[2];
      value = (c == 0 ? offset[0] : c == 1 ? offset[1] : offset[2]) + byte * factor;
    }
    result.value[i] = narrow<scalar_t>(value);
    if (++channel == params.channels) {
      channel = 0;
      ++position;
    }
  }
  auto* out = static_cast<scalar_t*>(params.out) + begin;
  if (begin + kWidth <= end && is_aligned(params.out, 16)) {
    store_vector(out, result);
  } else {
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      if (begin + i < end) out[i] = result.value[i];
    }
  }
}

}  // namespace
}  // namespace accel_kernels

extern "C" int accel_ingest(const accel_kernels::IngestParams* params, cudaStream_t stream) {
  using namespace accel_kernels;
  return dispatch_dtype<__half, __nv_bfloat16>(params->dtype, [&](auto tag) -> int {
    using Traits = IngestTraits<typename decltype(tag)::type>;
    const int64_t elements =
        static_cast<int64_t>(params->batch) * params->pixels * params->channels;
    const auto blocks =
        static_cast<unsigned>(divide_up(divide_up(elements, Traits::kWidth), Traits::kThreads));
    ACCEL_LAUNCH(ingest_kernel<Traits>, blocks, Traits::kThreads, stream, *params);
    return static_cast<int>(cudaGetLastError());
  });
}
