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

// Every lane hands the values of one half of the fields to its partner and adds the partner's of the other half; then
// the same with half as many, as long as they come out even.
template <int kBit, int kHalf, int kFields, class T>
__device__ __forceinline__ void add_halves(T (&part)[kFields]) {
  const bool upper = threadIdx.x & kBit;
#pragma unroll
  for (int i = 0; i < kHalf; ++i) {
    const T given = upper ? part[i] : part[i + kHalf];
    part[i] = (upper ? part[i + kHalf] : part[i]) + __shfl_xor_sync(kEveryLane, given, kBit);
  }
  if constexpr (kBit > 1 && kHalf % 2 == 0) add_halves<kBit / 2, kHalf / 2>(part);
}

// Adds up each of 2, 4, 8, 16 or 32 values over a warp and spoils them; of kFields sums, as many equal parts of the
// lanes get one each.
template <class T, int kFields>
__device__ __forceinline__ T warp_sums(T (&part)[kFields]) {
  add_halves<kWarp / 2, kFields / 2>(part);
  T sum = part[0];
#pragma unroll
  for (int bit = kWarp / kFields / 2; bit > 0; bit /= 2) sum += __shfl_xor_sync(kEveryLane, sum, bit);
  return sum;
}

// Adds up each of kFields values, a multiple of kLanes, over as many neighbouring lanes: each has the next of the sums,
// kFields / kLanes of them, in front.
template <int kLanes, class T, int kFields>
__device__ __forceinline__ void lane_sums(T (&part)[kFields]) {
  static_assert(kFields % kLanes == 0);
  add_halves<kLanes / 2, kFields / 2>(part);
}

// Adds up each of kCount values over a block; sum i is returned to thread i, the others get nothing of use.
template <int kThreads, int kCount, class T>
__device__ __forceinline__ T block_sums(const T (&values)[kCount]) {
  constexpr int kWarps = kThreads / kWarp, kFields = kWarp / 2;
  static_assert(kCount <= kFields);
  __shared__ T of_warp[kWarps][kCount];
  T part[kFields] = {};
#pragma unroll
  for (int i = 0; i < kCount; ++i) part[i] = values[i];
  const T sum = warp_sums(part);
  const int field = threadIdx.x % kWarp / 2;
  __syncthreads();  // the memory of the last sums is free again
  if (threadIdx.x % 2 == 0 && field < kCount) of_warp[threadIdx.x / kWarp][field] = sum;
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
