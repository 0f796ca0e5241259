// A group of rollouts is worked on by a team of lanes of one warp: neighbouring lanes read neighbouring rewards, and
// the sums of a group depend on nothing but the group.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/reduce.cuh"
#include "cuda/vector.cuh"
#include "formulas.h"

namespace v05::cuda {

constexpr int kThreads = 256;

template <int kLanes, class T>
__device__ __forceinline__ T team_sum(T value) {
#pragma unroll
  for (int step = kLanes / 2; step > 0; step /= 2) value += __shfl_xor_sync(kEveryLane, value, step, kLanes);
  return value;
}

// The group of the calling lane's team, whose rewards are widened to T as they are read. A team past the last group is
// empty and takes part in the sums.
template <int kLanes, class T>
struct Team {
  int64_t group, begin, end;
  T first, shifted;  // first reward, and sum of (r - first)
  int lane;
  bool present;

  // Without the rewards: `first` and `shifted` are 0.
  __device__ Team(const int64_t* offsets, int64_t groups) : first(0), shifted(0) {
    group = int64_t(blockIdx.x) * (kThreads / kLanes) + threadIdx.x / kLanes;
    lane = threadIdx.x % kLanes;
    present = group < groups;
    begin = present ? offsets[group] : 0;
    end = present ? offsets[group + 1] : 0;
  }

  template <class Reward>
  __device__ Team(const Reward* rewards, const int64_t* offsets, int64_t groups) : Team(offsets, groups) {
    if (begin < end) first = widen(rewards[begin]);
    for (int64_t i = begin + lane; i < end; i += kLanes) shifted += widen(rewards[i]) - first;
    shifted = team_sum<kLanes>(shifted);
  }

  __device__ int64_t count() const { return end - begin; }
  __device__ T mean(T otherwise) const { return count() ? first + shifted / T(count()) : otherwise; }
};

template <int kLanes>
unsigned blocks_for(int64_t groups) {
  constexpr int kTeams = kThreads / kLanes;
  return static_cast<unsigned>((groups + kTeams - 1) / kTeams);
}

}  // namespace v05::cuda
