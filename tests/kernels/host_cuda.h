// Runs CUDA kernels on the host, for tests of their logic: included before a .cu file that is then
// compiled as C++. Every thread of a block is a fibre; barriers and shuffles switch between fibres;
// blocks run one after the other. What it cannot show: races between barriers, inline PTX, speed.

#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <utility>
#include <vector>

#undef __shared__
#undef __launch_bounds__
#define __shared__ static  // one block at a time, so one copy is right
#define __launch_bounds__(...)
#define __syncthreads() host_cuda::wait(host_cuda::State::kAtBlockBarrier)
#define cudaGetLastError() 0
#define ACCEL_LAUNCH(kernel, grid, block, stream, ...) \
  host_cuda::launch(grid, block, [&] { kernel(__VA_ARGS__); })

struct CUstream_st;
using cudaStream_t = CUstream_st*;
using std::max;
using std::min;

inline dim3 gridDim, blockDim;
inline uint3 blockIdx, threadIdx;

namespace host_cuda {

enum class State { kReady, kAtWarpBarrier, kAtBlockBarrier, kDone };

struct Fibre {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  State state;
  uint3 index;
  unsigned char exchanged[8];  // what the thread offers in a shuffle
};

constexpr size_t kStackBytes = 64 * 1024;
constexpr size_t kWarpSize = 32;
inline std::vector<Fibre> fibres;
inline size_t current;
inline ucontext_t scheduler;
inline const std::function<void()>* kernel_body;
inline bool reversed = false;  // blocks and threads in the opposite order

inline void wait(State state) {
  fibres[current].state = state;
  swapcontext(&fibres[current].context, &scheduler);
}

inline void run_fibre() {
  (*kernel_body)();
  fibres[current].state = State::kDone;  // returns to the scheduler through uc_link
}

// Makes fibres [begin, end) ready if all that still run wait at `barrier`.
inline void release(size_t begin, size_t end, State barrier) {
  for (size_t i = begin; i < end; ++i) {
    if (fibres[i].state != barrier && fibres[i].state != State::kDone) return;
  }
  for (size_t i = begin; i < end; ++i) {
    if (fibres[i].state == barrier) fibres[i].state = State::kReady;
  }
}

inline void run_block(size_t threads) {
  for (size_t i = 0; i < threads; ++i) {
    Fibre& fibre = fibres[i];
    const auto linear = static_cast<unsigned>(i);
    fibre.index = {linear % blockDim.x, linear / blockDim.x % blockDim.y,
                   linear / blockDim.x / blockDim.y};
    fibre.state = State::kReady;
    getcontext(&fibre.context);
    fibre.context.uc_stack.ss_sp = fibre.stack.get();
    fibre.context.uc_stack.ss_size = kStackBytes;
    fibre.context.uc_link = &scheduler;
    makecontext(&fibre.context, run_fibre, 0);
  }
  for (bool progress = true; progress;) {
    progress = false;
    for (size_t i = 0; i < threads; ++i) {
      current = reversed ? threads - 1 - i : i;
      if (fibres[current].state != State::kReady) continue;
      progress = true;
      threadIdx = fibres[current].index;
      swapcontext(&scheduler, &fibres[current].context);
    }
    for (size_t i = 0; i < threads; i += kWarpSize) {
      release(i, std::min(i + kWarpSize, threads), State::kAtWarpBarrier);
    }
    release(0, threads, State::kAtBlockBarrier);
  }
  for (size_t i = 0; i < threads; ++i) {
    if (fibres[i].state != State::kDone) {
      std::fprintf(stderr, "host_cuda: thread %zu never leaves its barrier\n", i);
      std::abort();
    }
  }
}

inline void launch(dim3 grid, dim3 block, const std::function<void()>& body) {
  const size_t threads = size_t{block.x} * block.y * block.z;
  const size_t blocks = size_t{grid.x} * grid.y * grid.z;
  gridDim = grid;
  blockDim = block;
  kernel_body = &body;
  if (fibres.size() < threads) fibres.resize(threads);
  for (Fibre& fibre : fibres) {
    if (!fibre.stack) fibre.stack.reset(new char[kStackBytes]);
  }
  for (size_t i = 0; i < blocks; ++i) {
    const auto linear = static_cast<unsigned>(reversed ? blocks - 1 - i : i);
    blockIdx = {linear % grid.x, linear / grid.x % grid.y, linear / grid.x / grid.y};
    run_block(threads);
  }
}

// The value that lane `source` of this warp offers; all lanes call it together.
template <typename T>
T shuffle(T value, size_t source) {
  static_assert(sizeof(T) <= sizeof(Fibre::exchanged));
  std::memcpy(fibres[current].exchanged, &value, sizeof(T));
  wait(State::kAtWarpBarrier);
  const size_t lane = source < kWarpSize ? source : current % kWarpSize;
  std::memcpy(&value, fibres[current / kWarpSize * kWarpSize + lane].exchanged, sizeof(T));
  wait(State::kAtWarpBarrier);
  return value;
}

}  // namespace host_cuda

template <typename T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  return host_cuda::shuffle(value, host_cuda::current % host_cuda::kWarpSize ^ mask);
}
template <typename T>
T __shfl_down_sync(unsigned, T value, unsigned delta) {
  return host_cuda::shuffle(value, host_cuda::current % host_cuda::kWarpSize + delta);
}

template <typename T>
T __shfl_sync(unsigned, T value, int source) {
  return host_cuda::shuffle(value, source);
}
inline unsigned long long atomicAdd(unsigned long long* address, unsigned long long value) {
  return std::exchange(*address, *address + value);
}

extern "C" inline __attribute__((used, visibility("default"))) void host_cuda_reverse(
    int reversed) {
  host_cuda::reversed = reversed != 0;
}
