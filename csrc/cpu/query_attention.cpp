#include <atomic>

#include "attention_tile.h"
#include "ops.h"
#include "parallel.h"

namespace v05::cpu {

namespace {

constexpr int kRows = 4;            // states projected side by side
constexpr int kSide = 8;            // partial results of a dot product: fixed, so that bits depend on the row alone
constexpr int64_t kColumns = 1024;  // of a row, summed by themselves

// kRows rows of columns in the wide dtype and without a remainder: where they lie, or copied with zeros behind them.
template <class T, class Wide>
V05_INLINE const Wide* whole_sides(const T* x, int64_t n, Wide* copy) {
  if constexpr (std::is_same_v<T, Wide>)
    if (n % kSide == 0) return x;
  for (int64_t i = 0; i < n; ++i) copy[i] = widen(x[i]);
  for (int64_t i = n; i % kSide != 0; ++i) copy[i] = 0;
  return copy;
}

// dot[row][j] += sum over n columns of rows[row] * weights[j], for the kHead outputs of a head.
template <class Wide>
V05_INLINE void add_products(const Wide* const* rows, const Wide* const* weights, int64_t n, Wide (*dot)[kHead]) {
  typedef Wide Side __attribute__((vector_size(kSide * sizeof(Wide)), aligned(alignof(Wide))));
  Side sum[kRows][kHead] = {};
  for (int64_t i = 0; i < n; i += kSide) {
    Side w0 = *reinterpret_cast<const Side*>(weights[0] + i), w1 = *reinterpret_cast<const Side*>(weights[1] + i);
#pragma GCC unroll 4
    for (int row = 0; row < kRows; ++row) {
      Side x = *reinterpret_cast<const Side*>(rows[row] + i);
      sum[row][0] += x * w0;
      sum[row][1] += x * w1;
    }
  }
  for (int row = 0; row < kRows; ++row)
    for (int j = 0; j < kHead; ++j) {
      Wide lanes[kSide];
      __builtin_memcpy(lanes, &sum[row][j], sizeof lanes);
      for (int half = kSide / 2; half > 0; half /= 2)
        for (int lane = 0; lane < half; ++lane) lanes[lane] += lanes[lane + half];
      dot[row][j] += lanes[0];
    }
}

// kv of the tile's live rows: states projection' + bias; 0 in the other lanes.
template <class T, class Wide>
V05_INLINE void project(const AttentionInputs<T, Wide>& in, int64_t first, int live, Tile<Wide>* kv) {
  alignas(64) Wide copy[kRows][kColumns], weight_copy[kHead][kColumns];
  const int width = in.width();
  for (int lane = 0; lane < kTileRows; lane += kRows) {
    for (int e = 0; e < width; ++e)
      for (int row = 0; row < kRows; ++row) kv->at[e][lane + row] = 0;
    if (lane >= live) continue;
    for (int64_t begin = 0; begin < in.size; begin += kColumns) {
      const int64_t n = std::min(kColumns, in.size - begin), whole = (n + kSide - 1) / kSide * kSide;
      const Wide* rows[kRows];
      for (int row = 0; row < kRows; ++row) {
        int64_t t = first + std::min(lane + row, live - 1);
        rows[row] = whole_sides(in.states + t * in.stride + begin, n, copy[row]);
      }
      for (int e = 0; e < width; e += kHead) {
        const Wide* weights[kHead];
        for (int j = 0; j < kHead; ++j)
          weights[j] = whole_sides(in.weights.projection + (e + j) * in.size + begin, n, weight_copy[j]);
        Wide dot[kRows][kHead] = {};
        add_products(rows, weights, whole, dot);
        for (int j = 0; j < kHead; ++j)
          for (int row = 0; row < kRows; ++row) kv->at[e + j][lane + row] += dot[row][j];
      }
    }
  }
  for (int e = 0; e < width; ++e)
    for (int lane = 0; lane < kTileRows; ++lane)
      kv->at[e][lane] = zero_unless(lane < live, kv->at[e][lane] + in.weights.projection_bias[e]);
}

template <class Wide>
V05_INLINE bool finite(const Tile<Wide>& x, int width) {
  int32_t bad[kTileRows] = {}, any = 0;
  for (int e = 0; e < width; ++e)
    for (int lane = 0; lane < kTileRows; ++lane) bad[lane] |= x.at[e][lane] - x.at[e][lane] != 0;
  for (int lane = 0; lane < kTileRows; ++lane) any |= bad[lane];
  return !any;
}

// Projects tiles of tokens and makes their keys and values; *bad where one is not finite.
template <class T>
struct MakeKeys {
  using Wide = WideOf<T>;

