#include <limits>

#include "cuda/attention_row.cuh"
#include "cuda/ops.h"
#include "cuda/reduce.cuh"
#include "cuda/vector.cuh"

namespace v05::cuda {

namespace {

constexpr int kThreads = 256;
constexpr int kRows = 4;       // states that a warp projects together
constexpr int kQueries = 192;  // threads of a block that attends, a query each

// kv of kRows tokens a warp, head by head: the states come from the cache after the first.
template <class T, class Wide>
__global__ void __launch_bounds__(kThreads) project_kernel(AttentionInputs<T, Wide> in, Wide* kv) {
  const int lane = threadIdx.x % kWarp, width = in.width();
  const int64_t first = (int64_t(blockIdx.x) * (kThreads / kWarp) + threadIdx.x / kWarp) * kRows;
  if (first >= in.tokens) return;
  const T* rows[kRows];
  bool whole = true;
#pragma unroll
  for (int row = 0; row < kRows; ++row) {
    rows[row] = in.states + smaller(first + row, in.tokens - 1) * in.stride;
    whole = whole && in_vectors(rows[row], in.size);
  }
  for (int head = 0; head < in.heads; ++head) {
    const Wide* weight = in.weights.projection + head * kHead * in.size;
    Wide sum[kRows][kHead] = {};
    for (int64_t i = lane * Vector<T>::kSize; i < in.size; i += kWarp * Vector<T>::kSize) {
      Vector<T> x[kRows];
#pragma unroll
      for (int row = 0; row < kRows; ++row) x[row] = load_vector(rows[row], i, in.size, whole, T());
#pragma unroll
      for (int j = 0; j < Vector<T>::kSize; ++j) {
        const bool inside = i + j < in.size;
        const Wide w0 = inside ? weight[i + j] : Wide(0), w1 = inside ? weight[in.size + i + j] : Wide(0);
#pragma unroll
        for (int row = 0; row < kRows; ++row) {
          sum[row][0] += Wide(widen(x[row].at[j])) * w0;
          sum[row][1] += Wide(widen(x[row].at[j])) * w1;
        }
      }
    }
#pragma unroll
    for (int row = 0; row < kRows; ++row)
#pragma unroll
      for (int j = 0; j < kHead; ++j) {
#pragma unroll
        for (int step = kWarp / 2; step > 0; step /= 2) sum[row][j] += __shfl_xor_sync(kEveryLane, sum[row][j], step);
        if (lane == 0 && first + row < in.tokens)
          kv[(first + row) * width + head * kHead + j] = sum[row][j] + in.weights.projection_bias[head * kHead + j];
      }
  }
}

template <class Wide>
__global__ void __launch_bounds__(kThreads)
    keys_kernel(const Wide* kv, int64_t tokens, int heads, Wide eps, AttentionWeights<const Wide> w, Key<Wide>* keys) {
  const int width = heads * kHead;
  const int64_t t = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (t >= tokens) return;
  const Row<Wide> x = load_row(kv + t * width, width);
  Row<Wide> hat = x;
  normalise(hat, width, eps);
  const Row<Wide> y = affine(hat, w.key_norm, w.key_norm_bias, width);
  for (int head = 0; head < heads; ++head) {
    const int k = width + head * kHead, v = k + width;
    keys[head * tokens + t] = {product(y, w.in, w.in_bias, k, width), product(y, w.in, w.in_bias, k + 1, width),
                               product(x, w.in, w.in_bias, v, width), product(x, w.in, w.in_bias, v + 1, width)};
  }
}

// A block has a prompt, a head and a tile of queries, one a thread; the tokens pass through shared memory twice.
template <class Wide>
__global__ void __launch_bounds__(kQueries)
    attend_kernel(const int64_t* offsets, const Wide* queries, int64_t count, int64_t tokens, int heads, Wide eps,
                  AttentionWeights<const Wide> w, const Key<Wide>* keys, AttentionSaved<Wide> saved) {
  __shared__ Key<Wide> tile[kQueries];
  const int width = heads * kHead, head = blockIdx.x % unsigned(heads);
  const int64_t b = blockIdx.x / unsigned(heads), begin = offsets[b], end = offsets[b + 1];
  const int64_t i = int64_t(blockIdx.y) * kQueries + threadIdx.x;
  Row<Wide> hat = load_row(queries + (b * count + smaller(i, count - 1)) * width, width);
  normalise(hat, width, eps);
  const Row<Wide> y = affine(hat, w.query_norm, w.query_norm_bias, width);
  const Wide q0 = product(y, w.in, w.in_bias, head * kHead, width) * Wide(kScoreScale);
  const Wide q1 = product(y, w.in, w.in_bias, head * kHead + 1, width) * Wide(kScoreScale);
  const Key<Wide>* own = keys + head * tokens;
  Wide largest = -std::numeric_limits<Wide>::infinity(), sum = 0, first = 0, second = 0;
  for (int64_t start = begin; start < end; start += kQueries) {
    const int live = int(smaller<int64_t>(kQueries, end - start));
    __syncthreads();
    if (threadIdx.x < live) tile[threadIdx.x] = own[start + threadIdx.x];
    __syncthreads();
    for (int t = 0; t < live; ++t) largest = larger(largest, q0 * tile[t].k0 + q1 * tile[t].k1);
  }
  for (int64_t start = begin; start < end; start += kQueries) {
    const int live = int(smaller<int64_t>(kQueries, end - start));
    __syncthreads();
    if (threadIdx.x < live) tile[threadIdx.x] = own[start + threadIdx.x];
    __syncthreads();
    Wide total = 0, v_first = 0, v_second = 0;
    for (int t = 0; t < live; ++t) {
      const Key<Wide> key = tile[t];
      const Wide power = exp(q0 * key.k0 + q1 * key.k1 - largest);
      total += power;
      v_first += power * key.v0;
      v_second += power * key.v1;
    }
    sum += total, first += v_first, second += v_second;
  }
  if (i >= count) return;
  const Wide inverse = begin < end ? Wide(1) / sum : Wide(0);
  saved.largest[(b * heads + head) * count + i] = begin < end ? largest : Wide(0);
  saved.inverse[(b * heads + head) * count + i] = inverse;
  saved.attended[(b * width + head * kHead) * count + i] = first * inverse;
  saved.attended[(b * width + head * kHead + 1) * count + i] = second * inverse;
}

template <class Wide>
__global__ void __launch_bounds__(kThreads) finish_kernel(const Wide* attended, int64_t rows, int64_t count, int width,
                                                          AttentionWeights<const Wide> w, Wide* features) {
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= rows) return;
  const Row<Wide> x = load_row(attended + i / count * width * count + i % count, width, count);
  for (int e = 0; e < width; ++e) features[i * width + e] = product(x, w.out, w.out_bias, e, width);
}

}  // namespace

