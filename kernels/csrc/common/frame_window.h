// How the C++ twins of temporal operators walk over [N, T, P, C]: a run of neighbouring pixels, all
// of its frames, the next run.

#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>
#include <vector>

#include "common/clones.h"
#include "common/dispatch.h"
#include "common/host_types.h"

namespace accel_kernels {

// The loops run over the frames of a run of neighbouring pixels, not of one pixel: frames are often
// a multiple of 4096 bytes apart, so that the rows of one pixel evict each other from the L1 cache.
constexpr int kRunElements = 1024;

inline int pixels_per_run(int channels) { return std::max(kRunElements / channels, 1); }

// Frames t-1, t, t+1 of a run of pixels in the arithmetic type. fp32 and fp64 are used in place,
// 16-bit frames are widened once each into a ring of three. Frames outside 0..T-1 are zeros.
template <typename scalar_t>
class FrameWindow {
 public:
  using acc_t = accumulate_t<scalar_t>;

  explicit FrameWindow(int max_length)
      : max_length_(max_length), storage_(size_t{4} * max_length) {}

  // Starts with frame `first` in the middle. `run` is the run's place in frame 0, of `length`
  // elements.
  ACCEL_INLINE void start(const scalar_t* run, int length, int64_t frame_size, int frames,
                          int first) {
    run_ = run;
    length_ = length;
    frame_size_ = frame_size;
    frames_ = frames;
    next_frame_ = first + 1;
    before = row(first - 1);
    here = row(first);
    after = row(first + 1);
  }
  ACCEL_INLINE void advance() {
    before = here;
    here = after;
    after = row(++next_frame_);
  }

  const acc_t* before = nullptr;
  const acc_t* here = nullptr;
  const acc_t* after = nullptr;

 private:
  ACCEL_INLINE const acc_t* row(int frame) {
    if (frame < 0 || frame >= frames_) return storage_.data();
    const scalar_t* source = run_ + frame * frame_size_;
    if constexpr (std::is_same_v<scalar_t, acc_t>) {
      return source;
    } else {
      acc_t* target = storage_.data() + (1 + frame % 3) * static_cast<int64_t>(max_length_);
      widen_row(source, target, length_);
      return target;
    }
  }

  int max_length_;
  std::vector<acc_t> storage_;  // [4, max_length]: zeros, then the ring
  const scalar_t* run_ = nullptr;
  int length_ = 0;
  int64_t frame_size_ = 0;
  int frames_ = 0;
  int next_frame_ = 0;
};

}  // namespace accel_kernels
