// Boxes and their overlap, for C++ and CUDA.

#pragma once

#if defined(__CUDACC__)
#define ACCEL_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define ACCEL_HOST_DEVICE inline
#endif

namespace accel_kernels {

template <typename T>
struct Box {
  T left, top, right, bottom;
};

template <typename T>
ACCEL_HOST_DEVICE T area(const Box<T>& box) {
  return (box.right - box.left) * (box.bottom - box.top);
}

// Intersection over union; NaN for two boxes without area.
template <typename T>
ACCEL_HOST_DEVICE T overlap(const Box<T>& a, const Box<T>& b) {
  const T left = a.left > b.left ? a.left : b.left;
  const T top = a.top > b.top ? a.top : b.top;
  const T right = a.right < b.right ? a.right : b.right;
  const T bottom = a.bottom < b.bottom ? a.bottom : b.bottom;
  const T width = right > left ? right - left : 0;
  const T height = bottom > top ? bottom - top : 0;
  const T shared = width * height;
  return shared / (area(a) + area(b) - shared);
}

}  // namespace accel_kernels