  static V05_INLINE void run(AttentionInputs<T, Wide> in, Wide* kv, Wide* keys, int64_t begin, int64_t end, bool* bad) {
    Tile<Wide> x;
    Keys<Wide> made;
    const int width = in.width();
    for (int64_t tile = begin; tile < end; ++tile) {
      const int64_t first = tile * kTileRows;
      const int live = live_rows(first, in.tokens);
      project(in, first, live, &x);
      store_rows(x, live, width, kv + first * width);
      made.make(x, in.weights, width, in.eps);
      made.store(live, width, first, in.tokens, keys);
      *bad |= !finite(x, width);
    }
  }
};

// Projects tiles of queries, 1 / sqrt(kHead) included: q [prompts, width, tiles * kTileRows].
template <class T>
struct MakeQueries {
  using Wide = WideOf<T>;

  static V05_INLINE void run(AttentionInputs<T, Wide> in, Wide* q, int64_t begin, int64_t end) {
    ProjectedQueries<Wide> made;
    const int width = in.width();
    const int64_t tiles = tiles_of(in.count);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t b = i / tiles, first = i % tiles * kTileRows;
      made.make(in.queries + (b * in.count + first) * width, live_rows(first, in.count), in.weights, width, in.eps);
      for (int e = 0; e < width; ++e)
        for (int lane = 0; lane < kTileRows; ++lane)
          q[(b * width + e) * tiles * kTileRows + first + lane] = made.q.at[e][lane] * Wide(kScoreScale);
    }
  }
};

// A tile of queries of one head and prompt: the largest score first, then the sums of powers relative to it.
template <class Wide>
struct Attend {
  alignas(64) Wide q0[kTileRows], q1[kTileRows], largest[kTileRows];
  alignas(64) Wide sum[kTileRows], first[kTileRows], second[kTileRows];

  V05_INLINE void find_largest(const Wide* keys, int64_t tokens) {
    Wide most[kTileRows];
    for (int lane = 0; lane < kTileRows; ++lane) most[lane] = -std::numeric_limits<Wide>::infinity();
    for (int64_t t = 0; t < tokens; ++t) {
      const Wide k0 = keys[4 * t], k1 = keys[4 * t + 1];
      for (int lane = 0; lane < kTileRows; ++lane) {
        Wide score = q0[lane] * k0 + q1[lane] * k1;
        most[lane] = score > most[lane] ? score : most[lane];
      }
    }
    for (int lane = 0; lane < kTileRows; ++lane) largest[lane] = most[lane];
  }

  V05_INLINE void add_tokens(const Wide* keys, int64_t tokens) {
    Wide total[kTileRows] = {}, v_first[kTileRows] = {}, v_second[kTileRows] = {};
    for (int64_t t = 0; t < tokens; ++t) {
      const Wide k0 = keys[4 * t], k1 = keys[4 * t + 1], v0 = keys[4 * t + 2], v1 = keys[4 * t + 3];
      for (int lane = 0; lane < kTileRows; ++lane) {
        Wide power = exp_negative(q0[lane] * k0 + q1[lane] * k1 - largest[lane]);
        total[lane] += power;
        v_first[lane] += power * v0;
        v_second[lane] += power * v1;
      }
    }
    for (int lane = 0; lane < kTileRows; ++lane) {
      sum[lane] += total[lane];
      first[lane] += v_first[lane];
      second[lane] += v_second[lane];
    }
  }
};

// Items are (tile of queries, head, prompt), the prompt running fastest: ragged prompts spread over the threads.
template <class T>
struct AttendAll {
  using Wide = WideOf<T>;

  static V05_INLINE void run(AttentionInputs<T, Wide> in, AttentionSaved<Wide> saved, const Wide* q, const Wide* keys,
                             int64_t begin, int64_t end) {
    Attend<Wide> by;
    const int64_t padded = tiles_of(in.count) * kTileRows;
    for (int64_t i = begin; i < end; ++i) {
      const int64_t b = i % in.prompts, head = i / in.prompts % in.heads, tile = i / in.prompts / in.heads;
      const int64_t first = tile * kTileRows, tokens = in.offsets[b + 1] - in.offsets[b], row = b * in.heads + head;
      const int live = live_rows(first, in.count);
      const Wide* own_keys = keys + (head * in.tokens + in.offsets[b]) * 2 * kHead;
      for (int lane = 0; lane < kTileRows; ++lane) {
        by.q0[lane] = q[row * kHead * padded + first + lane];
        by.q1[lane] = q[(row * kHead + 1) * padded + first + lane];
        by.largest[lane] = by.sum[lane] = by.first[lane] = by.second[lane] = 0;
      }
      if (tokens > 0) by.find_largest(own_keys, tokens);
      for (int64_t t = 0; t < tokens; t += kTokensPerSum)
        by.add_tokens(own_keys + t * 2 * kHead, std::min(kTokensPerSum, tokens - t));
      for (int lane = 0; lane < live; ++lane) {
        const Wide inverse = tokens > 0 ? Wide(1) / by.sum[lane] : Wide(0);
        saved.largest[row * in.count + first + lane] = by.largest[lane];
        saved.inverse[row * in.count + first + lane] = inverse;
        saved.attended[row * kHead * in.count + first + lane] = by.first[lane] * inverse;
        saved.attended[(row * kHead + 1) * in.count + first + lane] = by.second[lane] * inverse;
      }
    }
  }
};

// The output projection of tiles of queries; *bad where one is not finite.
template <class T>
struct Finish {
  using Wide = WideOf<T>;

