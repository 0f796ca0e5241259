// The projection of token states to the width of query_attention: each state is read once, for all outputs; and of the
// queries.
#pragma once

#include "cuda/async.cuh"
#include "cuda/attention_row.cuh"
#include "cuda/launch.cuh"
#include "cuda/reduce.cuh"
#include "cuda/vector.cuh"

namespace v05::cuda {

constexpr int kProjectors = 128;  // threads of a block
constexpr int kLine = 128;        // bytes that a prefetch brings
constexpr int kFar = 4;           // lines of a state that are brought ahead of those read

// A tile of columns and its weights in shared memory, in the order in which lanes read them.
template <int kHeads, class T, class Wide>
struct WeightTile {
  static constexpr int kWidth = kHeads * kHead, kColumns = 4096 / sizeof(Wide);
  static constexpr int kSize = Vector<T>::kSize, kPart = Vector<Wide>::kSize, kParts = kSize / kPart;
  static constexpr int kLanes = kLine / sizeof(Vector<T>);  // that have the same states, a line of each at a time
  static constexpr int kStep = kLanes * kSize;              // columns of a line
  static constexpr int kRows = 4, kTogether = kRows * kWarp / kLanes;  // states of a lane; of a warp
  // Of a multiprocessor, such that no register spills.
  static constexpr int kBlocks = kHeads == 1 ? 4 : kHeads == 4 && sizeof(Wide) == 8 ? 2 : 3;

  Vector<Wide> at[kWidth][kColumns / kStep][kParts][kLanes];

