// A tile of tokens and the branch-free loops that policy_loss.cpp sends it through. A tile always runs at full length,
// its end filled with masked tokens, so that a token's bits do not depend on where in the batch it is.
#pragma once

#include <cstring>
#include <limits>
#include <memory>
#include <type_traits>

#include "ops.h"
#include "vector_math.h"

namespace v05::cpu {

constexpr int64_t kTile = 512;

struct Sums {
  double field[kPolicySums] = {};
  bool bad = false;
};

// What a sequence's tokens share: its log-ratio's mean as a ratio, the sampler's weight, how many are not masked; and,
// by token, the derivative of the loss by the sequence's ratio. Only where an option works on whole sequences.
template <class T>
struct SequenceState {
  std::unique_ptr<T[]> ratio, correction, by_ratio;
  std::unique_ptr<int64_t[]> kept;
};

template <class T>
struct alignas(64) Tile {
  T logprob[kTile], weight[kTile], x[kTile], moves[kTile], ratio[kTile], advantage[kTile], correction[kTile];
  T scratch[kTile], selected[kTile], value[kTile], by_ratio[kTile], by_logprob[kTile], kl[kTile], kl_slope[kTile];
};

template <class T>
using Flag = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;  // as wide as T, so that counting vectorises

template <class T>
V05_INLINE Flag<T> flag(bool raised) {
  return raised ? 1 : 0;
}

// Sum of n values in float64, in an order that depends on n alone: 16 running sums, then the rest.
template <class T>
V05_INLINE double lane_sum(const T* values, int64_t n) {
  typedef T Narrow __attribute__((vector_size(4 * sizeof(T))));
  typedef double Wide __attribute__((vector_size(4 * sizeof(double))));
  Wide sums[4] = {};
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) {
    for (int64_t j = 0; j < 4; ++j) {
      Narrow four;
      std::memcpy(&four, values + i + 4 * j, sizeof four);
      sums[j] += __builtin_convertvector(four, Wide);
    }
  }
  Wide four = (sums[0] + sums[1]) + (sums[2] + sums[3]);
  double sum = (four[0] + four[1]) + (four[2] + four[3]);
  for (; i < n; ++i) sum += double(values[i]);
  return sum;
}

// Gives each token of [begin, begin + count) its sequence's value; `s` is at or before the first one's sequence.
template <class T>
V05_INLINE void spread(const T* values, const int64_t* offsets, int64_t begin, int64_t count, int64_t s, T* out) {
  for (int64_t i = 0; i < count;) {
    while (offsets[s + 1] <= begin + i) ++s;
    int64_t stop = offsets[s + 1] - begin < count ? offsets[s + 1] - begin : count;
    for (T value = values[s]; i < stop; ++i) out[i] = value;
  }
}

// Fills the tile with tokens [begin, begin + count) and counts those not masked; masked ones become zeros, whatever is
// in them.
template <class T>
V05_INLINE int64_t load(const PolicyInputs<T>& in, int64_t begin, int64_t count, int64_t s, Tile<T>& tile, Sums& sums) {
  const T infinity = std::numeric_limits<T>::infinity();
  const bool multiplies = in.surrogate == Surrogate::cispo || in.surrogate == Surrogate::gpg;
  const T lowest = multiplies ? std::numeric_limits<T>::lowest() : -infinity;
  if (count < kTile) std::memset(static_cast<void*>(&tile), 0, sizeof tile);
  const T* __restrict logprobs = in.logprobs + begin, * __restrict old = in.old_logprobs + begin;
  const T* __restrict weights = in.weights + begin;
  if (in.advantage_per_token)
    std::memcpy(tile.advantage, in.advantages + begin, size_t(count) * sizeof(T));
  else
    spread(in.advantages, in.offsets, begin, count, s, tile.advantage);
  Flag<T> kept = 0, bad = 0;
  for (int64_t i = 0; i < count; ++i) {
    T l = logprobs[i], o = old[i], a = tile.advantage[i], weight = weights[i];
    bool keep = weight != T(0);
    l = keep ? l : T(0), o = keep ? o : T(0), a = keep ? a : T(0);
    tile.logprob[i] = l, tile.scratch[i] = o, tile.advantage[i] = a, tile.weight[i] = weight;
  }
  for (int64_t i = 0; i < kTile; ++i) {
    Slope<T> x = log_ratio(tile.logprob[i], tile.scratch[i]);
    tile.x[i] = x.value, tile.moves[i] = x.slope;
  }
  for (int64_t i = 0; i < kTile; ++i) {
    T l = tile.logprob[i], o = tile.scratch[i], a = tile.advantage[i], weight = tile.weight[i];
    kept += flag<T>(weight != T(0));
    bad |= flag<T>(!(l < infinity)) | flag<T>(l < lowest) | flag<T>(!(o < infinity));
    bad |= flag<T>(!(std::fabs(a) < infinity)) | flag<T>(!(std::fabs(weight) < infinity));
  }
  if (in.selected) {
    const uint8_t* __restrict selected = in.selected + begin;
    for (int64_t i = 0; i < count; ++i) tile.selected[i] = T(selected[i]);
    for (int64_t i = 0; i < kTile; ++i) tile.selected[i] = tile.weight[i] != T(0) ? tile.selected[i] : T(0);
  }
  sums.field[kTokens] += double(kept);
  sums.field[kRatio] -= double(kTile - kept);  // masked tokens will add a ratio of 1 each
  sums.bad |= bad != 0;
  return kept;
}

