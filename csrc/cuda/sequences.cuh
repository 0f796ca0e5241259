// Which sequence a token of a packed array belongs to, found by a warp together.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/reduce.cuh"
#include "formulas.h"

namespace v05::cuda {

// The last sequence of [low, high] that begins at or before a token, as `low` does; 32 are looked at in one step.
__device__ __forceinline__ int64_t sequence_of(const int64_t* __restrict__ offsets, int64_t token, int64_t low,
                                               int64_t high) {
  const int lane = threadIdx.x % kWarp;
  while (low < high) {
    const int64_t step = (high - low + kWarp) / kWarp, probe = low + lane * step;
    const bool before = probe <= high && offsets[probe] <= token;
    low += (__popc(__ballot_sync(kEveryLane, before)) - 1) * step;
    high = smaller(high, low + step - 1);
  }
  return low;
}

// Where the calling lane's sequence of 32 begins, from `low` on; far beyond any token past the last one.
__device__ __forceinline__ int64_t nearby_begin(const int64_t* __restrict__ offsets, int64_t sequences, int64_t low) {
  const int64_t probe = low + threadIdx.x % kWarp;
  return probe < sequences ? offsets[probe] : INT64_MAX;
}

// The sequences of the first and the last of some neighbouring tokens, looked for from `low` on, where the lanes'
// sequences begin at `begin`: nearby, a step finds both.
struct Span {
  int64_t first, last;

  __device__ __forceinline__ Span(const int64_t* __restrict__ offsets, int64_t sequences, int64_t from, int64_t to,
                                  int64_t low, int64_t begin) {
    first = low + __popc(__ballot_sync(kEveryLane, begin <= from)) - 1;
    last = low + __popc(__ballot_sync(kEveryLane, begin <= to)) - 1;
    if (last < low + kWarp - 1) return;
    first = sequence_of(offsets, from, first, sequences - 1);
    last = sequence_of(offsets, to, first, sequences - 1);
  }

  __device__ __forceinline__ bool one() const { return first == last; }

  // The sequence of one of the tokens, looked for by the calling lane alone.
  __device__ __forceinline__ int64_t of(const int64_t* __restrict__ offsets, int64_t token) const {
    int64_t low = first, high = last;
    while (low < high) {
      const int64_t middle = (low + high + 1) / 2;
      if (offsets[middle] <= token)
        low = middle;
      else
        high = middle - 1;
    }
    return low;
  }
};

}  // namespace v05::cuda
