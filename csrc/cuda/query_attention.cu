#include <limits>

#include "cuda/attention_chunks.cuh"
#include "cuda/attention_projection.cuh"
#include "cuda/attention_row.cuh"
#include "cuda/exponent.cuh"
#include "cuda/launch.cuh"
#include "cuda/ops.h"

namespace v05::cuda {

namespace {

constexpr int kThreads = 256;
constexpr int kChunk = 128;  // tokens of a prompt that are attended to by themselves, and threads that do it
constexpr int kQueries = 4;  // of one head, that a thread has
template <class Wide>
constexpr int kTokens = sizeof(Wide) == 8 ? 2 : 8;            // that a query sees together
constexpr int kShare = 64, kFinishers = kShare * kMostHeads;  // queries of a block that finishes; its threads at most

// What attention to some tokens leaves: the largest score, and sums of powers relative to it, two of them times values.
template <class Wide>
struct alignas(16) Part {
  Wide largest, sum, first, second;

  template <int kCount>
  __device__ __forceinline__ void attend(Asked<Wide> query, const Key<Wide> (&keys)[kCount]) {
    Wide scores[kCount], most = largest;
#pragma unroll
    for (int t = 0; t < kCount; ++t) {
      scores[t] = score_of(query.q0, query.q1, keys[t]);
      most = fmax(most, scores[t]);
    }
    rescale(most);
#pragma unroll
    for (int t = 0; t < kCount; ++t) {
      const Wide p = power((scores[t] - most) * unit<Wide>());
      sum += p;
      first += p * keys[t].v0;
      second += p * keys[t].v1;
    }
  }

  __device__ __forceinline__ void rescale(Wide most) {
    const Wide p = power((largest - most) * unit<Wide>());
    largest = most, sum *= p, first *= p, second *= p;
  }