// Ratios and sampler weights; a masked token has ratio 1 and sampler weight 0.
template <class T>
V05_INLINE void ratios(const PolicyInputs<T>& in, const SequenceState<T>& state, int64_t begin, int64_t count,
                       int64_t s, int64_t kept, Tile<T>& tile, Sums& sums) {
  if (in.sequence_level) {
    spread(state.ratio.get(), in.offsets, begin, count, s, tile.ratio);
    for (int64_t i = 0; i < kTile; ++i) tile.ratio[i] = tile.weight[i] != T(0) ? tile.ratio[i] : T(1);
  } else {
    for (int64_t i = 0; i < kTile; ++i) tile.ratio[i] = exp_fast(tile.x[i]);
  }
  if (in.correction == Correction::none) {
    for (int64_t i = 0; i < kTile; ++i) tile.correction[i] = tile.weight[i] != T(0) ? T(1) : T(0);
    sums.field[kSamplerWeight] = sums.field[kTokens];
    return;
  }
  const bool mask_outside = masks(in.correction);
  const PolicyNumbers<T> numbers = in.numbers;
  if (whole_sequence(in.correction)) {
    spread(state.correction.get(), in.offsets, begin, count, s, tile.correction);
  } else {
    const T* __restrict sampler = in.sampler_logprobs + begin, * __restrict old = in.old_logprobs + begin;
    Flag<T> bad = 0;
    for (int64_t i = 0; i < count; ++i) {
      bool keep = tile.weight[i] != T(0);
      T v = sampler[i], o = old[i];
      v = keep ? v : T(0), o = keep ? o : T(0);
      tile.scratch[i] = log_ratio(o, v).value;
      bad |= flag<T>(!(v < std::numeric_limits<T>::infinity()));
    }
    sums.bad |= bad != 0;
    for (int64_t i = 0; i < kTile; ++i)
      tile.correction[i] = sampler_weight(exp_fast(tile.scratch[i]), mask_outside, numbers);
  }
  for (int64_t i = 0; i < kTile; ++i) tile.correction[i] = tile.weight[i] != T(0) ? tile.correction[i] : T(0);
  Flag<T> passed = 0;
  for (int64_t i = 0; i < kTile; ++i) passed += flag<T>(tile.correction[i] != T(0));
  sums.field[kSamplerMasked] += mask_outside ? double(kept - passed) : 0;
  sums.field[kSamplerWeight] += lane_sum(tile.correction, kTile);
}

template <Surrogate kind, class T>
V05_INLINE void surrogate(PolicyNumbers<T> numbers, Tile<T>& tile, Sums& sums) {
  Flag<T> low = 0, high = 0, dual = 0;
  if constexpr (kind == Surrogate::sapo)
    for (int64_t i = 0; i < kTile; ++i)
      tile.scratch[i] = exp_fast(sapo_exponent(tile.ratio[i], tile.advantage[i], numbers));
  for (int64_t i = 0; i < kTile; ++i) {
    PolicyTerm<T> term = policy_term<kind>(PolicyToken<T>{tile.logprob[i], tile.x[i], tile.moves[i], tile.ratio[i],
                                                          tile.advantage[i], tile.scratch[i], tile.selected[i]},
                                           numbers);
    tile.value[i] = term.value, tile.by_ratio[i] = term.by_ratio, tile.by_logprob[i] = term.by_logprob;
    low += flag<T>(term.low), high += flag<T>(term.high), dual += flag<T>(term.dual);
  }
  sums.field[kClippedLow] += double(low), sums.field[kClippedHigh] += double(high);
  sums.field[kDualClipped] += double(dual);
  if constexpr (kind == Surrogate::clip_cov || kind == Surrogate::kl_cov)
    sums.field[kSelected] += lane_sum(tile.selected, kTile);
}