  // Columns from start on; zeros past the last.
  __device__ __forceinline__ void fill(const Wide* projection, int64_t start, int64_t size) {
    constexpr int kVectors = kColumns / kPart;
    const bool whole = in_vectors(projection, size);
    for (unsigned i = threadIdx.x; i < kWidth * kVectors; i += kProjectors) {
      const unsigned e = i / kVectors, lane = i % kLanes, part = i / kLanes % kParts,
                     step = i % kVectors / kLanes / kParts;
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

  // Adds this lane's share of the products with its states: the next ones are read meanwhile, and lines that come later
  // are brought closer.
  __device__ __forceinline__ void add(const T* const (&rows)[kRows], int live, Wide (&sum)[kRows * kWidth]) const {
    const int column = threadIdx.x % kLanes * kSize;
    const T* from[kRows];
#pragma unroll
    for (int row = 0; row < kRows; ++row) from[row] = rows[row] + column;
    Vector<T> held[2][kRows];
    const auto load = [&](Vector<T>(&to)[kRows], int on, int left) {
      if (left <= 0) return;
#pragma unroll
      for (int row = 0; row < kRows; ++row) to[row] = *reinterpret_cast<const Vector<T>*>(from[row] + on * kStep);
      if (column > 0 || left <= kFar * kStep) return;
#pragma unroll
      for (int row = 0; row < kRows; ++row) prefetch(from[row] + (on + kFar) * kStep);
    };
    load(held[0], 0, live - column);
#pragma unroll 1
    for (int step = 0, left = live - column; step * kStep < live; step += 2, left -= 2 * kStep) {
      load(held[1], 1, left - kStep);
      if (left > 0) add_line(held[0], step, sum);
      load(held[0], 2, left - 2 * kStep);
      if (left > kStep) add_line(held[1], step + 1, sum);
#pragma unroll
      for (int row = 0; row < kRows; ++row) from[row] += 2 * kStep;
    }
  }

  // The same where states are not in vectors.
  __device__ __forceinline__ void add_parts(const T* const (&rows)[kRows], int live,
                                            Wide (&sum)[kRows * kWidth]) const {
#pragma unroll 1
    for (int step = 0, column = threadIdx.x % kLanes * kSize; column < live; ++step, column += kStep) {
      Vector<T> given[kRows];
#pragma unroll
      for (int row = 0; row < kRows; ++row) given[row] = load_vector<false>(rows[row], column, live, T());
      add_line(given, step, sum);
    }
  }

  // Adds the products with a line of the states: each weight is read once for all of them.
  __device__ __forceinline__ void add_line(const Vector<T> (&given)[kRows], int step,
                                           Wide (&sum)[kRows * kWidth]) const {
    const int lane = threadIdx.x % kLanes;
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      Wide x[kRows][kPart];
#pragma unroll
      for (int row = 0; row < kRows; ++row)
#pragma unroll
        for (int j = 0; j < kPart; ++j) x[row][j] = Widened<Wide, T>(given[row]).at[part * kPart + j];
#pragma unroll
      for (int e = 0; e < kWidth; ++e) {
        const Vector<Wide> weight = at[e][step][part][lane];
#pragma unroll
        for (int row = 0; row < kRows; ++row)
#pragma unroll
          for (int j = 0; j < kPart; ++j) sum[row * kWidth + e] += x[row][j] * weight.at[j];
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

// kv: a warp has some states at a time, each of which some of its lanes share. `whole`: all are in vectors.
template <int kHeads, class T, class Wide>
__global__ void __launch_bounds__(kProjectors, WeightTile<kHeads, T, Wide>::kBlocks)
    project_kernel(AttentionInputs<T, Wide> in, bool whole, Wide* kv, Asked<Wide>* asked) {
  using Tile = WeightTile<kHeads, T, Wide>;
  constexpr int kRows = Tile::kRows, kWidth = Tile::kWidth, kLanes = Tile::kLanes;
  constexpr int kOwn = kRows * kWidth / kLanes;  // outputs that a lane stores
  static_assert(kWidth % kOwn == 0);
  __shared__ Tile tile;
  allow_next_launch();
  const int lane = threadIdx.x % kWarp, own = lane % kLanes * kOwn, e = own % kWidth;
  const int64_t warp = (int64_t(blockIdx.x) * kProjectors + threadIdx.x) / kWarp;
  const int64_t stride = int64_t(gridDim.x) * (kProjectors / kWarp) * Tile::kTogether;
  const auto state = [&](int64_t row) { return in.states + smaller(row, in.tokens - 1) * in.stride; };
  for (int64_t start = 0; start < in.size; start += Tile::kColumns) {
    const int live = int(smaller<int64_t>(Tile::kColumns, in.size - start));
    __syncthreads();
    tile.fill(in.weights.projection, start, in.size);
    __syncthreads();
    for (int64_t first = warp * Tile::kTogether; first < in.tokens; first += stride) {
      const int64_t mine = first + lane / kLanes * kRows;
      const T* rows[kRows];
#pragma unroll
      for (int row = 0; row < kRows; ++row) rows[row] = state(mine + row) + start;
      Wide sum[kRows * kWidth] = {};
      if (whole)
        tile.add(rows, live, sum);
      else
        tile.add_parts(rows, live, sum);
      lane_sums<kLanes>(sum);
      if (mine + own / kWidth >= in.tokens) continue;
      Wide* out = kv + mine * kWidth + own;
#pragma unroll
      for (int i = 0; i < kOwn; ++i) out[i] = sum[i] + (start == 0 ? in.weights.projection_bias[e + i] : out[i]);
    }
  }
  project_queries(in, asked);
}

template <int kHeads, class T, class Wide>
void project_heads(const AttentionInputs<T, Wide>& in, Wide* kv, Asked<Wide>* asked, cudaStream_t stream) {
  using Tile = WeightTile<kHeads, T, Wide>;
  const unsigned blocks = larger(blocks_of(in.tokens, Tile::kTogether * kProjectors / kWarp),
                                 blocks_of(in.prompts * in.count, kProjectors));
  const bool whole = aligned(in.states) && in.stride % Vector<T>::kSize == 0 && in.size % Vector<T>::kSize == 0;
  launch(project_kernel<kHeads, T, Wide>, smaller<unsigned>(blocks, Tile::kBlocks * multiprocessors()), kProjectors,
         stream, in, whole, kv, asked);
}

template <class T, class Wide>
void project(const AttentionInputs<T, Wide>& in, Wide* kv, Asked<Wide>* asked, cudaStream_t stream) {
  with_heads(in.heads, [&](auto heads) { project_heads<heads.value>(in, kv, asked, stream); });
}

}  // namespace v05::cuda
