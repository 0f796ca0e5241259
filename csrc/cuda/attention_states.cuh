// The backward of query_attention where it reads or writes whole states.
#pragma once

#include "cuda/attention_sums.cuh"
#include "cuda/vector.cuh"

namespace v05::cuda {

constexpr int kColumns = 128;  // threads of a block with 16 bytes of the states' columns each
constexpr int kStates = 64;    // states whose gradients a block writes

// Tokens of a chunk, whose share of the projection's gradient is summed by itself.
inline int64_t chunk_of(int64_t tokens) {
  const int64_t even = (tokens / kMostBlocks / kWarp + 1) * kWarp;
  return smaller<int64_t>(larger<int64_t>(even, 64), 1024);
}

// A thread's columns of the next states, from `row` on; the last one stands for those behind it.
template <bool kWhole, int kAhead, class T>
__device__ __forceinline__ void load_states(const T*& row, int64_t stride, int64_t columns, int left,
                                            Vector<T> (&x)[kAhead]) {
#pragma unroll
  for (int u = 0; u < kAhead; ++u) {
    x[u] = load_vector<kWhole>(row, 0, columns, T(0));
    if (u + 1 < left) row += stride;
  }
}

// Adds by_kv' states of some tokens to the sums of a thread's columns, which begin at `row`; there may be none. Behind
// the last token the gradients are 0.
template <bool kWhole, int kWidth, class T, class Wide>
__device__ __forceinline__ void add_states(const T* row, int64_t stride, int64_t columns, int tokens,
                                           const StoredRow<Wide>* by_kv, Wide (&sum)[kWidth][Vector<T>::kSize]) {
  constexpr int kAhead = kWidth * Vector<T>::kSize > 48 ? 2 : 4;  // states that are read while as many are worked on
  __shared__ StoredRow<Wide> grad[kColumns];
  Vector<T> next[kAhead];
  if (columns > 0) load_states<kWhole>(row, stride, columns, tokens, next);
  for (int start = 0; start < tokens; start += kColumns) {
    __syncthreads();
    grad[threadIdx.x] = start + int(threadIdx.x) < tokens ? by_kv[start + threadIdx.x] : StoredRow<Wide>{};
    __syncthreads();
    if (columns <= 0) continue;
    const int live = smaller(kColumns, tokens - start);
    for (int t = 0; t < live; t += kAhead) {
      Vector<T> x[kAhead];
#pragma unroll
      for (int u = 0; u < kAhead; ++u) x[u] = next[u];
      load_states<kWhole>(row, stride, columns, tokens - start - t - kAhead, next);
#pragma unroll
      for (int u = 0; u < kAhead; ++u) {
        const StoredRow<Wide> g = grad[t + u];
        const Widened<Wide, T> wide(x[u]);
#pragma unroll
        for (int e = 0; e < kWidth; ++e)
#pragma unroll
          for (int j = 0; j < Vector<T>::kSize; ++j) sum[e][j] += g.at[e] * wide.at[j];
      }
    }
  }
}

// by_kv' states over a chunk of tokens.
template <int kHeads, class T, class Wide>
__global__ void __launch_bounds__(kColumns, 4)
    projection_kernel(AttentionInputs<T, Wide> in, int64_t chunk, const StoredRow<Wide>* by_kv, Wide* of_states) {
  constexpr int kSize = Vector<T>::kSize, kWidth = kHead * kHeads;
  const int64_t first = int64_t(blockIdx.x) * chunk, column = (int64_t(blockIdx.y) * kColumns + threadIdx.x) * kSize;
  const int tokens = int(smaller(chunk, in.tokens - first));
  const T* row = in.states + first * in.stride + column;
  Wide sum[kWidth][kSize] = {};
  if (in_vectors(in.states, in.size) && in.stride % kSize == 0)
    add_states<true>(row, in.stride, in.size - column, tokens, by_kv + first, sum);
  else
    add_states<false>(row, in.stride, in.size - column, tokens, by_kv + first, sum);
#pragma unroll
  for (int e = 0; e < kWidth; ++e)
#pragma unroll
    for (int j = 0; j < kSize; ++j)
      if (column + j < in.size) of_states[(int64_t(blockIdx.x) * kWidth + e) * in.size + column + j] = sum[e][j];
}

// Gradients of a block's states: by_kv projection.
template <int kHeads, class T, class Wide>
__global__ void __launch_bounds__(kColumns, 4)
    states_kernel(AttentionInputs<T, Wide> in, const StoredRow<Wide>* by_kv, T* grad_states) {
  constexpr int kSize = Vector<T>::kSize, kWidth = kHead * kHeads, kPart = Vector<Wide>::kSize;
  __shared__ StoredRow<Wide> grad[kStates];
  const int64_t first = int64_t(blockIdx.x) * kStates;
  const int live = int(smaller<int64_t>(kStates, in.tokens - first));
  if (threadIdx.x < live) grad[threadIdx.x] = by_kv[first + threadIdx.x];
  __syncthreads();
  const int64_t column = (int64_t(blockIdx.y) * kColumns + threadIdx.x) * kSize;
  if (column >= in.size) return;
  const bool whole = aligned(in.weights.projection) && in.size % kSize == 0;
  const bool whole_out = in_vectors(grad_states, in.size);
  Vector<Wide> weight[kWidth][kSize / kPart];
#pragma unroll
  for (int e = 0; e < kWidth; ++e)
#pragma unroll
    for (int k = 0; k < kSize / kPart; ++k)
      weight[e][k] = load_vector(in.weights.projection + e * in.size, column + k * kPart, in.size, whole, Wide(0));
  for (int t = 0; t < live; ++t) {
    const StoredRow<Wide> g = grad[t];
    Wide sum[kSize] = {};
#pragma unroll
    for (int e = 0; e < kWidth; ++e)
#pragma unroll
      for (int j = 0; j < kSize; ++j) sum[j] += g.at[e] * weight[e][j / kPart].at[j % kPart];
    store_vector(grad_states + (first + t) * in.size, column, in.size, whole_out, narrowed<T>(sum));
  }
}

// Launches both, the second where grad_states is not null.
template <class T, class Wide>
void launch_states(const AttentionInputs<T, Wide>& in, const StoredRow<Wide>* by_kv, Wide* of_states, T* grad_states,
                   cudaStream_t stream) {
  const int64_t chunk = chunk_of(in.tokens);
  const unsigned across = blocks_of(in.size, kColumns * Vector<T>::kSize);
  with_heads(in.heads, [&](auto heads) {
    const dim3 chunks(blocks_of(in.tokens, chunk), across), blocks(blocks_of(in.tokens, kStates), across);
    launch(projection_kernel<heads.value, T, Wide>, chunks, kColumns, stream, in, chunk, by_kv, of_states);
    if (grad_states) launch(states_kernel<heads.value, T, Wide>, blocks, kColumns, stream, in, by_kv, grad_states);
  });
}

}  // namespace v05::cuda
