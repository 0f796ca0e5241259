// The backward of query_attention where it adds up over rows: gradient times input, for the adapter's weights.
#pragma once

#include "cuda/attention_row.cuh"
#include "cuda/launch.cuh"
#include "cuda/ops.h"
#include "cuda/reduce.cuh"

namespace v05::cuda {

constexpr int kRows = 128;        // threads of a block that sums over rows, one each; four blocks a multiprocessor
constexpr int kMostBlocks = 512;  // that share the rows, each in steps of all blocks
constexpr int kAcross = kMostWidth + 1, kSums = kMostWidth * kAcross;  // of one sum over rows, whatever the width
constexpr int kFinish = 1024;  // threads of a block that adds up what blocks have summed

inline unsigned sum_blocks(int64_t rows) { return blocks_of(smaller<int64_t>(rows, kRows * kMostBlocks), kRows); }

// A row in memory, read and written in 16 bytes.
template <class Wide>
struct alignas(16) StoredRow {
  Wide at[kMostWidth];
};

template <class Wide>
__device__ __forceinline__ StoredRow<Wide> stored(const Row<Wide>& x, bool live) {
  StoredRow<Wide> out;
#pragma unroll
  for (int e = 0; e < kMostWidth; ++e) out.at[e] = live ? x.at[e] : Wide(0);
  return out;
}

// Of a block's rows, one a thread: thread kAcross i + j gets the sum of y_i x_j, or of y_i where j is kMostWidth.
template <class Wide>
__device__ Wide block_sums(const Row<Wide>& y, const Row<Wide>& x, bool live) {
  constexpr int kWarps = kRows / kWarp, kSlices = kRows / kMostWidth;
  __shared__ StoredRow<Wide> ys[kRows], xs[kRows];
  __shared__ Wide of_warp[kWarps][kSums];
  const int i = threadIdx.x % kMostWidth;
  __syncthreads();
  ys[threadIdx.x] = stored(y, live);
  xs[threadIdx.x] = stored(x, live);
  __syncthreads();
  Wide sum[kAcross] = {};
#pragma unroll 4
  for (int row = threadIdx.x / kMostWidth; row < kRows; row += kSlices) {
    const Wide own = ys[row].at[i];
    const StoredRow<Wide> other = xs[row];
#pragma unroll
    for (int j = 0; j < kMostWidth; ++j) sum[j] += own * other.at[j];
    sum[kMostWidth] += own;
  }
#pragma unroll
  for (int j = 0; j < kAcross; ++j) {
#pragma unroll
    for (int step = kMostWidth; step < kWarp; step *= 2) sum[j] += __shfl_xor_sync(kEveryLane, sum[j], step);
    if (threadIdx.x % kWarp < kMostWidth) of_warp[threadIdx.x / kWarp][i * kAcross + j] = sum[j];
  }
  __syncthreads();
  Wide total = 0;
  if (threadIdx.x < kSums)
#pragma unroll
    for (int warp = 0; warp < kWarps; ++warp) total += of_warp[warp][threadIdx.x];
  return total;
}
static_assert(kRows >= kSums, "a thread for each sum");

// To each of the first kColumns threads, the sum over rows of its column.
template <int kColumns, class Wide>
__device__ double column_sum(const Wide* values, int64_t rows, int64_t stride, bool inside) {
  constexpr int kSlices = kFinish / kColumns;
  __shared__ double of_slice[kSlices][kColumns];
  const int column = threadIdx.x % kColumns, slice = threadIdx.x / kColumns;
  double sum = 0;
  if (inside && slice < kSlices)
#pragma unroll 8
    for (int64_t row = slice; row < rows; row += kSlices) sum += double(values[row * stride + column]);
  if (slice < kSlices) of_slice[slice][column] = sum;
  __syncthreads();
  double total = 0;
  if (slice == 0)
    for (int other = 0; other < kSlices; ++other) total += of_slice[other][column];
  return total;
}

// The sums that weights_kernel adds up: [blocks, 2, kSums] of the output and the query projection, [blocks, 3, kSums]
// of keys, values and the projection of the states, and [chunks, width, size] for the weight of that projection.
template <class Wide>
struct AttentionSums {
  Wide *of_queries, *of_tokens, *of_states;
  int64_t query_blocks, token_blocks, chunks;
};
enum Summed { kOfOutput, kOfQueries, kOfKeys, kOfValues, kOfProjection, kSummed };

// Gradients of a layer norm and the projection behind it: sum [i][j] is that of gradient i times normalised input j.
template <class Wide>
__device__ void norm_gradients(const double (&sum)[kMostWidth][kAcross], int width, const Wide* weight,
                               const Wide* scale, const Wide* shift, Wide* by_weight, Wide* by_scale, Wide* by_shift) {
  const int i = threadIdx.x / width, j = threadIdx.x % width;
  if (i < width) by_weight[threadIdx.x] = Wide(sum[i][j] * double(scale[j]) + sum[i][kMostWidth] * double(shift[j]));
  if (i > 0) return;
  double of_scale = 0, of_shift = 0;
  for (int k = 0; k < width; ++k) {
    of_scale += double(weight[k * width + j]) * sum[k][j];
    of_shift += double(weight[k * width + j]) * sum[k][kMostWidth];
  }
  by_scale[j] = Wide(of_scale);
  by_shift[j] = Wide(of_shift);
}

// Gradients of a projection, whose input is what it was multiplied with.
template <class Wide>
__device__ void product_gradients(const double (&sum)[kMostWidth][kAcross], int width, Wide* by_weight) {
  const int i = threadIdx.x / width, j = threadIdx.x % width;
  if (i < width) by_weight[threadIdx.x] = Wide(sum[i][j]);
}

template <class Wide>
__device__ void bias_gradients(const double (&sum)[kMostWidth][kAcross], int width, Wide* by_bias) {
  if (threadIdx.x < width) by_bias[threadIdx.x] = Wide(sum[threadIdx.x][kMostWidth]);
}

// What a sum over rows makes of the gradients.
template <class Wide>
__device__ void small_gradients(unsigned which, const double (&sum)[kMostWidth][kAcross], int width,
                                const AttentionWeights<const Wide>& w, const AttentionWeights<Wide>& out) {
  const int keys = width * width, values = 2 * keys;
  switch (which) {
    case kOfOutput:
      product_gradients(sum, width, out.out);
      return bias_gradients(sum, width, out.out_bias);
    case kOfQueries:
      norm_gradients(sum, width, w.in, w.query_norm, w.query_norm_bias, out.in, out.query_norm, out.query_norm_bias);
      return bias_gradients(sum, width, out.in_bias);
    case kOfKeys:
      norm_gradients(sum, width, w.in + keys, w.key_norm, w.key_norm_bias, out.in + keys, out.key_norm,
                     out.key_norm_bias);
      return bias_gradients(sum, width, out.in_bias + width);
    case kOfValues:
      product_gradients(sum, width, out.in + values);
      return bias_gradients(sum, width, out.in_bias + 2 * width);
    default:
      return bias_gradients(sum, width, out.projection_bias);
  }
}

// Gradients of all weights: the first kSummed blocks have a sum over rows each, the others a warp's columns each of the
// projection.
template <class Wide>
__global__ void __launch_bounds__(kFinish) weights_kernel(AttentionWeights<const Wide> w, int width, int64_t size,
                                                          AttentionSums<Wide> sums, AttentionWeights<Wide> out) {
  __shared__ double sum[kMostWidth][kAcross];
  if (blockIdx.x >= kSummed) {
    const int64_t first = int64_t(blockIdx.x - kSummed) * kWarp, column = first + threadIdx.x % kWarp;
    const bool inside = column < width * size;
    const double total = column_sum<kWarp>(sums.of_states + first, sums.chunks, width * size, inside);
    if (inside && threadIdx.x < kWarp) out.projection[column] = Wide(total);
    return;
  }
  const bool by_query = blockIdx.x < kOfKeys;
  const int64_t rows = by_query ? sums.query_blocks : sums.token_blocks;
  const Wide* values =
      by_query ? sums.of_queries + blockIdx.x * kSums : sums.of_tokens + (blockIdx.x - kOfKeys) * kSums;
  const double total = column_sum<kSums>(values, rows, (by_query ? kOfKeys : kSummed - kOfKeys) * kSums, true);
  if (threadIdx.x < kSums) sum[threadIdx.x / kAcross][threadIdx.x % kAcross] = total;
  __syncthreads();
  small_gradients(blockIdx.x, sum, width, w, out);
}

template <class T, class Wide>
void launch_weights(const AttentionInputs<T, Wide>& in, const AttentionSums<Wide>& sums,
                    const AttentionWeights<Wide>& out, cudaStream_t stream) {
  const unsigned blocks = kSummed + blocks_of(in.width() * in.size, kWarp);
  launch(weights_kernel<Wide>, blocks, kFinish, stream, in.weights, in.width(), in.size, sums, out);
}

}  // namespace v05::cuda
