// Kernel launch. The tests define ACCEL_LAUNCH themselves to run the same source on the host.

#pragma once

#ifndef ACCEL_LAUNCH
#include <cuda_runtime.h>

#define ACCEL_LAUNCH(kernel, grid, block, stream, ...) \
  kernel<<<grid, block, 0, stream>>>(__VA_ARGS__)
#endif
