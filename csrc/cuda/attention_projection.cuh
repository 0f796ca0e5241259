// The projection of token states to the width of query_attention: each state is read once, for all outputs; and of the
// queries.
#pragma once

#include "cuda/async.cuh"
#include "cuda/attention_row.cuh"
#include "cuda/launch.cuh"
#include "cuda/reduce.cuh"
#include "cuda/vector.cuh"

namespace v05::cuda {

constexpr int kProjectors = 128, kProjectorBlocks = 4;  // threads of a block; blocks at a time on a multiprocessor
constexpr int kLine = 128;                              // bytes that a prefetch brings

// A tile of columns and its weights in shared memory, each lane's own where it reads without a conflict.
template <int kHeads, class T, class Wide>
struct WeightTile {
  static constexpr int kWidth = kHeads * kHead, kColumns = 4096 / sizeof(Wide);
  static constexpr int kSize = Vector<T>::kSize, kPart = Vector<Wide>::kSize, kParts = kSize / kPart;
  static constexpr int kStep = kWarp * kSize;              // columns that a warp reads at a time
  static constexpr int kRows = sizeof(Wide) == 8 ? 2 : 4;  // states that a warp projects together

  Vector<Wide> at[kWidth][kColumns / kStep][kParts][kWarp];

  // Columns from start on; zeros past the last.
  __device__ __forceinline__ void fill(const Wide* projection, int64_t start, int64_t size) {
    constexpr int kVectors = kColumns / kPart;
    const bool whole = in_vectors(projection, size);
    const int lane = threadIdx.x % kWarp;
    for (unsigned i = threadIdx.x; i < kWidth * kVectors; i += kProjectors) {
      const unsigned e = i / kVectors, part = i / kWarp % kParts, step = i % kVectors / kWarp / kParts;
      const int64_t column = start + step * kStep + lane * kSize + part * kPart;
      Vector<Wide>& to = at[e][step][part][lane];
      const Wide* from = projection + e * size + column;
      if (whole && column < size)
        copy_async<sizeof(to)>(&to, from);
      else
        copy_part(to, from, size - column);
    }
    commit_copies();
    wait_for_copies<0>();
  }

