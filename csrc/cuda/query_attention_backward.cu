#include "cuda/attention_pairs.cuh"
#include "cuda/attention_row.cuh"
#include "cuda/attention_states.cuh"
#include "cuda/attention_sums.cuh"
#include "cuda/ops.h"

namespace v05::cuda {

namespace {

// What the attention's backward reads of each query, and the sums of the output projection.
template <class Wide>
__global__ void __launch_bounds__(kRows, 4)
    queries_kernel(const Wide* queries, const Wide* grad_features, int64_t rows, int64_t count, int heads, Wide eps,
                   AttentionWeights<const Wide> w, AttentionSaved<const Wide> saved, Query<Wide>* out, Wide* sums) {
  const int width = heads * kHead;
  Wide total = 0;
  for (int64_t first = int64_t(blockIdx.x) * kRows; first < rows; first += int64_t(gridDim.x) * kRows) {
    const int64_t i = first + threadIdx.x, row = smaller(i, rows - 1), b = row / count, query = row % count;
    const Row<Wide> grad = load_row(grad_features + row * width, width);
    const Row<Wide> attended = load_row(saved.attended + b * width * count + query, width, count);
    total += block_sums(grad, attended, i < rows);
    if (i >= rows) continue;
    Row<Wide> hat = load_row(queries + row * width, width), g = {};
    normalise(hat, width, eps);
    const Row<Wide> y = affine(hat, w.query_norm, w.query_norm_bias, width);
    add_product_backward(grad, w.out, width, g);
#pragma unroll
    for (int e = 0; e < kMostWidth; e += kHead) {
      if (e >= width) continue;
      const int64_t at = (b * heads + e / kHead) * count + query;
      const Wide inverse = saved.inverse[at], g0 = g.at[e] * inverse, g1 = g.at[e + 1] * inverse;
      const Asked<Wide> asked = asked_of(y, w, e, width);
      const Wide delta = g0 * attended.at[e] + g1 * attended.at[e + 1];
      out[at] = {asked.q0, asked.q1, saved.largest[at], delta, g0, g1, Wide(0), Wide(0)};
    }
  }
  if (threadIdx.x < kSums) sums[int64_t(blockIdx.x) * 2 * kSums + threadIdx.x] = total;
}

// From the gradient by projected queries to that by the queries given, and the sums of their projection.
template <class Wide>
__global__ void __launch_bounds__(kRows, 4)
    finish_queries_kernel(const int64_t* offsets, const Wide* queries, const Wide* partial, int64_t rows, int64_t count,
                          int width, Wide eps, AttentionWeights<const Wide> w, Wide* grad_queries, Wide* sums) {
  Wide total = 0;
  for (int64_t first = int64_t(blockIdx.x) * kRows; first < rows; first += int64_t(gridDim.x) * kRows) {
    const int64_t i = first + threadIdx.x, row = smaller(i, rows - 1), b = row / count, begin = offsets[b];
    const Wide* own = partial + (begin / kPassing + b) * width * count + row % count;
    Row<Wide> grad = {}, hat = load_row(queries + row * width, width), by_affine = {};
    for (int64_t left = offsets[b + 1] - begin; left > 0; left -= kPassing, own += width * count) {
      const Row<Wide> more = load_row(own, width, count);
#pragma unroll
      for (int e = 0; e < kMostWidth; ++e) grad.at[e] += more.at[e];
    }
#pragma unroll
    for (int e = 0; e < kMostWidth; ++e) grad.at[e] *= Wide(kScoreScale);
    const Wide inverse = normalise(hat, width, eps);
    total += block_sums(grad, hat, i < rows);
    if (i >= rows) continue;
    add_product_backward(grad, w.in, width, by_affine);
    store_row(normalise_backward(by_affine, hat, inverse, w.query_norm, width), width, grad_queries + row * width);
  }
  if (threadIdx.x < kSums) sums[(int64_t(blockIdx.x) * 2 + 1) * kSums + threadIdx.x] = total;
}

// A token's gradient by its keys or, from the third number of each on, by its values.
template <int kFirst, class Wide>
__device__ __forceinline__ Row<Wide> load_gradient(const Key<Wide>* by_keys, int64_t tokens, int width) {
  Row<Wide> grad;
#pragma unroll
  for (int e = 0; e < kMostWidth; ++e)
    grad.at[e] = e < width ? reinterpret_cast<const Wide*>(by_keys + e / kHead * tokens)[kFirst + e % kHead] : Wide(0);
  return grad;
}

// From the gradient by keys and values to that by kv, and the sums of their projections.
template <class Wide>
__global__ void __launch_bounds__(kRows, 4)
    finish_tokens_kernel(const Wide* kv, const Key<Wide>* by_keys, int64_t tokens, int heads, Wide eps,
                         AttentionWeights<const Wide> w, StoredRow<Wide>* by_kv, Wide* sums) {
  const int width = heads * kHead, squared = width * width;
  Wide of_keys = 0, of_values = 0, of_projection = 0;
  for (int64_t first = int64_t(blockIdx.x) * kRows; first < tokens; first += int64_t(gridDim.x) * kRows) {
    const int64_t i = first + threadIdx.x, t = smaller(i, tokens - 1);
    Row<Wide> hat = load_row(kv + t * width, width), by_affine = {};
    of_values += block_sums(load_gradient<kHead>(by_keys + t, tokens, width), hat, i < tokens);
    const Wide inverse = normalise(hat, width, eps);
    const Row<Wide> by_k = load_gradient<0>(by_keys + t, tokens, width);
    of_keys += block_sums(by_k, hat, i < tokens);
    add_product_backward(by_k, w.in + squared, width, by_affine);
    Row<Wide> out = normalise_backward(by_affine, hat, inverse, w.key_norm, width);
    add_product_backward(load_gradient<kHead>(by_keys + t, tokens, width), w.in + 2 * squared, width, out);
    of_projection += block_sums(out, Row<Wide>{}, i < tokens);
    if (i < tokens) by_kv[t] = stored(out, true);
  }
  sums += int64_t(blockIdx.x) * 3 * kSums + threadIdx.x;
  if (threadIdx.x < kSums) sums[0] = of_keys, sums[kSums] = of_values, sums[2 * kSums] = of_projection;
}

// Pieces of one scratch, each at a multiple of 16 bytes.
template <class Wide>
struct Scratch {
  Wide* base;
  int64_t used = 0;

