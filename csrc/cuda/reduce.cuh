// Reductions over a block of threads in a fixed order: the result is the same in every run.
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

constexpr unsigned kEveryLane = 0xffffffffu;

// The sum over a warp, in its first lane.
template <class T>
__device__ __forceinline__ T warp_sum(T value) {
#pragma unroll
  for (int step = kWarp / 2; step > 0; step /= 2) value += __shfl_down_sync(kEveryLane, value, step);
  return value;
}

// Adds up each of kCount values over a block; sum i is returned to thread i, the others get nothing of use.
template <int kThreads, int kCount, class T>
__device__ __forceinline__ T block_sums(const T (&values)[kCount]) {
  constexpr int kWarps = kThreads / kWarp;
  static_assert(kCount <= kThreads);
  __shared__ T of_warp[kWarps][kCount];
  __syncthreads();  // the memory of the last sums is free again
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const T sum = warp_sum(values[i]);
    if (threadIdx.x % kWarp == 0) of_warp[threadIdx.x / kWarp][i] = sum;
  }
  __syncthreads();
  T total = T(0);
  if (threadIdx.x < kCount)
#pragma unroll
    for (int warp = 0; warp < kWarps; ++warp) total += of_warp[warp][threadIdx.x];
  return total;
}

// The sum over a block, in every thread.
template <int kThreads, class T>
__device__ __forceinline__ T block_sum(T value) {
  constexpr int kWarps = kThreads / kWarp;
  __shared__ T of_warp[kWarps];
  __syncthreads();  // the memory of the last sum is free again
  value = warp_sum(value);
  if (threadIdx.x % kWarp == 0) of_warp[threadIdx.x / kWarp] = value;
  __syncthreads();
  value = of_warp[0];
#pragma unroll
  for (int warp = 1; warp < kWarps; ++warp) value += of_warp[warp];
  return value;
}

}  // namespace v05::cuda
