// A tile of tokens on its way through policy_loss.cpp, and what its tokens share with others of their sequence.
#pragma once

#include <cstring>
#include <limits>
#include <memory>
#include <type_traits>

#include "ops.h"
#include "vector_math.h"

namespace v05::cpu {

constexpr int64_t kTile = 512;
constexpr int64_t kLanes = 32;  // more than 16, which g++ unrolls before it could vectorise

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

// By token: advantage, the sampler's weight, ratio at the level of sequences, and 1 where its covariance is selected;
// and two buffers for sums over whole sequences.
template <class T>
struct alignas(64) Tile {
  T advantage[kTile], correction[kTile], ratio[kTile], selected[kTile], x[kTile], scratch[kTile];
};

template <class T>
using Flag = std::conditional_t<sizeof(T) == 4, int32_t,
                                int64_t>;  // as wide as T, so that counting vectorises

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

// One sum a lane, of at most kTile / kLanes values each; added up in float64.
template <class T>
struct LaneSums {
  T lane[kLanes] = {};

  V05_INLINE double total() const { return lane_sum(lane, kLanes); }
};

// kLanes elements from where they are, or, at the end of the tokens, `count` of them and zeros.
template <class T>
V05_INLINE const T* lanes(const T* from, int64_t count, T* padded) {
  if (count >= kLanes) return from;
  for (int64_t i = 0; i < kLanes; ++i) padded[i] = i < count ? from[i] : T(0);
  return padded;
}

// The other way.
template <class T>
V05_INLINE void store_lanes(const T* values, int64_t count, T* to) {
  if (count >= kLanes)
    std::memcpy(to, values, kLanes * sizeof(T));
  else
    for (int64_t i = 0; i < count; ++i) to[i] = values[i];
}

// What the tokens [begin, begin + count) share with others of their sequence, and the sampler's weights. `s` is at or
// before the first one's sequence.
template <class T>
V05_INLINE void spread_all(const PolicyInputs<T>& in, const SequenceState<T>& state, int64_t begin, int64_t count,
                           int64_t s, Tile<T>& tile, Sums& sums) {
  if (in.advantage_per_token)
    std::memcpy(tile.advantage, in.advantages + begin, size_t(count) * sizeof(T));
  else
    spread(in.advantages, in.offsets, begin, count, s, tile.advantage);
  if (in.sequence_level) spread(state.ratio.get(), in.offsets, begin, count, s, tile.ratio);
  const T* __restrict weights = in.weights + begin;
  if (in.selected) {
    const uint8_t* __restrict selected = in.selected + begin;
    for (int64_t i = 0; i < count; ++i) tile.selected[i] = one_if<T>((weights[i] != T(0)) & (selected[i] != 0));
    sums.field[kSelected] += lane_sum(tile.selected, count);
  }
  if (in.correction == Correction::none) return;
  const bool mask_outside = masks(in.correction);
  Flag<T> kept = 0, passed = 0, bad = 0;
  if (whole_sequence(in.correction)) {
    spread(state.correction.get(), in.offsets, begin, count, s, tile.correction);
  } else {
    const PolicyNumbers<T> numbers = in.numbers;
    const T* __restrict sampler = in.sampler_logprobs + begin, * __restrict old = in.old_logprobs + begin;
    for (int64_t i = 0; i < count; ++i) {
      T v = sampler[i], o = old[i];
      bool keep = weights[i] != T(0);
      v = zero_unless(keep, v), o = zero_unless(keep, o);
      bad |= flag<T>(!(v < std::numeric_limits<T>::infinity()));
      tile.scratch[i] = log_ratio(o, v).value;
    }
    for (int64_t i = 0; i < kTile; ++i)
      tile.correction[i] = sampler_weight(exp_fast(tile.scratch[i]), mask_outside, numbers);
  }
  for (int64_t i = 0; i < count; ++i) {
    bool keep = weights[i] != T(0);
    tile.correction[i] = zero_unless(keep, tile.correction[i]);
    kept += flag<T>(keep), passed += flag<T>(tile.correction[i] != T(0));
  }
  sums.bad |= bad != 0;
  sums.field[kSamplerMasked] += mask_outside ? double(kept - passed) : 0;
  sums.field[kSamplerWeight] += lane_sum(tile.correction, count);
}

}  // namespace v05::cpu
