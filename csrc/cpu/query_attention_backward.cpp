#include "attention_tile.h"
#include "attention_weights.h"
#include "memory.h"
#include "ops.h"
#include "parallel.h"

namespace v05::cpu {

namespace {

constexpr int64_t kChunk = 512;  // tokens whose share of the weights' gradients is summed by itself
constexpr int kTokens = 2;       // worked on together, so that queries are read half as often

// A row per number that the backward reads of a query and head, padded to whole tiles: the scaled query, the largest
// score, the gradient by what it attended and its product with that (both over the sum of powers), and the gradient by
// the scaled query, which is written.
enum QueryRow { kQ0, kQ1, kLargest, kG0, kG1, kDelta, kGradQ0, kGradQ1, kQueryRows };

template <class T>
struct MakeKeys {
  using Wide = WideOf<T>;

  static V05_INLINE void run(AttentionInputs<T, Wide> in, const Wide* kv, Wide* keys, int64_t begin, int64_t end) {
    Tile<Wide> x;
    Keys<Wide> made;
    for (int64_t first = begin * kTileRows; first < end * kTileRows; first += kTileRows) {
      const int live = live_rows(first, in.tokens);
      load_rows(kv + first * in.width(), live, in.width(), &x);
      made.make(x, in.weights, in.width(), in.eps);
      made.store(live, in.width(), first, in.tokens, keys);
    }
  }
};

// Rows of the queries of whole prompts; sums over them of gradient x attended, for the output projection.
template <class T>
struct MakeQueries {
  using Wide = WideOf<T>;

  static V05_INLINE void run(AttentionInputs<T, Wide> in, AttentionSaved<const Wide> saved, Shared<Wide> by,
                             int64_t begin, int64_t end) {
    ProjectedQueries<Wide> made;
    Tile<Wide> grad, attended, by_attended;
    const int width = in.width();
    for (int64_t b = begin; b < end; ++b)
      for (int64_t first = 0; first < in.count; first += kTileRows) {
        const int live = live_rows(first, in.count);
        const int64_t begin_row = (b * in.count + first) * width;
        made.make(in.queries + begin_row, live, in.weights, width, in.eps);
        load_rows(by.grad_features + begin_row, live, width, &grad);
        linear_backward(grad, in.weights.out, width, false, &by_attended);
        for (int e = 0; e < width; ++e)
          for (int lane = 0; lane < kTileRows; ++lane)
            attended.at[e][lane] = lane < live ? saved.attended[(b * width + e) * in.count + first + lane] : Wide(0);
        add_outer(grad, attended, live, width, by.of_prompts[b].first);
        for (int head = 0; head < in.heads; ++head) {
          Wide* rows = by.queries + (b * in.heads + head) * kQueryRows * by.padded + first;
          const int64_t own = (b * in.heads + head) * in.count + first;
          const int e0 = head * kHead, e1 = e0 + 1;
          for (int lane = 0; lane < kTileRows; ++lane) {
            const Wide inverse = lane < live ? saved.inverse[own + lane] : Wide(0);
            const Wide g0 = by_attended.at[e0][lane] * inverse, g1 = by_attended.at[e1][lane] * inverse;
            rows[kQ0 * by.padded + lane] = lane < live ? made.q.at[e0][lane] * Wide(kScoreScale) : Wide(0);
            rows[kQ1 * by.padded + lane] = lane < live ? made.q.at[e1][lane] * Wide(kScoreScale) : Wide(0);
            rows[kLargest * by.padded + lane] = lane < live ? saved.largest[own + lane] : Wide(0);
            rows[kG0 * by.padded + lane] = g0;
            rows[kG1 * by.padded + lane] = g1;
            rows[kDelta * by.padded + lane] = g0 * attended.at[e0][lane] + g1 * attended.at[e1][lane];
            rows[kGradQ0 * by.padded + lane] = rows[kGradQ1 * by.padded + lane] = 0;
          }
        }
      }
  }
};

// Two tokens against all queries of their prompt and head: ds = p (g v - delta), dq += ds k, dk = sum ds q,
// dv = sum p g. The second counts only where `both`.
template <class Wide>
V05_INLINE void attend_backward(const Wide* keys, bool both, const Wide* rows, int64_t padded, Wide* grad_q,
                                Wide* grad_keys) {
  Wide sum[kTokens * 2 * kHead][kTileRows] = {};
  const Wide k0 = keys[0], k1 = keys[1], v0 = keys[2], v1 = keys[3];
  const Wide next_k0 = keys[4], next_k1 = keys[5], next_v0 = keys[6], next_v1 = keys[7];
  for (int64_t first = 0; first < padded; first += kTileRows) {
    const Wide *q0s = rows + kQ0 * padded + first, *q1s = rows + kQ1 * padded + first;
    const Wide *g0s = rows + kG0 * padded + first, *g1s = rows + kG1 * padded + first;
    const Wide *most = rows + kLargest * padded + first, *deltas = rows + kDelta * padded + first;
    Wide along0[kTileRows], along1[kTileRows];
    for (int lane = 0; lane < kTileRows; ++lane) {
      const Wide q0 = q0s[lane], q1 = q1s[lane], g0 = g0s[lane], g1 = g1s[lane];
      const Wide largest = most[lane], delta = deltas[lane];
      const Wide power = exp_negative(q0 * k0 + q1 * k1 - largest);
      const Wide next_power = zero_unless(both, exp_negative(q0 * next_k0 + q1 * next_k1 - largest));
      const Wide slope = power * (g0 * v0 + g1 * v1 - delta);
      const Wide next_slope = next_power * (g0 * next_v0 + g1 * next_v1 - delta);
      along0[lane] = slope * k0 + next_slope * next_k0;
      along1[lane] = slope * k1 + next_slope * next_k1;
      sum[0][lane] += slope * q0;
      sum[1][lane] += slope * q1;
      sum[2][lane] += power * g0;
      sum[3][lane] += power * g1;
      sum[4][lane] += next_slope * q0;
      sum[5][lane] += next_slope * q1;
      sum[6][lane] += next_power * g0;
      sum[7][lane] += next_power * g1;
    }
    for (int lane = 0; lane < kTileRows; ++lane) grad_q[first + lane] += along0[lane];
    for (int lane = 0; lane < kTileRows; ++lane) grad_q[padded + first + lane] += along1[lane];
  }
  for (int j = 0; j < kTokens * 2 * kHead; ++j) grad_keys[j] = sum_of_tile(sum[j]);
}

// Items are (head, prompt), the prompt running fastest. An odd last token is joined by itself, which does not count.
template <class T>
struct AttendBackward {
  using Wide = WideOf<T>;