  // Adds this lane's share of the products with some rows.
  template <bool kWhole, int kPadded>
  __device__ __forceinline__ void add(const T* const (&rows)[kRows], int64_t start, int64_t size,
                                      Wide (&sum)[kRows * kPadded]) const {
    const int lane = threadIdx.x % kWarp, live = int(smaller<int64_t>(kColumns, size - start));
#pragma unroll 1
    for (int column = lane * kSize, step = 0; column < live; column += kStep, ++step) {
      Vector<T> given[kRows];
#pragma unroll
      for (int row = 0; row < kRows; ++row) given[row] = load_vector<kWhole>(rows[row], start + column, size, T());
#pragma unroll
      for (int row = 0; row < kRows; ++row) {
        const Widened<Wide, T> x(given[row]);
#pragma unroll
        for (int part = 0; part < kParts; ++part)
#pragma unroll
          for (int e = 0; e < kWidth; ++e) {
            const Vector<Wide> weight = at[e][step][part][lane];
#pragma unroll
            for (int j = 0; j < kPart; ++j) sum[row * kPadded + e] += x.at[part * kPart + j] * weight.at[j];
          }
      }
    }
  }
};

// asked [prompts, heads, count]: a thread has all heads of a query.
template <class T, class Wide>
__device__ __forceinline__ void project_queries(const AttentionInputs<T, Wide>& in, Asked<Wide>* asked) {
  const int width = in.width();
  const AttentionWeights<const Wide>& w = in.weights;
  for (int64_t i = int64_t(blockIdx.x) * kProjectors + threadIdx.x; i < in.prompts * in.count;
       i += int64_t(gridDim.x) * kProjectors) {
    const Row<Wide> y = normed(load_row(in.queries + i * width, width), w.query_norm, w.query_norm_bias, width, in.eps);
    const int64_t b = i / in.count;
    for (int e = 0; e < width; e += kHead)
      asked[(b * in.heads + e / kHead) * in.count + i - b * in.count] = asked_of(y, w, e, width);
  }
}

// kv: a warp has some rows at a time, and brings its next ones closer meanwhile. `whole`: all rows are in vectors.
template <int kHeads, class T, class Wide>
__global__ void __launch_bounds__(kProjectors, kProjectorBlocks)
    project_kernel(AttentionInputs<T, Wide> in, bool whole, Wide* kv, Asked<Wide>* asked) {
  using Tile = WeightTile<kHeads, T, Wide>;
  constexpr int kRows = Tile::kRows, kWidth = Tile::kWidth, kPadded = kHeads == 3 ? 8 : kWidth,
                kLanes = kWarp / (kRows * kPadded);
  __shared__ Tile tile;
  allow_next_launch();
  const int lane = threadIdx.x % kWarp, e = lane / kLanes % kPadded, own = lane / kLanes / kPadded;
  const bool answers = lane % kLanes == 0 && e < kWidth;
  const Wide bias = answers ? in.weights.projection_bias[e] : Wide(0);
  const int64_t warp = (int64_t(blockIdx.x) * kProjectors + threadIdx.x) / kWarp;
  const int64_t stride = int64_t(gridDim.x) * (kProjectors / kWarp) * kRows;
  for (int64_t start = 0; start < in.size; start += Tile::kColumns) {
    const int64_t near = start + lane * int(kLine / sizeof(T));
    const bool brings = near < smaller(start + Tile::kColumns, in.size);
    const auto bring = [&](int64_t first) {
      if (brings && first + kRows <= in.tokens)
#pragma unroll
        for (int row = 0; row < kRows; ++row) prefetch(in.states + (first + row) * in.stride + near);
    };
    bring(warp * kRows);
    __syncthreads();
    tile.fill(in.weights.projection, start, in.size);
    __syncthreads();
    for (int64_t first = warp * kRows; first < in.tokens; first += stride) {
      bring(first + stride);
      const T* rows[kRows] = {in.states + first * in.stride};
#pragma unroll
      for (int row = 1; row < kRows; ++row) rows[row] = rows[row - 1] + (first + row < in.tokens ? in.stride : 0);
      Wide sum[kRows * kPadded] = {};
      if (whole)
        tile.template add<true, kPadded>(rows, start, in.size, sum);
      else
        tile.template add<false, kPadded>(rows, start, in.size, sum);
      const Wide total = warp_sums(sum);
      if (!answers || first + own >= in.tokens) continue;
      Wide& out = kv[(first + own) * kWidth + e];
      out = total + (start == 0 ? bias : out);
    }
  }
  project_queries(in, asked);
}

template <int kHeads, class T, class Wide>
void project_heads(const AttentionInputs<T, Wide>& in, Wide* kv, Asked<Wide>* asked, cudaStream_t stream) {
  const unsigned blocks = larger(blocks_of(in.tokens, WeightTile<kHeads, T, Wide>::kRows * kProjectors / kWarp),
                                 blocks_of(in.prompts * in.count, kProjectors));
  const bool whole = aligned(in.states) && in.stride % Vector<T>::kSize == 0 && in.size % Vector<T>::kSize == 0;
  launch(project_kernel<kHeads, T, Wide>, smaller<unsigned>(blocks, kProjectorBlocks * multiprocessors()), kProjectors,
         stream, in, whole, kv, asked);
}

template <class T, class Wide>
void project(const AttentionInputs<T, Wide>& in, Wide* kv, Asked<Wide>* asked, cudaStream_t stream) {
  with_heads(in.heads, [&](auto heads) { project_heads<heads.value>(in, kv, asked, stream); });
}

}  // namespace v05::cuda
