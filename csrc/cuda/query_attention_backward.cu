#include "cuda/attention_row.cuh"
#include "cuda/ops.h"
#include "cuda/reduce.cuh"
#include "cuda/vector.cuh"

namespace v05::cuda {

namespace {

constexpr int kThreads = 256;
constexpr int kQueries = 192;  // threads of a block with a query each
constexpr int kTokens = 64;    // threads of a block with a token each, all of one prompt
constexpr int kRows = 128;     // threads of a block that sums over rows, one each; four blocks a multiprocessor
constexpr int kChunk = 256;    // tokens whose share of the projection's gradient is summed by itself
constexpr int kColumns = 128;  // threads of a block with some columns of the states each

// Of a block's rows, one a thread: sums [width, width + 1] of y_i x_j, and of y_i in the last column.
template <class Wide>
__device__ void block_sums(const Row<Wide>& y, const Row<Wide>& x, bool live, int width, Wide* sums) {
  __shared__ Wide ys[kRows][kMostWidth], xs[kRows][kMostWidth + 1];
  __syncthreads();
#pragma unroll
  for (int e = 0; e < kMostWidth; ++e) {
    ys[threadIdx.x][e] = live ? y.at[e] : Wide(0);
    xs[threadIdx.x][e] = live ? x.at[e] : Wide(0);
  }
  __syncthreads();
  const int i = threadIdx.x / (width + 1), j = threadIdx.x % (width + 1);
  if (i >= width) return;
  Wide sum = 0;
  for (int row = 0; row < kRows; ++row) sum += j < width ? ys[row][i] * xs[row][j] : ys[row][i];
  sums[threadIdx.x] = sum;
}
static_assert(kRows >= kMostWidth * (kMostWidth + 1), "a thread for each sum");

// What the attention's backward reads of each query, and the sums of the output projection.
template <class Wide>
__global__ void __launch_bounds__(kRows, 4)
    queries_kernel(const Wide* queries, const Wide* grad_features, int64_t rows, int64_t count, int heads, Wide eps,
                   AttentionWeights<const Wide> w, AttentionSaved<const Wide> saved, Query<Wide>* out, Wide* sums) {
  const int width = heads * kHead;
  const int64_t i = int64_t(blockIdx.x) * kRows + threadIdx.x, row = smaller(i, rows - 1);
  const int64_t b = row / count, query = row % count;
  const Row<Wide> grad = load_row(grad_features + row * width, width);
  const Row<Wide> attended = load_row(saved.attended + b * width * count + query, width, count);
  block_sums(grad, attended, i < rows, width, sums + int64_t(blockIdx.x) * 2 * width * (width + 1));
  if (i >= rows) return;
  Row<Wide> hat = load_row(queries + row * width, width);
  normalise(hat, width, eps);
  const Row<Wide> y = affine(hat, w.query_norm, w.query_norm_bias, width);
  for (int head = 0; head < heads; ++head) {
    const int e = head * kHead;
    const int64_t at = (b * heads + head) * count + query;
    const Wide inverse = saved.inverse[at];
    Wide g[kHead] = {}, delta = 0;
    for (int k = 0; k < kHead; ++k) {
      for (int o = 0; o < width; ++o) g[k] += w.out[o * width + e + k] * grad_features[row * width + o];
      g[k] *= inverse;
      delta += g[k] * saved.attended[(b * width + e + k) * count + query];
    }
    out[at] = {product(y, w.in, w.in_bias, e, width) * Wide(kScoreScale),
               product(y, w.in, w.in_bias, e + 1, width) * Wide(kScoreScale),
               saved.largest[at],
               delta,
               g[0],
               g[1],
               Wide(0),
               Wide(0)};
  }
}

// A query a thread against its prompt's tokens: sum of p (g v - delta) k.
template <class Wide>
__global__ void __launch_bounds__(kQueries)
    by_queries_kernel(const int64_t* offsets, int64_t count, int64_t tokens, int heads, const Query<Wide>* queries,
                      const Key<Wide>* keys, Wide* by_queries) {
  __shared__ Key<Wide> tile[kQueries];
  const int head = blockIdx.x % unsigned(heads);
  const int64_t b = blockIdx.x / unsigned(heads), begin = offsets[b], end = offsets[b + 1];
  const int64_t i = int64_t(blockIdx.y) * kQueries + threadIdx.x;
  const Query<Wide> query = queries[(b * heads + head) * count + smaller(i, count - 1)];
  const Key<Wide>* own = keys + head * tokens;
  Wide first = 0, second = 0;
  for (int64_t start = begin; start < end; start += kQueries) {
    const int live = int(smaller<int64_t>(kQueries, end - start));
    __syncthreads();
    if (threadIdx.x < live) tile[threadIdx.x] = own[start + threadIdx.x];
    __syncthreads();
    Wide k_first = 0, k_second = 0;
    for (int t = 0; t < live; ++t) {
      const Key<Wide> key = tile[t];
      const Wide power = exp(query.q0 * key.k0 + query.q1 * key.k1 - query.largest);
      const Wide slope = power * (query.g0 * key.v0 + query.g1 * key.v1 - query.delta);
      k_first += slope * key.k0;
      k_second += slope * key.k1;
    }
    first += k_first, second += k_second;
  }
  if (i >= count) return;
  const int64_t row = (b * heads + head) * kHead * count + i;
  by_queries[row] = first * Wide(kScoreScale);
  by_queries[row + count] = second * Wide(kScoreScale);
}

// From the gradient by projected queries to that by the queries given, and the sums of their projection.
template <class Wide>
__global__ void __launch_bounds__(kRows, 4)
    finish_queries_kernel(const Wide* queries, const Wide* by_queries, int64_t rows, int64_t count, int width, Wide eps,
                          AttentionWeights<const Wide> w, Wide* grad_queries, Wide* sums) {
  const int64_t i = int64_t(blockIdx.x) * kRows + threadIdx.x, row = smaller(i, rows - 1);
  const Row<Wide> grad = load_row(by_queries + row / count * width * count + row % count, width, count);
  Row<Wide> hat = load_row(queries + row * width, width), by_affine = {};
  const Wide inverse = normalise(hat, width, eps);
  const int squared = width * (width + 1);
  block_sums(grad, hat, i < rows, width, sums + (int64_t(blockIdx.x) * 2 + 1) * squared);
  if (i >= rows) return;
  add_product_backward(grad, w.in, width, by_affine);
  store_row(normalise_backward(by_affine, hat, inverse, w.query_norm, width), width, grad_queries + row * width);
}

// The prompt of a block of tokens: prompt b has those from offsets[b] / kTokens + b on.
__device__ __forceinline__ int64_t prompt_of(const int64_t* offsets, int64_t prompts, int64_t block) {
  int64_t low = 0, high = prompts - 1;
  while (low < high) {
    const int64_t middle = (low + high + 1) / 2;
    if (offsets[middle] / kTokens + middle <= block)
      low = middle;
    else
      high = middle - 1;
  }
  return low;
}

// A token a thread against its prompt's queries: sums of p (g v - delta) q and of p g.
template <class Wide>
__global__ void __launch_bounds__(kTokens)
    by_tokens_kernel(const int64_t* offsets, int64_t prompts, int64_t count, int64_t tokens, int heads,
                     const Query<Wide>* queries, const Key<Wide>* keys, Key<Wide>* by_keys) {
  __shared__ Query<Wide> tile[kTokens];
  const int64_t b = prompt_of(offsets, prompts, blockIdx.x), begin = offsets[b], end = offsets[b + 1];
  const int64_t first = begin + (blockIdx.x - begin / kTokens - b) * kTokens, t = first + threadIdx.x;
  if (first >= end) return;
  const int head = blockIdx.y;
  const Key<Wide> key = keys[head * tokens + smaller(t, end - 1)];
  const Query<Wide>* own = queries + (b * heads + head) * count;
  Key<Wide> sum = {};
  for (int64_t start = 0; start < count; start += kTokens) {
    const int live = int(smaller<int64_t>(kTokens, count - start));
    __syncthreads();
    if (threadIdx.x < live) tile[threadIdx.x] = own[start + threadIdx.x];
    __syncthreads();
    for (int i = 0; i < live; ++i) {
      const Query<Wide> query = tile[i];
      const Wide power = exp(query.q0 * key.k0 + query.q1 * key.k1 - query.largest);
      const Wide slope = power * (query.g0 * key.v0 + query.g1 * key.v1 - query.delta);
      sum.k0 += slope * query.q0;
      sum.k1 += slope * query.q1;
      sum.v0 += power * query.g0;
      sum.v1 += power * query.g1;
    }
  }
  if (t < end) by_keys[head * tokens + t] = sum;
}

// From the gradient by keys and values to that by kv, and the sums of their projections.
template <class Wide>
__global__ void __launch_bounds__(kRows, 4)
    finish_tokens_kernel(const Wide* kv, const Key<Wide>* by_keys, int64_t tokens, int heads, Wide eps,
                         AttentionWeights<const Wide> w, Wide* by_kv, Wide* sums) {
  const int width = heads * kHead, squared = width * (width + 1);
  const int64_t i = int64_t(blockIdx.x) * kRows + threadIdx.x, t = smaller(i, tokens - 1);
  Row<Wide> by_k, by_v, out = {}, by_affine = {};
#pragma unroll
  for (int e = 0; e < kMostWidth; e += kHead) {
    const Key<Wide> grad = e < width ? by_keys[e / kHead * tokens + t] : Key<Wide>{};
    by_k.at[e] = grad.k0, by_k.at[e + 1] = grad.k1;
    by_v.at[e] = grad.v0, by_v.at[e + 1] = grad.v1;
  }
  Row<Wide> hat = load_row(kv + t * width, width);
  sums += int64_t(blockIdx.x) * 3 * squared;
  block_sums(by_v, hat, i < tokens, width, sums + squared);
  const Wide inverse = normalise(hat, width, eps);
  block_sums(by_k, hat, i < tokens, width, sums);
  add_product_backward(by_k, w.in + width * width, width, by_affine);
  out = normalise_backward(by_affine, hat, inverse, w.key_norm, width);
  add_product_backward(by_v, w.in + 2 * width * width, width, out);
  block_sums(out, hat, i < tokens, width, sums + 2 * squared);
  if (i < tokens) store_row(out, width, by_kv + t * width);
}

// by_kv' states over a chunk of tokens; a thread has 16 bytes of columns.
template <class T, class Wide>
__global__ void __launch_bounds__(kColumns, 4)
    projection_kernel(AttentionInputs<T, Wide> in, const Wide* by_kv, Wide* of_states) {
  constexpr int kSize = Vector<T>::kSize;
  __shared__ Wide grad[kColumns * kMostWidth];
  const int width = in.width();
  const int64_t first = int64_t(blockIdx.x) * kChunk, last = smaller(first + kChunk, in.tokens);
  const int64_t column = (int64_t(blockIdx.y) * kColumns + threadIdx.x) * kSize;
  Wide sum[kMostWidth][kSize] = {};
  for (int64_t start = first; start < last; start += kColumns) {
    const int live = int(smaller<int64_t>(kColumns, last - start));
    __syncthreads();
    for (int i = threadIdx.x; i < live * width; i += kColumns) grad[i] = by_kv[start * width + i];
    __syncthreads();
    if (column >= in.size) continue;
    for (int t = 0; t < live; ++t) {
      const T* row = in.states + (start + t) * in.stride;
      const Vector<T> x = load_vector(row, column, in.size, in_vectors(row, in.size), T());
#pragma unroll
      for (int e = 0; e < kMostWidth; ++e)
        if (e < width)
#pragma unroll
          for (int j = 0; j < kSize; ++j) sum[e][j] += grad[t * width + e] * Wide(widen(x.at[j]));
    }
  }
#pragma unroll
  for (int e = 0; e < kMostWidth; ++e)
#pragma unroll
    for (int j = 0; j < kSize; ++j)
      if (e < width && column + j < in.size)
        of_states[(int64_t(blockIdx.x) * width + e) * in.size + column + j] = sum[e][j];
}

// Gradient of a state: by_kv projection.
template <class T, class Wide>
__global__ void __launch_bounds__(kThreads)
    states_kernel(AttentionInputs<T, Wide> in, const Wide* by_kv, T* grad_states) {
  const int width = in.width();
  const int64_t t = blockIdx.x;
  for (int64_t column = threadIdx.x; column < in.size; column += kThreads) {
    Wide sum = 0;
    for (int e = 0; e < width; ++e) sum += by_kv[t * width + e] * in.weights.projection[e * in.size + column];
    grad_states[t * in.size + column] = narrow<T>(sum);
  }
}

}  // namespace

int64_t attention_query_blocks(int64_t n) { return (n + kRows - 1) / kRows; }
int64_t attention_token_blocks(int64_t n) { return (n + kRows - 1) / kRows; }
int64_t attention_chunks(int64_t n) { return (n + kChunk - 1) / kChunk; }

template <class T>
void query_attention_backward(const AttentionInputs<T, typename WideOf<T>::type>& in,
                              const AttentionSaved<const typename WideOf<T>::type>& saved,
                              const typename WideOf<T>::type* grad_features,
                              const AttentionScratch<typename WideOf<T>::type>& scratch, T* grad_states,
                              typename WideOf<T>::type* grad_queries,
                              const AttentionSums<typename WideOf<T>::type>& sums, cudaStream_t stream) {
  using Wide = typename WideOf<T>::type;
  auto *keys = reinterpret_cast<Key<Wide>*>(scratch.keys), *by_keys = reinterpret_cast<Key<Wide>*>(scratch.by_keys);
  auto* queries = reinterpret_cast<Query<Wide>*>(scratch.queries);
  const int width = in.width();
  const int64_t rows = in.prompts * in.count;
  make_keys<T, Wide>(in, saved.kv, keys, stream);
  if (rows > 0) {
    const unsigned blocks = blocks_of(rows, kRows);
    queries_kernel<Wide><<<blocks, kRows, 0, stream>>>(in.queries, grad_features, rows, in.count, in.heads, in.eps,
                                                       in.weights, saved, queries, sums.of_queries);
    const dim3 grid(static_cast<unsigned>(in.prompts * in.heads), blocks_of(in.count, kQueries));
    by_queries_kernel<Wide>
        <<<grid, kQueries, 0, stream>>>(in.offsets, in.count, in.tokens, in.heads, queries, keys, scratch.by_queries);
    finish_queries_kernel<Wide><<<blocks, kRows, 0, stream>>>(in.queries, scratch.by_queries, rows, in.count, width,
                                                              in.eps, in.weights, grad_queries, sums.of_queries);
  }
  if (in.tokens > 0) {
    const dim3 grid(static_cast<unsigned>(in.tokens / kTokens + in.prompts), static_cast<unsigned>(in.heads));
    by_tokens_kernel<Wide>
        <<<grid, kTokens, 0, stream>>>(in.offsets, in.prompts, in.count, in.tokens, in.heads, queries, keys, by_keys);
    finish_tokens_kernel<Wide><<<blocks_of(in.tokens, kRows), kRows, 0, stream>>>(
        saved.kv, by_keys, in.tokens, in.heads, in.eps, in.weights, scratch.by_kv, sums.of_tokens);
    const dim3 chunks(blocks_of(in.tokens, kChunk), blocks_of(in.size, kColumns * Vector<T>::kSize));
    projection_kernel<<<chunks, kColumns, 0, stream>>>(in, static_cast<const Wide*>(scratch.by_kv), sums.of_states);
    if (grad_states)
      states_kernel<<<static_cast<unsigned>(in.tokens), kThreads, 0, stream>>>(
          in, static_cast<const Wide*>(scratch.by_kv), grad_states);
  }
  check_launch("query_attention_backward");
}

#define V05_INSTANTIATE(T)                                                                                        \
  template void query_attention_backward<T>(const AttentionInputs<T, WideOf<T>::type>&,                           \
                                            const AttentionSaved<const WideOf<T>::type>&, const WideOf<T>::type*, \
                                            const AttentionScratch<WideOf<T>::type>&, T*, WideOf<T>::type*,       \
                                            const AttentionSums<WideOf<T>::type>&, cudaStream_t);
V05_INSTANTIATE(float)
V05_INSTANTIATE(double)
V05_INSTANTIATE(__nv_bfloat16)
V05_INSTANTIATE(__half)

}  // namespace v05::cuda
