// Narrow rows side by side: a tile holds kTileRows of them, one in each lane, so that layer norms and small matrices
// run over lanes. What a lane computes never depends on the others.
#pragma once

#include <memory>

#include "half.h"
#include "inputs.h"

namespace v05::cpu {

constexpr int kTileRows = 32;

template <class Wide>
struct Tile {
  alignas(64) Wide at[kMostWidth][kTileRows];
};

// Rows of width values that lie one after the other; lanes past `live` rows are 0.
template <class Wide>
V05_INLINE void load_rows(const Wide* rows, int live, int width, Tile<Wide>* x) {
  for (int lane = 0; lane < kTileRows; ++lane)
    for (int e = 0; e < width; ++e) x->at[e][lane] = lane < live ? rows[lane * width + e] : Wide(0);
}

template <class Wide>
V05_INLINE void store_rows(const Tile<Wide>& x, int live, int width, Wide* rows) {
  for (int lane = 0; lane < live; ++lane)
    for (int e = 0; e < width; ++e) rows[lane * width + e] = x.at[e][lane];
}

// hat = (x - mean) * inverse, inverse = 1 / sqrt(variance + eps); affine = hat * scale + shift.
template <class Wide>
V05_INLINE void layer_norm(const Tile<Wide>& x, const Wide* scale, const Wide* shift, int width, Wide eps,
                           Tile<Wide>* hat, Wide* inverse, Tile<Wide>* affine) {
  Wide mean[kTileRows] = {}, square[kTileRows] = {};
  const Wide share = Wide(1) / Wide(width);
  for (int e = 0; e < width; ++e)
    for (int lane = 0; lane < kTileRows; ++lane) mean[lane] += x.at[e][lane];
  for (int lane = 0; lane < kTileRows; ++lane) mean[lane] *= share;
  for (int e = 0; e < width; ++e)
    for (int lane = 0; lane < kTileRows; ++lane) {
      Wide d = x.at[e][lane] - mean[lane];
      hat->at[e][lane] = d;
      square[lane] += d * d;
    }
  for (int lane = 0; lane < kTileRows; ++lane) inverse[lane] = Wide(1) / std::sqrt(square[lane] * share + eps);
  for (int e = 0; e < width; ++e)
    for (int lane = 0; lane < kTileRows; ++lane) {
      hat->at[e][lane] *= inverse[lane];
      affine->at[e][lane] = hat->at[e][lane] * scale[e] + shift[e];
    }
}

// Gradient by x of layer_norm, given that by its affine result.
template <class Wide>
V05_INLINE void layer_norm_backward(const Tile<Wide>& grad, const Tile<Wide>& hat, const Wide* inverse,
                                    const Wide* scale, int width, Tile<Wide>* out) {
  Wide mean[kTileRows] = {}, along[kTileRows] = {};
  const Wide share = Wide(1) / Wide(width);
  for (int e = 0; e < width; ++e)
    for (int lane = 0; lane < kTileRows; ++lane) {
      Wide g = grad.at[e][lane] * scale[e];
      mean[lane] += g;
      along[lane] += g * hat.at[e][lane];
    }
  for (int lane = 0; lane < kTileRows; ++lane) mean[lane] *= share, along[lane] *= share;
  for (int e = 0; e < width; ++e)
    for (int lane = 0; lane < kTileRows; ++lane)
      out->at[e][lane] = (grad.at[e][lane] * scale[e] - mean[lane] - hat.at[e][lane] * along[lane]) * inverse[lane];
}

// y = weight x + bias, weight [width, width].
template <class Wide>
V05_INLINE void linear(const Tile<Wide>& x, const Wide* weight, const Wide* bias, int width, Tile<Wide>* y) {
  for (int i = 0; i < width; ++i) {
    Wide sum[kTileRows];
    for (int lane = 0; lane < kTileRows; ++lane) sum[lane] = bias[i];
    for (int j = 0; j < width; ++j)
      for (int lane = 0; lane < kTileRows; ++lane) sum[lane] += weight[i * width + j] * x.at[j][lane];
    for (int lane = 0; lane < kTileRows; ++lane) y->at[i][lane] = sum[lane];
  }
}

// x = weight' y, added to what is there where asked.
template <class Wide>
V05_INLINE void linear_backward(const Tile<Wide>& y, const Wide* weight, int width, bool add, Tile<Wide>* x) {
  for (int j = 0; j < width; ++j) {
    Wide sum[kTileRows];
    for (int lane = 0; lane < kTileRows; ++lane) sum[lane] = add ? x->at[j][lane] : Wide(0);
    for (int i = 0; i < width; ++i)
      for (int lane = 0; lane < kTileRows; ++lane) sum[lane] += weight[i * width + j] * y.at[i][lane];
    for (int lane = 0; lane < kTileRows; ++lane) x->at[j][lane] = sum[lane];
  }
}

// Sum of the lanes, by halves.
template <class Wide>
V05_INLINE Wide sum_of_tile(Wide* lanes) {
  for (int half = kTileRows / 2; half > 0; half /= 2)
    for (int lane = 0; lane < half; ++lane) lanes[lane] += lanes[lane + half];
  return lanes[0];
}

// sums [width, width + 1] += over the live rows: y_i x_j, and y_i in the last column.
template <class Wide>
V05_INLINE void add_outer(const Tile<Wide>& y, const Tile<Wide>& x, int live, int width, double* sums) {
  for (int i = 0; i < width; ++i)
    for (int j = 0; j <= width; ++j) {
      Wide product[kTileRows];
      for (int lane = 0; lane < kTileRows; ++lane)
        product[lane] = zero_unless(lane < live, j < width ? y.at[i][lane] * x.at[j][lane] : y.at[i][lane]);
      sums[i * (width + 1) + j] += sum_of_tile(product);
    }
}

// What the attention reads of a token and a head: k_0, k_1, v_0, v_1, at [heads, tokens, 4].
template <class Wide>
struct Keys {
  Tile<Wide> hat, k, v;
  Wide inverse[kTileRows];