template <class T, class Wide>
void make_keys(const AttentionInputs<T, Wide>& in, const Wide* kv, Key<Wide>* keys, cudaStream_t stream) {
  if (in.tokens == 0) return;
  keys_kernel<<<blocks_of(in.tokens, kThreads), kThreads, 0, stream>>>(kv, in.tokens, in.heads, in.eps, in.weights,
                                                                       keys);
  check_launch("query_attention");
}

template <class T>
void query_attention(const AttentionInputs<T, typename WideOf<T>::type>& in,
                     const AttentionSaved<typename WideOf<T>::type>& saved, typename WideOf<T>::type* keys,
                     typename WideOf<T>::type* features, cudaStream_t stream) {
  using Wide = typename WideOf<T>::type;
  auto* own = reinterpret_cast<Key<Wide>*>(keys);
  if (in.tokens > 0)
    project_kernel<<<blocks_of(in.tokens, kRows * kThreads / kWarp), kThreads, 0, stream>>>(in, saved.kv);
  make_keys<T, Wide>(in, saved.kv, own, stream);
  if (in.prompts == 0) return;
  const dim3 grid(static_cast<unsigned>(in.prompts * in.heads), blocks_of(in.count, kQueries));
  attend_kernel<Wide><<<grid, kQueries, 0, stream>>>(in.offsets, in.queries, in.count, in.tokens, in.heads, in.eps,
                                                     in.weights, own, saved);
  const int64_t rows = in.prompts * in.count;
  finish_kernel<Wide><<<blocks_of(rows, kThreads), kThreads, 0, stream>>>(saved.attended, rows, in.count, in.width(),
                                                                          in.weights, features);
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