  template <class Item>
  Item* take(int64_t items) {
    Wide* piece = base + used;
    used += (items * int64_t(sizeof(Item) / sizeof(Wide)) + 3) / 4 * 4;
    return reinterpret_cast<Item*>(piece);
  }
};

template <class Wide>
struct Pieces {
  Key<Wide>* keys;         // [heads, tokens]; then gradients by them
  Query<Wide>* queries;    // [prompts, heads, count]
  Wide* by_queries;        // [chunks, width, count]
  StoredRow<Wide>* by_kv;  // [tokens]
  AttentionSums<Wide> sums;

  template <class T>
  Pieces(const AttentionInputs<T, Wide>& in, Scratch<Wide>& scratch) {
    const int64_t rows = in.prompts * in.count, width = in.width(),
                  chunks = chunks_within(in.tokens, in.prompts, kPassing);
    keys = scratch.template take<Key<Wide>>(in.heads * in.tokens);
    queries = scratch.template take<Query<Wide>>(rows * in.heads);
    by_queries = scratch.template take<Wide>(chunks * width * in.count);
    by_kv = scratch.template take<StoredRow<Wide>>(in.tokens);
    sums.query_blocks = sum_blocks(rows), sums.token_blocks = sum_blocks(in.tokens);
    sums.chunks = blocks_of(in.tokens, chunk_of(in.tokens));
    sums.of_queries = scratch.template take<Wide>(sums.query_blocks * 2 * kSums);
    sums.of_tokens = scratch.template take<Wide>(sums.token_blocks * 3 * kSums);
    sums.of_states = scratch.template take<Wide>(sums.chunks * width * in.size);
  }
};

}  // namespace

int64_t attention_backward_scratch(int64_t tokens, int64_t size, int64_t prompts, int64_t count, int heads) {
  AttentionInputs<float, float> in{};
  in.tokens = tokens, in.size = size, in.prompts = prompts, in.count = count, in.heads = heads;
  Scratch<float> scratch{nullptr};
  Pieces<float>(in, scratch);
  return scratch.used;
}

template <class T>
void query_attention_backward(const AttentionInputs<T, typename WideOf<T>::type>& in,
                              const AttentionSaved<const typename WideOf<T>::type>& saved,
                              const typename WideOf<T>::type* grad_features, typename WideOf<T>::type* scratch,
                              T* grad_states, typename WideOf<T>::type* grad_queries,
                              const AttentionWeights<typename WideOf<T>::type>& grad_weights, cudaStream_t stream) {
  using Wide = typename WideOf<T>::type;
  Scratch<Wide> whole{scratch};
  const Pieces<Wide> own(in, whole);
  const int width = in.width();
  const int64_t rows = in.prompts * in.count;
  const unsigned query_blocks = sum_blocks(rows), token_blocks = sum_blocks(in.tokens);
  make_keys<T, Wide>(in, saved.kv, own.keys, stream);
  if (rows > 0) {
    launch(queries_kernel<Wide>, query_blocks, kRows, stream, in.queries, grad_features, rows, in.count, in.heads,
           in.eps, in.weights, saved, own.queries, own.sums.of_queries);
    const dim3 grid(unsigned(chunks_within(in.tokens, in.prompts, kPassing)),
                    blocks_of((in.count + 1) / 2 * in.heads, kThreads));
    launch(by_queries_kernel<Wide>, grid, kThreads, stream, in.offsets, in.prompts, in.count, in.tokens, in.heads,
           own.queries, own.keys, own.by_queries);
    launch(finish_queries_kernel<Wide>, query_blocks, kRows, stream, in.offsets, in.queries, own.by_queries, rows,
           in.count, width, in.eps, in.weights, grad_queries, own.sums.of_queries);
  }
  if (in.tokens > 0) {
    const unsigned chunks = unsigned(chunks_within(in.tokens, in.prompts, kTokens));
    launch(by_tokens_kernel<Wide>, chunks, kWarp * in.heads, stream, in.offsets, in.prompts, in.count, in.tokens,
           own.queries, own.keys);
    launch(finish_tokens_kernel<Wide>, token_blocks, kRows, stream, saved.kv, own.keys, in.tokens, in.heads, in.eps,
           in.weights, own.by_kv, own.sums.of_tokens);
    launch_states(in, own.by_kv, own.sums.of_states, grad_states, stream);
  }
  launch_weights(in, own.sums, grad_weights, stream);
  check_launch("query_attention_backward");
}

#define V05_INSTANTIATE(T)                                                                                        \
  template void query_attention_backward<T>(const AttentionInputs<T, WideOf<T>::type>&,                           \
                                            const AttentionSaved<const WideOf<T>::type>&, const WideOf<T>::type*, \
                                            WideOf<T>::type*, T*, WideOf<T>::type*,                               \
                                            const AttentionWeights<WideOf<T>::type>&, cudaStream_t);
V05_INSTANTIATE(float)
V05_INSTANTIATE(double)
V05_INSTANTIATE(__nv_bfloat16)
V05_INSTANTIATE(__half)

}  // namespace v05::cuda