  V05_INLINE void make(const Tile<Wide>& kv, const AttentionWeights<const Wide>& w, int width, Wide eps) {
    Tile<Wide> affine;
    layer_norm(kv, w.key_norm, w.key_norm_bias, width, eps, &hat, inverse, &affine);
    linear(affine, w.in + width * width, w.in_bias + width, width, &k);
    linear(kv, w.in + 2 * width * width, w.in_bias + 2 * width, width, &v);
  }

  V05_INLINE void store(int live, int width, int64_t first, int64_t tokens, Wide* keys) const {
    for (int e = 0; e < width; ++e) {
      Wide* out = keys + (e / kHead * tokens + first) * 2 * kHead + e % kHead;
      for (int lane = 0; lane < live; ++lane) {
        out[lane * 2 * kHead] = k.at[e][lane];
        out[lane * 2 * kHead + kHead] = v.at[e][lane];
      }
    }
  }
};

// The normalised and projected queries of a tile.
template <class Wide>
struct ProjectedQueries {
  Tile<Wide> hat, q;
  Wide inverse[kTileRows];

  V05_INLINE void make(const Wide* rows, int live, const AttentionWeights<const Wide>& w, int width, Wide eps) {
    Tile<Wide> x, affine;
    load_rows(rows, live, width, &x);
    layer_norm(x, w.query_norm, w.query_norm_bias, width, eps, &hat, inverse, &affine);
    linear(affine, w.in, w.in_bias, width, &q);
  }
};

constexpr int64_t tiles_of(int64_t rows) { return (rows + kTileRows - 1) / kTileRows; }
constexpr int live_rows(int64_t first, int64_t rows) {
  return rows - first < kTileRows ? int(rows - first) : kTileRows;
}

// Uninitialised memory.
template <class Wide>
std::unique_ptr<Wide[]> scratch(int64_t size) {
  return std::unique_ptr<Wide[]>(new Wide[static_cast<size_t>(size)]);
}

constexpr int64_t kTokensPerSum = 256;  // summed up by themselves, so that rounding does not pile up
constexpr int64_t kScoresPerThread = 16384;

}  // namespace v05::cpu
