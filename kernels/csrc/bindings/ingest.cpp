// ingest: schema, argument checks, allocation.

#include "cuda/ingest.h"

#include <ATen/ops/empty.h>

#include <optional>

#include "bindings/checks.h"

namespace accel_kernels {
namespace {

Tensor run(const char* op, const Tensor& frames, const std::optional<Tensor>& mean,
           const Tensor& std, at::ScalarType dtype, int64_t frames_per_segment, int64_t channels) {
  TORCH_CHECK_TYPE(frames.scalar_type() == at::kByte, op, ": frames must be uint8, got ",
                   frames.scalar_type(), ".");
  TORCH_CHECK_VALUE(frames.dim() == 4 && frames.size(3) == 3 && frames.is_contiguous(), op,
                    ": frames must be [B*L, H, W, 3], contiguous, got ", frames.sizes(),
                    " with strides ", frames.strides(), ".");
  TORCH_CHECK_VALUE(frames_per_segment >= 1 && frames.size(0) % frames_per_segment == 0, op,
                    ": frames must hold whole segments of frames_per_segment = ",
                    frames_per_segment, " frames, got ", frames.sizes(), ".");
  const int64_t pixels = frames.size(1) * frames.size(2);
  const int64_t batch = frames.size(0) / frames_per_segment;
  constexpr int64_t kMost = std::numeric_limits<int>::max();
  TORCH_CHECK_VALUE(batch <= kMost && 3 * pixels <= kMost && channels <= kMost, op,
                    ": frames of ", frames.sizes(), " are too large.");
  Tensor out = at::empty({batch, frames.size(1), frames.size(2), channels},
                         frames.options().dtype(dtype));
  check_coefficient(op, "std", std, out);
  TORCH_CHECK_VALUE(std.sizes().equals({3}), op, ": std must be [3], got ", std.sizes(), ".");
  IngestParams params{};
  params.dtype = dtype_of(op, out);
  params.batch = static_cast<int>(batch);
  params.frames_per_segment = static_cast<int>(frames_per_segment);
  params.pixels = static_cast<int>(pixels);
  params.channels = static_cast<int>(channels);
  params.frames = frames.const_data_ptr<uint8_t>();
  params.std = std.const_data_ptr();
  if (mean.has_value()) {
    check_coefficient(op, "mean", *mean, out);
    TORCH_CHECK_VALUE(mean->sizes().equals({3}), op, ": mean must be [3], got ", mean->sizes(),
                      ".");
    params.mean = mean->const_data_ptr();
  } else {
    params.differences = 1;
  }
  if (out.numel() > 0) {
    params.out = out.mutable_data_ptr();
    run_on_device(
        op, frames,
        [&] {
          for_units(ingest_units_cpp(params), out.numel(),
                    [&](int64_t begin, int64_t end) { ingest_cpp(params, begin, end); });
        },
        [&](cudaStream_t stream) { return accel_ingest(&params, stream); });
  }
  return out.permute({0, 3, 1, 2});
}

Tensor ingest(const Tensor& frames, const Tensor& mean, const Tensor& std, at::ScalarType dtype,
              int64_t frames_per_segment, int64_t channels) {
  TORCH_CHECK_VALUE(channels >= 3 * frames_per_segment,
                    "ingest: channels must be at least 3 * frames_per_segment = ",
                    3 * frames_per_segment, ", got ", channels, ".");
  return run("ingest", frames, mean, std, dtype, frames_per_segment, channels);
}

Tensor ingest_differences(const Tensor& frames, const Tensor& std, at::ScalarType dtype,
                          int64_t frames_per_segment) {
  TORCH_CHECK_VALUE(frames_per_segment >= 2,
                    "ingest_differences: frames_per_segment must be at least 2, got ",
                    frames_per_segment, ".");
  return run("ingest_differences", frames, std::nullopt, std, dtype, frames_per_segment,
             3 * (frames_per_segment - 1));
}

}  // namespace
}  // namespace accel_kernels

TORCH_LIBRARY_FRAGMENT(accel_kernels, m) {
  const auto tags = accel_kernels::operator_tags();
  m.def(
      "ingest(Tensor frames, Tensor mean, Tensor std, ScalarType dtype, int frames_per_segment, "
      "int channels) -> Tensor",
      tags);
  m.def(
      "ingest_differences(Tensor frames, Tensor std, ScalarType dtype, int frames_per_segment) -> "
      "Tensor",
      tags);
}

TORCH_LIBRARY_IMPL(accel_kernels, CPU, m) {
  m.impl("ingest", &accel_kernels::ingest);
  m.impl("ingest_differences", &accel_kernels::ingest_differences);
}

#ifdef ACCEL_WITH_CUDA
TORCH_LIBRARY_IMPL(accel_kernels, CUDA, m) {
  m.impl("ingest", &accel_kernels::ingest);
  m.impl("ingest_differences", &accel_kernels::ingest_differences);
}
#endif
