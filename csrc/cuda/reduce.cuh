// Reductions over a block of threads in a fixed order: the result is the same in every run, and in every thread.
#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

namespace v05::cuda {

constexpr int kWarp = 32;

inline void check_launch(const char* op) {
  cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess) throw std::runtime_error(std::string(op) + ": " + cudaGetErrorString(error));
}

// merge(a, b) of every thread's value; Value is trivially copyable, and lane_copy(value, step) is it `step` lanes on.
template <int kThreads, class Value, class Shuffle, class Merge>
__device__ Value block_reduce(Value value, const Shuffle& lane_copy, const Merge& merge) {
  __shared__ Value of_warp[kThreads / kWarp];
#pragma unroll
  for (int step = kWarp / 2; step > 0; step /= 2) value = merge(value, lane_copy(value, step));
  if (threadIdx.x % kWarp == 0) of_warp[threadIdx.x / kWarp] = value;
  __syncthreads();
  value = of_warp[0];
#pragma unroll
  for (int warp = 1; warp < kThreads / kWarp; ++warp) value = merge(value, of_warp[warp]);
  return value;
}

template <class T>
__device__ __forceinline__ T shuffle_down(T value, int step) {
  return __shfl_down_sync(0xffffffffu, value, step);
}

template <int kThreads, class T>
__device__ __forceinline__ T block_sum(T value) {
  __syncthreads();  // the memory of the last sum is free again
  return block_reduce<kThreads>(
      value, [](T v, int step) { return shuffle_down(v, step); }, [](T a, T b) { return a + b; });
}

}  // namespace v05::cuda
