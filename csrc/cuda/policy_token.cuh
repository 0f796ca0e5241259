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

// What is asked of a token: nothing but its own ratio; a KL or a correction of its own too; or options on its sequence.
enum class Form { plain, token, sequence };

// The ratio and the sampler's weight of a whole sequence, each used where it is asked for.
template <class T>
struct Whole {
  T ratio, correction;
};

// Whether a surrogate has a derivative by the log-prob beside that by the ratio.
template <Surrogate kSurrogate>
constexpr bool kByLogprob =
    kSurrogate == Surrogate::cispo || kSurrogate == Surrogate::gpg || kSurrogate == Surrogate::kl_cov;

// The gradient of a token by its log-probability; at the level of sequences, by_ratio is what comes through the ratio.
template <class T>
struct TokenGradient {
  T direct, by_ratio;
};

// Adds an unmasked token to the sums.
template <Surrogate kSurrogate, Form kForm, class T>
__device__ __forceinline__ TokenGradient<T> add_token(const PolicyInputs<T>& in, int64_t i, T weight, T logprob, T old,
                                                      T advantage, const Whole<T>& whole, T (&sums)[kPolicySums]) {
  const Slope<T> x = log_ratio(logprob, old);
  const bool by_sequence = kForm == Form::sequence && in.sequence_level;
  const T ratio = by_sequence ? whole.ratio : T(exp(x.value));
  constexpr bool kSelects = kSurrogate == Surrogate::clip_cov || kSurrogate == Surrogate::kl_cov;
  const T selected = kSelects && in.selected && in.selected[i] ? T(1) : T(0);
  const PolicyToken<T> token{logprob, x.value, x.slope, ratio, advantage, T(0), selected};
  const PolicyTerm<T> term = surrogate_term<kSurrogate>(token, in.numbers);
  T scale = weight, value = 0, direct = 0;
  if constexpr (kForm != Form::plain) {
    T correction = 1;
    if (kForm == Form::sequence && whole_sequence(in.correction))
      correction = whole.correction;
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
  if (by_sequence) return {direct, scale * term.by_ratio};
  return {direct + x.slope * (scale * term.by_ratio), T(0)};
}

}  // namespace v05::cuda