  __device__ __forceinline__ void add(Part other) {
    const Wide most = fmax(largest, other.largest);
    rescale(most), other.rescale(most);
    sum += other.sum, first += other.first, second += other.second;
  }
};

template <class Wide>
__device__ __forceinline__ Part<Wide> nothing() {
  return {std::numeric_limits<Wide>::lowest(), 0, 0, 0};
}

// Attention to keys one after the other.
template <int kCount, class Wide>
__device__ __forceinline__ void attend_to(const Key<Wide>* given, const Asked<Wide> (&queries)[kQueries],
                                          Part<Wide> (&parts)[kQueries]) {
  Key<Wide> keys[kCount];
#pragma unroll
  for (int t = 0; t < kCount; ++t) keys[t] = given[t];
#pragma unroll
  for (int j = 0; j < kQueries; ++j) parts[j].attend(queries[j], keys);
}

// Keys and values of a token, given its projected state before and after the layer norm.
template <class Wide>
__device__ __forceinline__ Key<Wide> key_of(const Row<Wide>& x, const Row<Wide>& y, AttentionWeights<const Wide> w,
                                            int head, int width) {
  const int k = width + head * kHead, v = k + width;
  return {product(y, w.in, w.in_bias, k, width), product(y, w.in, w.in_bias, k + 1, width),
          product(x, w.in, w.in_bias, v, width), product(x, w.in, w.in_bias, v + 1, width)};
}

template <class Wide>
__global__ void __launch_bounds__(kThreads)
    keys_kernel(const Wide* kv, int64_t tokens, int heads, Wide eps, AttentionWeights<const Wide> w, Key<Wide>* keys) {
  const int width = heads * kHead;
  const int64_t t = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (t >= tokens) return;
  const Row<Wide> x = load_row(kv + t * width, width), y = normed(x, w.key_norm, w.key_norm_bias, width, eps);
  for (int head = 0; head < heads; ++head) keys[head * tokens + t] = key_of(x, y, w, head, width);
}

// A block has a chunk of tokens and a tile of its prompt's queries, some of one head to a thread.
template <class Wide>
__global__ void __launch_bounds__(kChunk)
    attend_kernel(const int64_t* offsets, int64_t prompts, int64_t count, int heads, Wide eps,
                  AttentionWeights<const Wide> w, const Wide* kv, const Asked<Wide>* asked, Part<Wide>* parts) {
  __shared__ Key<Wide> keys[kMostHeads][kChunk + 1];
  allow_next_launch();
  const int64_t crew = (count + kQueries - 1) / kQueries;  // threads of a head
  const unsigned tiles = unsigned((crew * heads + kChunk - 1) / kChunk), block = blockIdx.x / tiles;
  const Chunk chunk = find_chunk<kChunk>(offsets, prompts, block);
  const int width = heads * kHead;
  int head = 0;
  int64_t query = int64_t(blockIdx.x % tiles) * kChunk + threadIdx.x;
  for (; query >= crew && head < heads; ++head) query -= crew;
  wait_for_last_launch();
  if (int(threadIdx.x) < chunk.live) {
    const Row<Wide> x = load_row(kv + (chunk.begin + threadIdx.x) * width, width);
    const Row<Wide> y = normed(x, w.key_norm, w.key_norm_bias, width, eps);
    for (int i = 0; i < heads; ++i) keys[i][threadIdx.x] = key_of(x, y, w, i, width);
  }
  __syncthreads();
  if (chunk.live <= 0 || head == heads) return;
  const Key<Wide>* own = keys[head];
  asked += (chunk.prompt * heads + head) * count;
  Asked<Wide> queries[kQueries];
  Part<Wide> sums[kQueries];
#pragma unroll
  for (int j = 0; j < kQueries; ++j)
    queries[j] = asked[smaller(query + j * crew, count - 1)], sums[j] = nothing<Wide>();
  int t = 0;
  for (; t + kTokens<Wide> <= chunk.live; t += kTokens<Wide>) attend_to<kTokens<Wide>>(own + t, queries, sums);
  for (; t < chunk.live; ++t) attend_to<1>(own + t, queries, sums);
  parts += (int64_t(block) * heads + head) * count;
#pragma unroll
  for (int j = 0; j < kQueries; ++j)
    if (query + j * crew < count) parts[query + j * crew] = sums[j];
}

// Brings the chunks of a prompt together, in their order, and projects.
template <class Wide>
__global__ void __launch_bounds__(kFinishers)
    finish_kernel(const int64_t* offsets, int64_t count, int heads, AttentionWeights<const Wide> w,
                  const Part<Wide>* parts, AttentionSaved<Wide> saved, Wide* features) {
  __shared__ Wide attended[kMostWidth][kShare];
  wait_for_last_launch();
  const int width = heads * kHead, head = threadIdx.x / kShare, e = head * kHead, lane = threadIdx.x % kShare;
  const unsigned tiles = unsigned((count + kShare - 1) / kShare);
  const int64_t b = blockIdx.x / tiles, query = int64_t(blockIdx.x % tiles) * kShare + lane, begin = offsets[b];
  const int64_t chunks = (offsets[b + 1] - begin + kChunk - 1) / kChunk, step = heads * count;
  const Part<Wide>* own = parts + (begin / kChunk + b) * step + head * count + smaller(query, count - 1);
  Part<Wide> total = nothing<Wide>();
#pragma unroll 4
  for (int64_t i = 0; i < chunks; ++i) total.add(own[i * step]);
  const Wide inverse = chunks > 0 ? Wide(1) / total.sum : Wide(0);
  attended[e][lane] = total.first * inverse, attended[e + 1][lane] = total.second * inverse;
  __syncthreads();
  if (query >= count) return;
  saved.largest[(b * heads + head) * count + query] = chunks > 0 ? total.largest : Wide(0);
  saved.inverse[(b * heads + head) * count + query] = inverse;
  const Row<Wide> x = load_row(&attended[0][lane], width, kShare);
  for (int i = e; i < e + kHead; ++i) {
    saved.attended[(b * width + i) * count + query] = attended[i][lane];
    features[(b * count + query) * width + i] = product(x, w.out, w.out_bias, i, width);
  }
}

}  // namespace

int64_t attention_scratch(int64_t tokens, int64_t prompts, int64_t heads, int64_t count) {
  return (chunks_within(tokens, prompts, kChunk) * 4 + prompts * 2) * heads * count;
}

template <class T, class Wide>
void make_keys(const AttentionInputs<T, Wide>& in, const Wide* kv, Key<Wide>* keys, cudaStream_t stream) {
  if (in.tokens == 0) return;
  launch(keys_kernel<Wide>, blocks_of(in.tokens, kThreads), kThreads, stream, kv, in.tokens, in.heads, in.eps,
         in.weights, keys);
}

template <class T>
void query_attention(const AttentionInputs<T, typename WideOf<T>::type>& in,
                     const AttentionSaved<typename WideOf<T>::type>& saved, typename WideOf<T>::type* scratch,
                     typename WideOf<T>::type* features, cudaStream_t stream) {
  using Wide = typename WideOf<T>::type;
  if (in.prompts == 0) return;
  const int64_t chunks = chunks_within(in.tokens, in.prompts, kChunk);
  auto* parts = reinterpret_cast<Part<Wide>*>(scratch);
  auto* asked = reinterpret_cast<Asked<Wide>*>(parts + chunks * in.heads * in.count);
  if (in.tokens > 0) {
    project(in, saved.kv, asked, stream);
    const unsigned tiles = blocks_of((in.count + kQueries - 1) / kQueries * in.heads, kChunk);
    launch_next(attend_kernel<Wide>, static_cast<unsigned>(chunks * tiles), kChunk, stream, in.offsets, in.prompts,
                in.count, in.heads, in.eps, in.weights, static_cast<const Wide*>(saved.kv),
                static_cast<const Asked<Wide>*>(asked), parts);
  }
  const auto blocks = static_cast<unsigned>(in.prompts * blocks_of(in.count, kShare));
  launch_next(finish_kernel<Wide>, blocks, kShare * in.heads, stream, in.offsets, in.count, in.heads, in.weights,
              static_cast<const Part<Wide>*>(parts), saved, features);
  check_launch("query_attention");
}

#define V05_INSTANTIATE(T)                                                                                             \
  template void make_keys<T, WideOf<T>::type>(const AttentionInputs<T, WideOf<T>::type>&, const WideOf<T>::type*,      \
                                              Key<WideOf<T>::type>*, cudaStream_t);                                    \
  template void query_attention<T>(const AttentionInputs<T, WideOf<T>::type>&, const AttentionSaved<WideOf<T>::type>&, \
                                   WideOf<T>::type*, WideOf<T>::type*, cudaStream_t);
V05_INSTANTIATE(float)
V05_INSTANTIATE(double)
V05_INSTANTIATE(__nv_bfloat16)
V05_INSTANTIATE(__half)

}  // namespace v05::cuda
