// Narrow rows in registers: a thread holds one of at most kMostWidth numbers, zeros behind them.
#pragma once

#include <cuda_runtime.h>

#include <type_traits>

#include "inputs.h"

namespace v05::cuda {

template <class Wide>
struct Row {
  Wide at[kMostWidth];
};

// Number e lies at values[e * step].
template <class Wide>
__device__ __forceinline__ Row<Wide> load_row(const Wide* values, int width, int64_t step = 1) {
  Row<Wide> x;
#pragma unroll
  for (int e = 0; e < kMostWidth; ++e) x.at[e] = e < width ? values[e * step] : Wide(0);
  return x;
}

template <class Wide>
__device__ __forceinline__ void store_row(const Row<Wide>& x, int width, Wide* values) {
#pragma unroll
  for (int e = 0; e < kMostWidth; ++e)
    if (e < width) values[e] = x.at[e];
}

// x becomes (x - mean) / sqrt(variance + eps); returns 1 / sqrt(variance + eps).
template <class Wide>
__device__ __forceinline__ Wide normalise(Row<Wide>& x, int width, Wide eps) {
  Wide mean = 0, square = 0;
#pragma unroll
  for (int e = 0; e < kMostWidth; ++e) mean += x.at[e];
  mean /= Wide(width);
#pragma unroll
  for (int e = 0; e < kMostWidth; ++e) {
    x.at[e] = e < width ? x.at[e] - mean : Wide(0);
    square += x.at[e] * x.at[e];
  }
  const Wide inverse = Wide(1) / sqrt(square / Wide(width) + eps);
#pragma unroll
  for (int e = 0; e < kMostWidth; ++e) x.at[e] *= inverse;
  return inverse;
}

template <class Wide>
__device__ __forceinline__ Row<Wide> affine(const Row<Wide>& hat, const Wide* scale, const Wide* shift, int width) {
  Row<Wide> y;
#pragma unroll
  for (int e = 0; e < kMostWidth; ++e) y.at[e] = e < width ? hat.at[e] * scale[e] + shift[e] : Wide(0);
  return y;
}

// A row after a layer norm.
template <class Wide>
__device__ __forceinline__ Row<Wide> normed(Row<Wide> x, const Wide* scale, const Wide* shift, int width, Wide eps) {
  normalise(x, width, eps);
  return affine(x, scale, shift, width);
}

// Gradient by what was normalised, given that by its affine result.
template <class Wide>
__device__ __forceinline__ Row<Wide> normalise_backward(const Row<Wide>& grad, const Row<Wide>& hat, Wide inverse,
                                                        const Wide* scale, int width) {
  Row<Wide> out;
  Wide mean = 0, along = 0;
#pragma unroll
  for (int e = 0; e < kMostWidth; ++e) {
    out.at[e] = e < width ? grad.at[e] * scale[e] : Wide(0);
    mean += out.at[e];
    along += out.at[e] * hat.at[e];
  }
  mean /= Wide(width), along /= Wide(width);
#pragma unroll
  for (int e = 0; e < kMostWidth; ++e)
    out.at[e] = e < width ? (out.at[e] - mean - hat.at[e] * along) * inverse : Wide(0);
  return out;
}

// Number i of weight x + bias.
template <class Wide>
__device__ __forceinline__ Wide product(const Row<Wide>& x, const Wide* weight, const Wide* bias, int i, int width) {
  Wide sum = bias[i];
#pragma unroll
  for (int e = 0; e < kMostWidth; ++e)
    if (e < width) sum += weight[i * width + e] * x.at[e];
  return sum;
}

// x += weight' y.
template <class Wide>
__device__ __forceinline__ void add_product_backward(const Row<Wide>& y, const Wide* weight, int width, Row<Wide>& x) {
#pragma unroll
  for (int i = 0; i < kMostWidth; ++i)
#pragma unroll
    for (int e = 0; e < kMostWidth; ++e)
      if (i < width && e < width) x.at[e] += weight[i * width + e] * y.at[i];
}

// What attention reads of a token and of a query and a head, and what its backward reads of the latter.
template <class Wide>
struct alignas(16) Key {
  Wide k0, k1, v0, v1;
};
template <class Wide>
struct alignas(8) Asked {
  Wide q0, q1;  // the score's scale included
};
template <class Wide>
struct alignas(16) Query {
  Wide q0, q1, largest, delta;    // delta: the gradient by what was attended, times that
  Wide g0, g1, unused0, unused1;  // that gradient; like delta over the sum of powers
};

// A query after its layer norm, projected for the head of number e and the next one.
template <class Wide>
__device__ __forceinline__ Asked<Wide> asked_of(const Row<Wide>& y, const AttentionWeights<const Wide>& w, int e,
                                                int width) {
  return {product(y, w.in, w.in_bias, e, width) * Wide(kScoreScale),
          product(y, w.in, w.in_bias, e + 1, width) * Wide(kScoreScale)};
}

// A query's score of a key, which has the same bits wherever it is made: relative to the largest, none is above 0.
template <class Wide>
__device__ __forceinline__ Wide score_of(Wide q0, Wide q1, const Key<Wide>& key) {
  return fma(q0, key.k0, q1 * key.k1);
}

// Calls body with the number of heads as a constant.
template <class Body>
void with_heads(int heads, const Body& body) {
  if (heads == 1) return body(std::integral_constant<int, 1>());
  if (heads == 2) return body(std::integral_constant<int, 2>());
  if (heads == 3) return body(std::integral_constant<int, 3>());
  body(std::integral_constant<int, kMostHeads>());
}

template <class T>
inline unsigned blocks_of(int64_t items, T per_block) {
  return static_cast<unsigned>((items + per_block - 1) / per_block);
}

// Launches the kernel that makes keys [heads, tokens] from kv.
template <class T, class Wide>
void make_keys(const AttentionInputs<T, Wide>& in, const Wide* kv, Key<Wide>* keys, cudaStream_t stream);

}  // namespace v05::cuda