  static V05_INLINE void run(AttentionInputs<T, Wide> in, Shared<Wide> by, Wide* grad_q, int64_t begin, int64_t end) {
    constexpr int kPair = kTokens * 2 * kHead;
    for (int64_t i = begin; i < end; ++i) {
      const int64_t b = i % in.prompts, head = i / in.prompts, last = in.offsets[b + 1];
      Wide* rows = by.queries + (b * in.heads + head) * kQueryRows * by.padded;
      const int64_t place = head * in.tokens;
      for (int64_t chunk = in.offsets[b]; chunk < last; chunk += kTokensPerSum) {
        const int64_t stop = std::min(last, chunk + kTokensPerSum);
        for (int64_t j = 0; j < kHead * by.padded; ++j) grad_q[j] = 0;
        for (int64_t t = chunk; t < stop; t += kTokens) {
          Wide pair[kPair], grad_pair[kPair];
          const bool both = t + 1 < stop;
          const int64_t at = (place + t) * 2 * kHead;
          for (int64_t j = 0; j < kPair; ++j) pair[j] = by.keys[at + (both ? j : j % (2 * kHead))];
          attend_backward(pair, both, rows, by.padded, grad_q, grad_pair);
          for (int64_t j = 0; j < (both ? kPair : 2 * kHead); ++j) by.grad_keys[at + j] = grad_pair[j];
        }
        for (int64_t j = 0; j < kHead * by.padded; ++j) rows[kGradQ0 * by.padded + j] += grad_q[j];
      }
    }
  }
};

// From the gradient by projected queries to that by the queries given; sums over it for the query projection.
template <class T>
struct FinishQueries {
  using Wide = WideOf<T>;