  static V05_INLINE void run(AttentionInputs<T, Wide> in, const Wide* attended, Wide* features, int64_t begin,
                             int64_t end, bool* bad) {
    Tile<Wide> x, y;
    const int width = in.width();
    const int64_t tiles = tiles_of(in.count);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t b = i / tiles, first = i % tiles * kTileRows;
      const int live = live_rows(first, in.count);
      for (int e = 0; e < width; ++e)
        for (int lane = 0; lane < kTileRows; ++lane)
          x.at[e][lane] = lane < live ? attended[(b * width + e) * in.count + first + lane] : Wide(0);
      linear(x, in.weights.out, in.weights.out_bias, width, &y);
      store_rows(y, live, width, features + (b * in.count + first) * width);
      *bad |= !finite(y, width);
    }
  }
};

bool valid(const int64_t* offsets, int64_t prompts, int64_t tokens) {
  for (int64_t b = 0; b < prompts; ++b)
    if (offsets[b + 1] < offsets[b]) return false;
  return offsets[0] == 0 && offsets[prompts] == tokens;
}

template <class Wide>
bool finite(const Wide* values, int64_t n) {
  int32_t bad = 0;
  for (int64_t i = 0; i < n; ++i) bad |= values[i] - values[i] != 0;
  return !bad;
}

template <class Wide>
bool finite(const AttentionWeights<const Wide>& w, int64_t width, int64_t size) {
  bool norms = finite(w.query_norm, width) && finite(w.query_norm_bias, width) && finite(w.key_norm, width) &&
               finite(w.key_norm_bias, width);
  return norms && finite(w.projection, width * size) && finite(w.projection_bias, width) &&
         finite(w.in, 3 * width * width) && finite(w.in_bias, 3 * width) && finite(w.out, width * width) &&
         finite(w.out_bias, width);
}

}  // namespace

template <class T>
bool query_attention(const AttentionInputs<T, WideOf<T>>& in, const AttentionSaved<WideOf<T>>& saved,
                     WideOf<T>* features) {
  using Wide = WideOf<T>;
  if (!valid(in.offsets, in.prompts, in.tokens)) return false;
  const int64_t width = in.width(), tiles = tiles_of(in.count), rows = in.prompts * in.count;
  std::atomic<bool> good{finite(in.weights, width, in.size) && finite(in.queries, rows * width)};
  auto keys = scratch<Wide>(in.tokens * 2 * width), q = scratch<Wide>(in.prompts * width * tiles * kTileRows);
  parallel_for(tiles_of(in.tokens), in.tokens * in.size, kScoresPerThread, [&](int64_t begin, int64_t end) {
    bool bad = false;
    vectorised<MakeKeys<T>>(in, saved.kv, keys.get(), begin, end, &bad);
    if (bad) good = false;
  });
  parallel_for(in.prompts * tiles, rows * width, kScoresPerThread,
               [&](int64_t begin, int64_t end) { vectorised<MakeQueries<T>>(in, q.get(), begin, end); });
  parallel_for(tiles * in.heads * in.prompts, in.count * in.heads * in.tokens, kScoresPerThread,
               [&](int64_t begin, int64_t end) {
                 vectorised<AttendAll<T>>(in, saved, static_cast<const Wide*>(q.get()),
                                          static_cast<const Wide*>(keys.get()), begin, end);
               });
  parallel_for(in.prompts * tiles, rows * width, kScoresPerThread, [&](int64_t begin, int64_t end) {
    bool bad = false;
    vectorised<Finish<T>>(in, static_cast<const Wide*>(saved.attended), features, begin, end, &bad);
    if (bad) good = false;
  });
  return good;
}

#define V05_INSTANTIATE(T) \
  template bool query_attention<T>(const AttentionInputs<T, WideOf<T>>&, const AttentionSaved<WideOf<T>>&, WideOf<T>*);
V05_INSTANTIATE(float)
V05_INSTANTIATE(double)
V05_INSTANTIATE(BFloat16)
V05_INSTANTIATE(Float16)

}  // namespace v05::cpu
