// The two branch-free loops over a tile of tokens: one turns log-probabilities into loss and gradient in registers, the
// other adds the KL. Both take kLanes tokens at a time, the last of them filled up with masked ones, so that a token's
// bits do not depend on where it is.
#pragma once

#include "policy_tile.h"

namespace v05::cpu {

// Loss and gradient of a tile without the KL. At the level of sequences the derivative by the ratio goes to by_ratio,
// and waits for the whole sequence.
template <Surrogate kind, bool by_sequence, class T>
V05_INLINE void policy_pass(const PolicyInputs<T>& in, int64_t begin, int64_t count, const Tile<T>& tile,
                            T* __restrict gradient, T* __restrict by_ratio, Sums& sums) {
  constexpr bool multiplies = kind == Surrogate::cispo || kind == Surrogate::gpg;
  constexpr bool clips = kind == Surrogate::ppo || kind == Surrogate::clip_cov || kind == Surrogate::cispo;
  const T infinity = std::numeric_limits<T>::infinity();
  const T lowest = multiplies ? std::numeric_limits<T>::lowest() : -infinity;
  const PolicyNumbers<T> numbers = in.numbers;
  LaneSums<T> value, ratio_sum, x_sum, kept, low, high, dual, bad;
  T padded[3][kLanes], direct[kLanes], slope[kLanes];
  for (int64_t first = 0; first < count; first += kLanes) {
    const int64_t left = count - first, at = begin + first;
    const T* logprobs = lanes(in.logprobs + at, left, padded[0]);
    const T* old = lanes(in.old_logprobs + at, left, padded[1]);
    const T* weights = lanes(in.weights + at, left, padded[2]);
    for (int64_t i = 0; i < kLanes; ++i) {
      // Everything is loaded before the mask is known: a load that depends on it does not vectorise.
      const T weight = weights[i], given = logprobs[i], before = old[i], advantage = tile.advantage[first + i];
      const T shared = tile.ratio[first + i];
      const bool keep = weight != T(0);
      const T l = zero_unless(keep, given), o = zero_unless(keep, before), a = zero_unless(keep, advantage);
      const Slope<T> x = log_ratio(l, o);
      const T ratio = by_sequence ? one_unless(keep, shared) : exp_fast(x.value);
      const T gate = kind == Surrogate::sapo ? exp_fast(sapo_exponent(ratio, a, numbers)) : T(0);
      const PolicyToken<T> token{l, x.value, x.slope, ratio, a, gate, tile.selected[first + i]};
      const PolicyTerm<T> term = policy_term<kind>(token, numbers);
      const T scale = zero_unless(keep, weight * tile.correction[first + i]);
      value.lane[i] += scale * term.value;
      ratio_sum.lane[i] += zero_unless(keep, ratio);
      x_sum.lane[i] += x.value;
      kept.lane[i] += one_if<T>(keep);
      if constexpr (clips) low.lane[i] += term.low, high.lane[i] += term.high;
      if constexpr (kind == Surrogate::ppo) dual.lane[i] += term.dual;
      const bool good = (l < infinity) & (l >= lowest) & (o < infinity) & (std::fabs(a) < infinity) &
                        (std::fabs(weight) < infinity);  // a NaN fails every comparison
      bad.lane[i] += one_if<T>(!good);
      slope[i] = scale * term.by_ratio;
      direct[i] = scale * term.by_logprob + (by_sequence ? T(0) : x.slope * slope[i]);
    }
    store_lanes(direct, left, gradient + at);
    if constexpr (by_sequence) store_lanes(slope, left, by_ratio + at);
  }
  sums.field[kLoss] += value.total();
  sums.field[kRatio] += ratio_sum.total();
  sums.field[kLogRatio] += x_sum.total();
  sums.field[kTokens] += kept.total();
  sums.field[kClippedLow] += low.total();
  sums.field[kClippedHigh] += high.total();
  sums.field[kDualClipped] += dual.total();
  if (in.correction == Correction::none) sums.field[kSamplerWeight] += kept.total();
  sums.bad |= bad.total() != 0;
}

// Adds the KL to a tile's loss and gradient.
template <Kl kind, class T>
V05_INLINE void kl_pass(const PolicyInputs<T>& in, int64_t begin, int64_t count, T* __restrict gradient, Sums& sums) {
  constexpr bool needs_power = kind == Kl::k3 || kind == Kl::k3_plus;
  const T infinity = std::numeric_limits<T>::infinity(), coef = in.numbers.kl_coef;
  LaneSums<T> value, penalty, bad;
  T padded[4][kLanes], added[kLanes];
  for (int64_t first = 0; first < count; first += kLanes) {
    const int64_t left = count - first, at = begin + first;
    const T* logprobs = lanes(in.logprobs + at, left, padded[0]);
    const T* ref = lanes(in.ref_logprobs + at, left, padded[1]);
    const T* weights = lanes(in.weights + at, left, padded[2]);
    const T* direct = lanes(static_cast<const T*>(gradient) + at, left, padded[3]);
    for (int64_t i = 0; i < kLanes; ++i) {
      const T weight = weights[i], given = logprobs[i], reference = ref[i], before = direct[i];
      const bool keep = weight != T(0);
      const T l = zero_unless(keep, given), q = zero_unless(keep, reference), gap = q - l;
      const bool defined = gap == gap;  // equal infinities differ by 0, without slope
      const T y = zero_unless(defined, gap);
      const Slope<T> bounded = log_ratio(q, l);
      const Slope<T> term = kl_term<kind>(y, bounded, needs_power ? exp_fast(bounded.value) : T(0));
      const T kl = zero_unless(keep, term.value);
      penalty.lane[i] += kl;
      value.lane[i] += weight * coef * kl;
      added[i] = before + zero_unless(defined & keep, weight * coef * term.slope);
      bool good = q < infinity;
      if constexpr (kind != Kl::k3) good &= (q == l) | (std::fabs(gap) < infinity);
      bad.lane[i] += one_if<T>(!good);
    }
    store_lanes(added, left, gradient + at);
  }
  sums.field[kLoss] += value.total();
  sums.field[kKl] += penalty.total();
  sums.bad |= bad.total() != 0;
}

template <class T>
V05_INLINE void kl_switch(const PolicyInputs<T>& in, int64_t begin, int64_t count, T* gradient, Sums& sums) {
  switch (in.kl) {
    case Kl::none:
      break;
    case Kl::k1:
      return kl_pass<Kl::k1>(in, begin, count, gradient, sums);
    case Kl::k2:
      return kl_pass<Kl::k2>(in, begin, count, gradient, sums);
    case Kl::k3:
      return kl_pass<Kl::k3>(in, begin, count, gradient, sums);
    case Kl::k1_plus:
      return kl_pass<Kl::k1_plus>(in, begin, count, gradient, sums);
    case Kl::k3_plus:
      return kl_pass<Kl::k3_plus>(in, begin, count, gradient, sums);
  }
}

template <bool by_sequence, class T>
V05_INLINE void policy_switch(const PolicyInputs<T>& in, int64_t begin, int64_t count, const Tile<T>& tile, T* gradient,
                              T* by_ratio, Sums& sums) {
  switch (in.surrogate) {
    case Surrogate::ppo:
      return policy_pass<Surrogate::ppo, by_sequence>(in, begin, count, tile, gradient, by_ratio, sums);
    case Surrogate::cispo:
      return policy_pass<Surrogate::cispo, by_sequence>(in, begin, count, tile, gradient, by_ratio, sums);
    case Surrogate::sapo:
      return policy_pass<Surrogate::sapo, by_sequence>(in, begin, count, tile, gradient, by_ratio, sums);
    case Surrogate::gpg:
      return policy_pass<Surrogate::gpg, by_sequence>(in, begin, count, tile, gradient, by_ratio, sums);
    case Surrogate::clip_cov:
      return policy_pass<Surrogate::clip_cov, by_sequence>(in, begin, count, tile, gradient, by_ratio, sums);
    case Surrogate::kl_cov:
      return policy_pass<Surrogate::kl_cov, by_sequence>(in, begin, count, tile, gradient, by_ratio, sums);
  }
}

}  // namespace v05::cpu