  static V05_INLINE void run(AttentionInputs<T, Wide> in, Shared<Wide> by, Wide* grad_queries, int64_t begin,
                             int64_t end) {
    ProjectedQueries<Wide> made;
    Tile<Wide> grad, by_affine, by_row;
    const int width = in.width();
    for (int64_t b = begin; b < end; ++b)
      for (int64_t first = 0; first < in.count; first += kTileRows) {
        const int live = live_rows(first, in.count);
        const int64_t begin_row = (b * in.count + first) * width;
        made.make(in.queries + begin_row, live, in.weights, width, in.eps);
        for (int e = 0; e < width; ++e) {
          const int64_t row = (b * in.heads + e / kHead) * kQueryRows + kGradQ0 + e % kHead;
          for (int lane = 0; lane < kTileRows; ++lane)
            grad.at[e][lane] = by.queries[row * by.padded + first + lane] * Wide(kScoreScale);
        }
        add_outer(grad, made.hat, live, width, by.of_prompts[b].second);
        linear_backward(grad, in.weights.in, width, false, &by_affine);
        layer_norm_backward(by_affine, made.hat, made.inverse, in.weights.query_norm, width, &by_row);
        store_rows(by_row, live, width, grad_queries + begin_row);
      }
  }
};

// From the gradient by keys and values to that by kv; sums over it for the key and value projections.
template <class T, class Wide>
V05_INLINE void finish_keys(const AttentionInputs<T, Wide>& in, const Shared<Wide>& by, const Wide* kv, int64_t first,
                            int live, Sums* sums, double* grad_bias) {
  Keys<Wide> made;
  Tile<Wide> x, grad_k, grad_v, by_affine, by_kv;
  const int width = in.width();
  load_rows(kv + first * width, live, width, &x);
  made.make(x, in.weights, width, in.eps);
  for (int e = 0; e < width; ++e) {
    const Wide* grad = by.grad_keys + (e / kHead * in.tokens + first) * 2 * kHead + e % kHead;
    for (int lane = 0; lane < kTileRows; ++lane) {
      grad_k.at[e][lane] = lane < live ? grad[lane * 2 * kHead] : Wide(0);
      grad_v.at[e][lane] = lane < live ? grad[lane * 2 * kHead + kHead] : Wide(0);
    }
  }
  add_outer(grad_k, made.hat, live, width, sums->first);
  add_outer(grad_v, x, live, width, sums->second);
  linear_backward(grad_k, in.weights.in + width * width, width, false, &by_affine);
  layer_norm_backward(by_affine, made.hat, made.inverse, in.weights.key_norm, width, &by_kv);
  linear_backward(grad_v, in.weights.in + 2 * width * width, width, true, &by_kv);
  store_rows(by_kv, live, width, by.grad_kv + first * width);
  for (int e = 0; e < width; ++e) {
    Wide lanes[kTileRows];
    for (int lane = 0; lane < kTileRows; ++lane) lanes[lane] = zero_unless(lane < live, by_kv.at[e][lane]);
    grad_bias[e] += sum_of_tile(lanes);
  }
}

// partial [width, size] += grad_kv' states over tokens first to last, some columns at a time.
template <class T, class Wide>
V05_INLINE void add_projection(const AttentionInputs<T, Wide>& in, const Wide* grad_kv, int64_t first, int64_t last,
                               Wide* partial) {
  constexpr int kGroup = 4;  // tokens
  alignas(64) Wide x[kGroup][kColumns];
  const int width = in.width();
  for (int64_t t = first; t < last; t += kGroup)
    for (int64_t begin = 0; begin < in.size; begin += kColumns) {
      const int64_t n = std::min(kColumns, in.size - begin);
      for (int row = 0; row < kGroup; ++row) {
        const T* state = in.states + std::min(t + row, last - 1) * in.stride + begin;
        for (int64_t i = 0; i < n; ++i) x[row][i] = widen(state[i]);
      }
      for (int e = 0; e < width; ++e) {
        Wide g[kGroup], *__restrict out = partial + e * in.size + begin;
        for (int row = 0; row < kGroup; ++row) g[row] = t + row < last ? grad_kv[(t + row) * width + e] : Wide(0);
        for (int64_t i = 0; i < n; ++i) out[i] += (g[0] * x[0][i] + g[1] * x[1][i]) + (g[2] * x[2][i] + g[3] * x[3][i]);
      }
    }
}

// grad_states of a token: grad_kv projection.
template <class T, class Wide>
V05_INLINE void spread(const AttentionInputs<T, Wide>& in, const Wide* grad_kv, T* out) {
  alignas(64) Wide sum[kColumns];
  for (int64_t begin = 0; begin < in.size; begin += kColumns) {
    const int64_t n = std::min(kColumns, in.size - begin);
    for (int64_t i = 0; i < n; ++i) sum[i] = 0;
    for (int e = 0; e < in.width(); e += kHead) {
      const Wide g0 = grad_kv[e], g1 = grad_kv[e + 1];
      const Wide *w0 = in.weights.projection + e * in.size + begin, *w1 = w0 + in.size;
      for (int64_t i = 0; i < n; ++i) sum[i] += g0 * w0[i] + g1 * w1[i];
    }
    for (int64_t i = 0; i < n; ++i) narrow(sum[i], out + begin + i);
  }
}

template <class T>
struct FinishTokens {
  using Wide = WideOf<T>;

