// A sequence whose tokens differ by their weight alone: its loss from its sums, without a term for each token.
#pragma once

#include "policy_tile.h"

namespace v05::cpu {

// Loss and gradient of sequence s, where tokens_alike.
template <Surrogate kind, class T>
V05_INLINE void alike_pass(const PolicyInputs<T>& in, int64_t s, Tile<T>& tile, T* __restrict gradient, Sums& sums) {
  const bool corrects = whole_sequence(in.correction);
  const T infinity = std::numeric_limits<T>::infinity(), advantage = in.advantages[s];
  const int64_t first = in.offsets[s], last = in.offsets[s + 1];
  double x_sum = 0, weight_sum = 0, sampler_sum = 0;
  Flag<T> kept = 0, bad = 0;
  for (int64_t begin = first; begin < last; begin += kTile) {
    const int64_t count = std::min(kTile, last - begin);
    const T* __restrict logprobs = in.logprobs + begin, * __restrict old = in.old_logprobs + begin;
    const T* __restrict weights = in.weights + begin, * __restrict sampler =
                                                          corrects ? in.sampler_logprobs + begin : old;
    for (int64_t i = 0; i < count; ++i) {
      // Everything is loaded before the mask is known: a load that depends on it does not vectorise.
      const T given = logprobs[i], before = old[i], other = sampler[i], weight = weights[i];
      const bool keep = weight != T(0);
      const T l = zero_unless(keep, given), o = zero_unless(keep, before), v = zero_unless(keep, other);
      tile.x[i] = log_ratio(l, o).value, tile.scratch[i] = log_ratio(o, v).value;
      tile.selected[i] = weight;
      kept += flag<T>(keep);
      const bool good =
          (l < infinity) & (l >= -infinity) & (o < infinity) & (v < infinity) & (std::fabs(weight) < infinity);
      bad |= flag<T>(!good);
    }
    x_sum += lane_sum(tile.x, count), weight_sum += lane_sum(tile.selected, count);
    if (corrects) sampler_sum += lane_sum(tile.scratch, count);
  }
  T part = 0;
  if (kept) {
    const double number = double(kept), bound = kLogRatioBound<double>;
    const T mean = T(x_sum / number), ratio = T(std::exp(x_sum / number));
    const T gate = kind == Surrogate::sapo ? exp_fast(sapo_exponent(ratio, advantage, in.numbers)) : T(0);
    const PolicyTerm<T> term = policy_term<kind>({T(0), mean, T(1), ratio, advantage, gate, T(0)}, in.numbers);
    const T correction =
        corrects ? sampler_weight(T(std::exp(clamped(sampler_sum, -bound, bound))), masks(in.correction), in.numbers)
                 : T(1);
    const double scale = weight_sum * correction;
    part = T(scale * term.by_ratio / number);
    bad |= flag<T>(!(std::fabs(advantage) < infinity));
    sums.field[kLoss] += scale * term.value;
    sums.field[kSequences] += 1;
    sums.field[kTokens] += number;
    sums.field[kRatio] += number * ratio;
    sums.field[kLogRatio] += x_sum;
    sums.field[kClippedLow] += number * term.low;
    sums.field[kClippedHigh] += number * term.high;
    sums.field[kDualClipped] += number * term.dual;
    sums.field[kSamplerWeight] += number * correction;
    sums.field[kSamplerMasked] += masks(in.correction) && correction == T(0) ? number : 0;
  }
  sums.bad |= bad != 0;
  for (int64_t i = first; i < last; ++i) {
    const bool moves = (in.weights[i] != T(0)) & (log_ratio(in.logprobs[i], in.old_logprobs[i]).slope != T(0));
    gradient[i] = moves ? part : T(0);
  }
}

}  // namespace v05::cpu
