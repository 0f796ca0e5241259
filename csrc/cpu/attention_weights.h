// What query_attention's backward sums up, and the gradients of its weights from these sums.
#pragma once

#include <algorithm>

#include "attention_tile.h"
#include "parallel.h"

namespace v05::cpu {

namespace {

constexpr int64_t kColumns = 256;

// Sums over a prompt's queries, or a chunk of tokens: [width, width + 1] as add_outer leaves them.
constexpr int kSums = kMostWidth * (kMostWidth + 1);
struct Sums {
  double first[kSums] = {}, second[kSums] = {};

  void add(const Sums& other) {
    for (int i = 0; i < kSums; ++i) first[i] += other.first[i], second[i] += other.second[i];
  }
};

template <class Wide>
struct Shared {
  const Wide* grad_features;
  Wide *keys, *grad_keys;   // [heads, tokens, 4]
  Wide* queries;            // [prompts, heads, kQueryRows, padded]
  Wide *grad_kv, *partial;  // [tokens, width], [chunks, width, size]
  Sums *of_prompts, *of_chunks;
  double* grad_bias;  // of the projection: [chunks, kMostWidth]
  int64_t padded;
};

// Weight and bias of a projection from sums of gradient x input.
template <class Wide>
void write_linear(const double* sums, int width, Wide* weight, Wide* bias) {
  for (int i = 0; i < width; ++i) {
    for (int j = 0; j < width; ++j) weight[i * width + j] = Wide(sums[i * (width + 1) + j]);
    bias[i] = Wide(sums[i * (width + 1) + width]);
  }
}

// The same where the input is hat * scale + shift, and scale and shift themselves, from sums of gradient x hat.
template <class Wide>
void write_normalised(const double* sums, const Wide* weight, const Wide* scale, const Wide* shift, int width,
                      Wide* grad_weight, Wide* grad_bias, Wide* grad_scale, Wide* grad_shift) {
  for (int j = 0; j < width; ++j) {
    double by_scale = 0, by_shift = 0;
    for (int i = 0; i < width; ++i) {
      const double along = sums[i * (width + 1) + j], total = sums[i * (width + 1) + width];
      by_scale += weight[i * width + j] * along;
      by_shift += weight[i * width + j] * total;
      grad_weight[i * width + j] = Wide(along * scale[j] + total * shift[j]);
      grad_bias[i] = Wide(total);
    }
    grad_scale[j] = Wide(by_scale);
    grad_shift[j] = Wide(by_shift);
  }
}

template <class T, class Wide>
void write_weights(const AttentionInputs<T, Wide>& in, const Shared<Wide>& by, int64_t chunks,
                   const AttentionWeights<Wide>& grad) {
  const int width = in.width();
  const int64_t square = width * width;
  Sums queries, tokens;
  for (int64_t b = 0; b < in.prompts; ++b) queries.add(by.of_prompts[b]);
  for (int64_t chunk = 0; chunk < chunks; ++chunk) tokens.add(by.of_chunks[chunk]);
  write_linear(queries.first, width, grad.out, grad.out_bias);
  write_normalised(queries.second, in.weights.in, in.weights.query_norm, in.weights.query_norm_bias, width, grad.in,
                   grad.in_bias, grad.query_norm, grad.query_norm_bias);
  write_normalised(tokens.first, in.weights.in + square, in.weights.key_norm, in.weights.key_norm_bias, width,
                   grad.in + square, grad.in_bias + width, grad.key_norm, grad.key_norm_bias);
  write_linear(tokens.second, width, grad.in + 2 * square, grad.in_bias + 2 * width);
  for (int e = 0; e < width; ++e) {
    double sum = 0;
    for (int64_t chunk = 0; chunk < chunks; ++chunk) sum += by.grad_bias[chunk * kMostWidth + e];
    grad.projection_bias[e] = Wide(sum);
  }
  const int64_t elements = width * in.size;
  parallel_for(elements, elements * chunks, kScoresPerThread, [&](int64_t begin, int64_t end) {
    double sum[kColumns];
    for (int64_t first = begin; first < end; first += kColumns) {
      const int64_t n = std::min(kColumns, end - first);
      for (int64_t i = 0; i < n; ++i) sum[i] = 0;
      for (int64_t chunk = 0; chunk < chunks; ++chunk)
        for (int64_t i = 0; i < n; ++i) sum[i] += by.partial[chunk * elements + first + i];
      for (int64_t i = 0; i < n; ++i) grad.projection[first + i] = Wide(sum[i]);
    }
  });
}

}  // namespace

}  // namespace v05::cpu
