// The fit of calibrated fusion's mixture: expectation maximisation over every group, by one block or by several that
// hand each other their sums. The likelihoods of most groups stay in registers through all steps.
#pragma once

#include "calibration.h"
#include "cuda/mailbox.cuh"

namespace v05::cuda {

constexpr int kFitThreads = 512, kFitWarps = kFitThreads / kWarp;
constexpr int64_t kShared = 4 * kFitThreads;  // groups of a block where there are several

// Groups of a thread whose likelihoods stay in registers; a block that has no more works alone.
template <class T>
constexpr int kHeld = sizeof(T) == 8 ? 3 : 8;

static_assert(kComponents < kPosted, "a number for each component");

// How many blocks fit the mixture to that many groups on a device with so many multiprocessors; they run at once.
template <class T>
unsigned fit_blocks(int64_t groups, int64_t multiprocessors) {
  if (groups <= kHeld<T> * kFitThreads) return 1;
  const int64_t wanted = (groups + kShared - 1) / kShared;
  return static_cast<unsigned>(smaller<int64_t>(wanted, smaller<int64_t>(kMostBlocks, multiprocessors)));
}

__device__ __forceinline__ float reciprocal(float x) { return __fdividef(1.0f, x); }
__device__ __forceinline__ double reciprocal(double x) { return 1.0 / x; }

// Adds a group's share in each component, but for a factor of the component's weight.
template <class T>
__device__ __forceinline__ void add_share(const T (&likelihood)[kComponents], const T (&weight)[kComponents],
                                          T (&share)[kPosted]) {
  T total = 0;
#pragma unroll
  for (int c = 0; c < kComponents; ++c) total += weight[c] * likelihood[c];
  const T inverse = total > T(0) ? reciprocal(total) : T(0);
#pragma unroll
  for (int c = 0; c < kComponents; ++c) share[c] += likelihood[c] * inverse;
}

template <class T>
__device__ __forceinline__ void load_likelihoods(const T* table, int64_t groups, int64_t g,
                                                 T (&likelihood)[kComponents]) {
#pragma unroll
  for (int c = 0; c < kComponents; ++c) likelihood[c] = g < groups ? table[c * groups + g] : T(0);
}

// The sum over a block of each of kPosted numbers, which it spoils: in the first warp, that of number `lane /
// kLanesEach`; the others get nothing of use.
template <class T>
__device__ __forceinline__ T sum_in_first_warp(T (&numbers)[kPosted]) {
  __shared__ T of_warp[kFitWarps][kPosted];
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, number = lane / kLanesEach;
  const T own = warp_sums(numbers);
  if (lane % kLanesEach == 0) of_warp[warp][number] = own;
  __syncthreads();
  T sum = 0;
  if (warp == 0) {
#pragma unroll
    for (int w = 0; w < kFitWarps; w += kLanesEach) sum += of_warp[w + lane % kLanesEach][number];
#pragma unroll
    for (int step = kLanesEach / 2; step > 0; step /= 2) sum += __shfl_xor_sync(kEveryLane, sum, step);
  }
  return sum;
}

// Whether any group of any block has a reward between the ends.
template <class T, class Reward>
__device__ __forceinline__ bool any_between(const Calibration<T, Reward>& in, const Mailbox<T>& mail) {
  __shared__ bool any;
  const int64_t stride = int64_t(gridDim.x) * kFitThreads;
  bool some = false;
  for (int64_t g = int64_t(blockIdx.x) * kFitThreads + threadIdx.x; g < in.groups; g += stride)
    some |= in.between()[g] > T(0);
  some = __syncthreads_or(some);
  if (gridDim.x == 1) return some;
  if (threadIdx.x < kWarp) {
    const T blocks = mail.sum(one_if<T>(some), 1);
    if (threadIdx.x == 0) any = blocks > T(0);
  }
  __syncthreads();
  return any;
}

template <class T, class Reward>
__global__ void __launch_bounds__(kFitThreads) fit_kernel(Calibration<T, Reward> in, Mailbox<T> mail) {
  __shared__ T weights[kPosted];
  const bool graded = any_between(in, mail), alone = gridDim.x == 1;
  const T* table = in.table_of(graded);
  const int64_t stride = int64_t(gridDim.x) * kFitThreads, first = int64_t(blockIdx.x) * kFitThreads + threadIdx.x;
  T held[kHeld<T>][kComponents];
#pragma unroll
  for (int i = 0; i < kHeld<T>; ++i) load_likelihoods(table, in.groups, first + i * stride, held[i]);
  const int component = threadIdx.x / kLanesEach;  // of a lane of the first warp; the last is none
  const bool fits = threadIdx.x < kWarp && component < kComponents, leads = fits && threadIdx.x % kLanesEach == 0;
  const double start = fits ? double(in.remembered(component)) + kComponentCount : 0;
  double count = start;  // groups that the component counts for: before the batch, and with it
  for (int step = 0;; ++step) {
    if (threadIdx.x < kWarp) {
      double all = count;
#pragma unroll
      for (int bit = kLanesEach; bit < kWarp; bit *= 2) all += __shfl_xor_sync(kEveryLane, all, bit);
      if (leads) weights[component] = T(count / all);
    }
    __syncthreads();
    if (step == kFitSteps) break;
    T weight[kComponents], share[kPosted] = {};
#pragma unroll
    for (int c = 0; c < kComponents; ++c) weight[c] = weights[c];
#pragma unroll
    for (int i = 0; i < kHeld<T>; ++i)
      if (i * stride < in.groups) add_share(held[i], weight, share);
#pragma unroll 1
    for (int64_t g = first + kHeld<T> * stride; g < in.groups; g += stride) {
      T likelihood[kComponents];
      load_likelihoods(table, in.groups, g, likelihood);
      add_share(likelihood, weight, share);
    }
#pragma unroll
    for (int c = 0; c < kComponents; ++c) share[c] *= weight[c];
    const T own = sum_in_first_warp(share);
    if (threadIdx.x < kWarp) count = start + double(alone ? own : mail.sum(own, step + 2));
  }
  if (blockIdx.x > 0) return;
  if (threadIdx.x == 0) *in.graded = graded;
  if (leads) {
    in.weights[component] = weights[component];
    in.new_state[component] = T(count - kComponentCount);
  }
}

}  // namespace v05::cuda