template <Kl kind, class T>
V05_INLINE void kl(const PolicyInputs<T>& in, int64_t begin, int64_t count, Tile<T>& tile, Sums& sums) {
  const T infinity = std::numeric_limits<T>::infinity();
  const T* __restrict ref = in.ref_logprobs + begin;
  Flag<T> bad = 0;
  for (int64_t i = 0; i < count; ++i) {
    T q = ref[i], l = tile.logprob[i];
    q = tile.weight[i] != T(0) ? q : T(0);
    tile.kl[i] = q;
    bad |= flag<T>(!(q < infinity));
    if constexpr (kind != Kl::k3) bad |= flag<T>(q != l) & flag<T>(!(std::fabs(q - l) < infinity));
  }
  sums.bad |= bad != 0;
  constexpr bool needs_power = kind == Kl::k3 || kind == Kl::k3_plus;
  if constexpr (needs_power)
    for (int64_t i = 0; i < kTile; ++i) tile.scratch[i] = exp_fast(log_ratio(tile.kl[i], tile.logprob[i]).value);
  for (int64_t i = 0; i < kTile; ++i) {
    T gap = tile.kl[i] - tile.logprob[i], y = gap == gap ? gap : T(0);  // equal infinities differ by 0, without slope
    Slope<T> term = kl_term<kind>(y, log_ratio(tile.kl[i], tile.logprob[i]), tile.scratch[i]);
    tile.kl[i] = tile.weight[i] != T(0) ? term.value : T(0);
    tile.kl_slope[i] = gap == gap ? term.slope : T(0);
  }
  sums.field[kKl] += lane_sum(tile.kl, kTile);
}

template <class T>
V05_INLINE void kl_switch(const PolicyInputs<T>& in, int64_t begin, int64_t count, Tile<T>& tile, Sums& sums) {
  switch (in.kl) {
    case Kl::none:
      break;
    case Kl::k1:
      return kl<Kl::k1>(in, begin, count, tile, sums);
    case Kl::k2:
      return kl<Kl::k2>(in, begin, count, tile, sums);
    case Kl::k3:
      return kl<Kl::k3>(in, begin, count, tile, sums);
    case Kl::k1_plus:
      return kl<Kl::k1_plus>(in, begin, count, tile, sums);
    case Kl::k3_plus:
      return kl<Kl::k3_plus>(in, begin, count, tile, sums);
  }
}

template <class T>
V05_INLINE void surrogate_switch(const PolicyInputs<T>& in, Tile<T>& tile, Sums& sums) {
  switch (in.surrogate) {
    case Surrogate::ppo:
      return surrogate<Surrogate::ppo>(in.numbers, tile, sums);
    case Surrogate::cispo:
      return surrogate<Surrogate::cispo>(in.numbers, tile, sums);
    case Surrogate::sapo:
      return surrogate<Surrogate::sapo>(in.numbers, tile, sums);
    case Surrogate::gpg:
      return surrogate<Surrogate::gpg>(in.numbers, tile, sums);
    case Surrogate::clip_cov:
      return surrogate<Surrogate::clip_cov>(in.numbers, tile, sums);
    case Surrogate::kl_cov:
      return surrogate<Surrogate::kl_cov>(in.numbers, tile, sums);
  }
}

// Weighs a tile's terms into its loss and gradient; at the level of sequences, by_ratio waits for the whole sequence.
template <class T>
V05_INLINE void combine(const PolicyInputs<T>& in, SequenceState<T>& state, int64_t begin, int64_t count, Tile<T>& tile,
                        T* gradient, Sums& sums) {
  const T coef = in.numbers.kl_coef;
  const bool with_kl = in.kl != Kl::none;
  for (int64_t i = 0; i < kTile; ++i) {
    T weight = tile.weight[i], scale = weight * tile.correction[i];
    T penalty = with_kl ? coef * tile.kl[i] : T(0), penalty_slope = with_kl ? coef * tile.kl_slope[i] : T(0);
    tile.value[i] = scale * tile.value[i] + weight * penalty;
    tile.by_logprob[i] = scale * tile.by_logprob[i] + weight * penalty_slope;
    tile.by_ratio[i] = scale * tile.by_ratio[i];
  }
  if (in.sequence_level)
    std::memcpy(&state.by_ratio[size_t(begin)], tile.by_ratio, size_t(count) * sizeof(T));
  else
    for (int64_t i = 0; i < kTile; ++i) tile.by_logprob[i] += tile.moves[i] * tile.by_ratio[i];
  std::memcpy(gradient + begin, tile.by_logprob, size_t(count) * sizeof(T));
  sums.field[kLoss] += lane_sum(tile.value, kTile);
  sums.field[kLogRatio] += lane_sum(tile.x, kTile);
  sums.field[kRatio] += lane_sum(tile.ratio, kTile);
}

}  // namespace v05::cpu