  static V05_INLINE void run(AttentionInputs<T, Wide> in, const Wide* kv, Shared<Wide> by, T* grad_states,
                             int64_t begin, int64_t end) {
    const int width = in.width();
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      const int64_t begin_token = chunk * kChunk, last = std::min(in.tokens, begin_token + kChunk);
      Wide* partial = by.partial + chunk * width * in.size;
      for (int64_t i = 0; i < width * in.size; ++i) partial[i] = 0;
      for (int64_t first = begin_token; first < last; first += kTileRows) {
        const int live = live_rows(first, last);
        finish_keys(in, by, kv, first, live, by.of_chunks + chunk, by.grad_bias + chunk * kMostWidth);
        add_projection(in, by.grad_kv, first, first + live, partial);
        for (int64_t t = first; grad_states && t < first + live; ++t)
          spread(in, by.grad_kv + t * width, grad_states + t * in.size);
      }
    }
  }
};

}  // namespace

template <class T>
void query_attention_backward(const AttentionInputs<T, WideOf<T>>& in, const AttentionSaved<const WideOf<T>>& saved,
                              const WideOf<T>* grad_features, T* grad_states, WideOf<T>* grad_queries,
                              const AttentionWeights<WideOf<T>>& grad_weights) {
  using Wide = WideOf<T>;
  const int64_t width = in.width(), padded = tiles_of(in.count) * kTileRows;
  const int64_t chunks = (in.tokens + kChunk - 1) / kChunk, scores = in.count * in.heads * in.tokens;
  auto keys = scratch<Wide>(in.tokens * 2 * width), grad_keys = scratch<Wide>(in.tokens * 2 * width);
  auto queries = scratch<Wide>(in.prompts * in.heads * kQueryRows * padded);
  auto grad_kv = scratch<Wide>(in.tokens * width), partial = scratch<Wide>(chunks * width * in.size);
  auto of_prompts = std::make_unique<Sums[]>(in.prompts), of_chunks = std::make_unique<Sums[]>(chunks);
  auto grad_bias = std::make_unique<double[]>(chunks * kMostWidth);
  const Shared<Wide> by{grad_features, keys.get(),       grad_keys.get(), queries.get(),   grad_kv.get(),
                        partial.get(), of_prompts.get(), of_chunks.get(), grad_bias.get(), padded};
  if (grad_states) prefer_large_pages(grad_states, in.tokens * in.size * int64_t(sizeof(T)));
  parallel_for(tiles_of(in.tokens), in.tokens * width, kScoresPerThread,
               [&](int64_t begin, int64_t end) { vectorised<MakeKeys<T>>(in, saved.kv, by.keys, begin, end); });
  parallel_for(in.prompts, in.prompts * in.count * width, kScoresPerThread,
               [&](int64_t begin, int64_t end) { vectorised<MakeQueries<T>>(in, saved, by, begin, end); });
  parallel_for(in.heads * in.prompts, scores, kScoresPerThread, [&](int64_t begin, int64_t end) {
    auto grad_q = scratch<Wide>(kHead * padded);
    vectorised<AttendBackward<T>>(in, by, grad_q.get(), begin, end);
  });
  parallel_for(in.prompts, in.prompts * in.count * width, kScoresPerThread,
               [&](int64_t begin, int64_t end) { vectorised<FinishQueries<T>>(in, by, grad_queries, begin, end); });
  parallel_for(chunks, in.tokens * in.size, kScoresPerThread, [&](int64_t begin, int64_t end) {
    vectorised<FinishTokens<T>>(in, saved.kv, by, grad_states, begin, end);
  });
  write_weights(in, by, chunks, grad_weights);
}

#define V05_INSTANTIATE(T)                                                                                            \
  template void query_attention_backward<T>(const AttentionInputs<T, WideOf<T>>&,                                     \
                                            const AttentionSaved<const WideOf<T>>&, const WideOf<T>*, T*, WideOf<T>*, \
                                            const AttentionWeights<WideOf<T>>&);
V05_INSTANTIATE(float)
V05_INSTANTIATE(double)
V05_INSTANTIATE(BFloat16)
V05_INSTANTIATE(Float16)

}  // namespace v05::cpu
