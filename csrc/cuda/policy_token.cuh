// One token of a policy loss: which formula of csrc/formulas.h applies, and what it adds to the sums and the gradient.
#pragma once

#include <cuda_runtime.h>

#include "cuda/ops.h"

namespace v05::cuda {

template <Surrogate kSurrogate, class T>
__device__ __forceinline__ PolicyTerm<T> surrogate_term(PolicyToken<T> token, const PolicyNumbers<T>& by) {
  if constexpr (kSurrogate == Surrogate::sapo) token.gate = exp(sapo_exponent(token.ratio, token.advantage, by));
  return policy_term<kSurrogate>(token, by);
}

template <class T>
__device__ __forceinline__ Slope<T> kl(Kl kind, T ref, T logprob) {
  T gap = ref - logprob;
  if (ref == logprob && !(gap == gap)) return {T(0), T(0)};  // equal infinities
  Slope<T> bounded = log_ratio(ref, logprob);
  switch (kind) {
    case Kl::k1:
      return kl_term<Kl::k1>(gap, bounded, T(0));
    case Kl::k2:
      return kl_term<Kl::k2>(gap, bounded, T(0));
    case Kl::k3:
      return kl_term<Kl::k3>(gap, bounded, T(exp(bounded.value)));
    case Kl::k1_plus:
      return kl_term<Kl::k1_plus>(gap, bounded, T(0));
    case Kl::k3_plus:
      return kl_term<Kl::k3_plus>(gap, bounded, T(exp(bounded.value)));
    default:
      return {T(0), T(0)};
  }
}

// The gradient of an unmasked token by its log-probability; at the level of sequences, without what comes through the
// ratio, which is kept in by_ratio. kPlain: the ratio is the token's, and there is neither a KL nor a correction.
template <Surrogate kSurrogate, bool kPlain, class T>
__device__ __forceinline__ T add_token(const PolicyInputs<T>& in, const PolicyScratch<T>& scratch, int64_t i, int64_t s,
                                       T weight, T logprob, T old, T advantage, T (&sums)[kPolicySums], T* by_ratio) {
  const Slope<T> x = log_ratio(logprob, old);
  const bool whole = !kPlain && in.sequence_level;
  const T ratio = whole ? scratch.ratio[s] : exp(x.value);
  constexpr bool kSelects = kSurrogate == Surrogate::clip_cov || kSurrogate == Surrogate::kl_cov;
  const T selected = kSelects && in.selected && in.selected[i] ? T(1) : T(0);
  const PolicyToken<T> token{logprob, x.value, x.slope, ratio, advantage, T(0), selected};
  const PolicyTerm<T> term = surrogate_term<kSurrogate>(token, in.numbers);
  T scale = weight, value = 0, direct = 0;
  if constexpr (!kPlain) {
    T correction = 1;
    if (whole_sequence(in.correction))
      correction = scratch.correction[s];
    else if (in.correction != Correction::none)
      correction =
          sampler_weight(T(exp(log_ratio(old, in.sampler_logprobs[i]).value)), masks(in.correction), in.numbers);
    if (in.kl != Kl::none) {
      const Slope<T> penalty = kl(in.kl, in.ref_logprobs[i], logprob);
      value = weight * in.numbers.kl_coef * penalty.value;
      direct = weight * in.numbers.kl_coef * penalty.slope;
      sums[kKl] += penalty.value;
    }
    scale *= correction;
    sums[kSamplerWeight] += correction;
    sums[kSamplerMasked] += masks(in.correction) && correction == T(0) ? 1 : 0;
  }
  sums[kLoss] += value + scale * term.value;
  sums[kTokens] += 1;
  sums[kRatio] += ratio;
  sums[kLogRatio] += x.value;
  sums[kClippedLow] += term.low;
  sums[kClippedHigh] += term.high;
  sums[kDualClipped] += term.dual;
  sums[kSelected] += selected;
  direct += scale * term.by_logprob;
  if (whole) {
    *by_ratio = scale * term.by_ratio;
    return direct;
  }
  return direct + x.slope * (scale * term.by_ratio);
}

}  // namespace v05::cuda
