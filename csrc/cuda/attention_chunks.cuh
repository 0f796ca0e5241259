// Which tokens a block of query_attention has, where lengths are known to the device alone.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/reduce.cuh"
#include "formulas.h"

namespace v05::cuda {

// Up to kMost tokens of a prompt, from its own beginning on in steps of that; none where `live` is not above 0.
struct Chunk {
  int64_t prompt, begin;
  int live;
};

// How many blocks share the tokens of all prompts, `most` each at most.
inline int64_t chunks_within(int64_t tokens, int64_t prompts, int most) { return tokens / most + prompts; }

// The chunk of a block: prompt b has those from offsets[b] / kMost + b on, as many as it needs or one more. A warp
// looks at 32 prompts at a time.
template <int kMost>
__device__ __forceinline__ Chunk find_chunk(const int64_t* offsets, int64_t prompts, int64_t block) {
  const int lane = threadIdx.x % kWarp;
  int64_t b = 0;
  for (int64_t among = prompts; among > 1;) {
    const int64_t step = (among + kWarp - 1) / kWarp, at = b + lane * step;
    const bool begun = lane == 0 || (at < b + among && offsets[at] / kMost + at <= block);
    const int64_t skipped = (__popc(__ballot_sync(kEveryLane, begun)) - 1) * step;
    b += skipped;
    among = smaller(step, among - skipped);
  }
  const int64_t first = offsets[b], begin = first + (block - first / kMost - b) * kMost;
  return {b, begin, int(smaller<int64_t>(kMost, offsets[b + 1] - begin))};
}

}  // namespace v05::cuda
