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
  static constexpr int kHeld = 16 / kLanes;  // rewards of a lane that are read at once, and stay in registers

  int64_t group, begin, end;
  T first, shifted;  // first reward, after `load`, and sum of (r - first), after `add_up`; 0 without rewards
  int lane;
  bool present;

  __device__ Team(const int64_t* offsets, int64_t groups) : first(0), shifted(0) {
    group = int64_t(blockIdx.x) * (kThreads / kLanes) + threadIdx.x / kLanes;
    lane = threadIdx.x % kLanes;
    present = group < groups;
    begin = present ? offsets[group] : 0;
    end = present ? offsets[group + 1] : 0;
  }

  template <class Reward>
  __device__ __forceinline__ void load(const Reward* rewards) {
#pragma unroll
    for (int j = 0; j < kHeld; ++j) held[j] = place(j) < end ? T(widen(rewards[place(j)])) : T(0);
    first = __shfl_sync(kEveryLane, held[0], 0, kLanes);
  }

  template <class Reward>
  __device__ __forceinline__ void add_up(const Reward* rewards) {
    each(rewards, [&](int64_t, T reward) { shifted += reward - first; });
    shifted = team_sum<kLanes>(shifted);
  }

  // Calls `use(i, reward i)` for each of the lane's rewards, after `load`.
  template <class Reward, class Use>
  __device__ __forceinline__ void each(const Reward* rewards, const Use& use) const {
#pragma unroll
    for (int j = 0; j < kHeld; ++j)
      if (place(j) < end) use(place(j), held[j]);
    for (int64_t i = place(kHeld); i < end; i += kLanes) use(i, T(widen(rewards[i])));
  }

  __device__ int64_t count() const { return end - begin; }
  __device__ T mean(T otherwise) const { return count() ? first + shifted / T(count()) : otherwise; }

 private:
  T held[kHeld];

  __device__ int64_t place(int j) const { return begin + lane + j * kLanes; }
};

template <int kLanes>
unsigned blocks_for(int64_t groups) {
  constexpr int kTeams = kThreads / kLanes;
  return static_cast<unsigned>((groups + kTeams - 1) / kTeams);
}

}  // namespace v05::cuda
