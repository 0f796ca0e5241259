// The backward of query_attention where it looks at every pair of a query and a token.
#pragma once

#include "cuda/attention_chunks.cuh"
#include "cuda/attention_row.cuh"
#include "cuda/exponent.cuh"

namespace v05::cuda {

constexpr int kThreads = 256;  // of a block with two queries a thread, of any head
constexpr int kPassing = 128;  // tokens that pass such a block
constexpr int kTokens = 64;    // of a warp, two a lane, all of one prompt and head
constexpr int kTile = 64;      // queries that pass such a warp at a time

// The power of a query and a key relative to the query's largest score.
template <class Wide>
__device__ __forceinline__ Wide power_of(const Query<Wide>& query, const Key<Wide>& key) {
  return power((score_of(query.q0, query.q1, key) - query.largest) * unit<Wide>());
}

// Its gradient by the score.
template <class Wide>
__device__ __forceinline__ Wide slope_of(const Query<Wide>& query, const Key<Wide>& key, Wide power) {
  return power * (query.g0 * key.v0 + (query.g1 * key.v1 - query.delta));
}

// Two queries a thread, of any head, against a chunk of their prompt's tokens: partial [chunks, width, count] is the
// sum of p (g v - delta) k.
template <class Wide>
__global__ void __launch_bounds__(kThreads)
    by_queries_kernel(const int64_t* offsets, int64_t prompts, int64_t count, int64_t tokens, int heads,
                      const Query<Wide>* queries, const Key<Wide>* keys, Wide* partial) {
  __shared__ Key<Wide> passing[kMostHeads][kPassing + 1];  // lanes of two heads read apart
  const Chunk chunk = find_chunk<kPassing>(offsets, prompts, blockIdx.x);
  if (chunk.live <= 0) return;
  for (int head = threadIdx.x / kPassing, t = threadIdx.x % kPassing; head < heads; head += kThreads / kPassing)
    if (t < chunk.live) passing[head][t] = keys[head * tokens + chunk.begin + t];
  __syncthreads();
  const unsigned half = unsigned(count + 1) / 2, pair = blockIdx.y * kThreads + threadIdx.x, head = pair / half;
  if (head >= heads) return;
  const int64_t i = pair % half, other = i + half;
  const Query<Wide>* own = queries + (chunk.prompt * heads + head) * count;
  const Query<Wide> query[2] = {own[i], own[smaller(other, count - 1)]};
  Wide first[2] = {}, second[2] = {};
#pragma unroll 4
  for (int t = 0; t < chunk.live; ++t) {
    const Key<Wide> key = passing[head][t];
#pragma unroll
    for (int u = 0; u < 2; ++u) {
      const Wide slope = slope_of(query[u], key, power_of(query[u], key));
      first[u] += slope * key.k0;
      second[u] += slope * key.k1;
    }
  }
  Wide* out = partial + (int64_t(blockIdx.x) * heads + head) * kHead * count;
  out[i] = first[0], out[count + i] = second[0];
  if (other < count) out[other] = first[1], out[count + other] = second[1];
}

// Two tokens a lane, a warp to each head, against their prompt's queries: keys become sums of p (g v - delta) q and of
// p g.
template <class Wide>
__global__ void __launch_bounds__(kWarp* kMostHeads)
    by_tokens_kernel(const int64_t* offsets, int64_t prompts, int64_t count, int64_t tokens, const Query<Wide>* queries,
                     Key<Wide>* keys) {
  __shared__ Query<Wide> passing[kMostHeads][kTile];
  const int lane = threadIdx.x % kWarp, head = threadIdx.x / kWarp, heads = blockDim.x / kWarp;
  const Chunk chunk = find_chunk<kTokens>(offsets, prompts, blockIdx.x);
  if (chunk.live <= 0) return;
  const Query<Wide>* own = queries + (chunk.prompt * heads + head) * count;
  Key<Wide>* mine = keys + head * tokens + chunk.begin;
  const Key<Wide> key[2] = {mine[smaller(lane, chunk.live - 1)], mine[smaller(lane + kWarp, chunk.live - 1)]};
  Key<Wide> sum[2] = {};
  for (int64_t start = 0; start < count; start += kTile) {
    const int live = int(smaller<int64_t>(kTile, count - start));
    __syncwarp();
#pragma unroll
    for (int i = lane; i < kTile; i += kWarp)
      if (i < live) passing[head][i] = own[start + i];
    __syncwarp();
#pragma unroll 4
    for (int i = 0; i < live; ++i) {
      const Query<Wide> query = passing[head][i];
#pragma unroll
      for (int u = 0; u < 2; ++u) {
        const Wide power = power_of(query, key[u]), slope = slope_of(query, key[u], power);
        sum[u].k0 += slope * query.q0;
        sum[u].k1 += slope * query.q1;
        sum[u].v0 += power * query.g0;
        sum[u].v1 += power * query.g1;
      }
    }
  }
#pragma unroll
  for (int u = 0; u < 2; ++u)
    if (lane + u * kWarp < chunk.live) mine[lane + u * kWarp] = sum[u];
}

}  // namespace v05::cuda
