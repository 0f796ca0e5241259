// What the kernels of an op are given, on the host and on a device alike: pointers, sizes and choices.
#pragma once

#include <cstdint>

#include "formulas.h"

namespace v05 {

// Row t of the logits starts at t * stride and has a target; temperatures [count], where not null, replace temperature.
template <class T>
struct LogprobRows {
  const T* logits;
  int64_t stride, count, vocabulary;
  const int64_t* targets;
  int64_t ignore_index;
  const double* temperatures;
  double temperature;

  V05_FN double temperature_of(int64_t t) const { return temperatures ? temperatures[t] : temperature; }
};

// Each [count]; max and log_sum are what the backward needs: log p_j = (x_j - max) / temperature - log_sum.
template <class Wide>
struct LogprobOutputs {
  Wide *logprob, *entropy, *max, *log_sum;
};

// The loss, then the metrics in the order of v05/kernels/policy_loss/options.py; all are sums over unmasked tokens.
enum PolicySum {
  kLoss,
  kTokens,
  kSequences,
  kRatio,
  kLogRatio,
  kClippedLow,
  kClippedHigh,
  kDualClipped,
  kKl,
  kSamplerWeight,
  kSamplerMasked,
  kSelected,
  kPolicySums
};

// Log-probabilities and weights [n]; advantages [sequences], or [n] where per token; ref, sampler, selected may be
// null.
template <class T>
struct PolicyInputs {
  const T *logprobs, *old_logprobs, *advantages, *weights, *ref_logprobs, *sampler_logprobs;
  const uint8_t* selected;
  const int64_t* offsets;
  int64_t n, sequences;
  bool advantage_per_token, sequence_level;
  Surrogate surrogate;
  Kl kl;
  Correction correction;
  PolicyNumbers<T> numbers;
};

constexpr int kHead = 2;                                // width of a head of query_attention
constexpr double kScoreScale = 0.70710678118654752440;  // 1 / sqrt(kHead)
constexpr int kMostHeads = 4, kMostWidth = kHead * kMostHeads;

// Of query_attention, width E: projection [E, size], in [3 E, E] and in_bias [3 E] for queries, keys and values, out
// [E, E], and the others [E].
template <class Wide>
struct AttentionWeights {
  Wide *projection, *projection_bias, *query_norm, *query_norm_bias, *key_norm, *key_norm_bias, *in, *in_bias, *out,
      *out_bias;
};

// Row t of the states starts at t * stride; prompt b has the tokens offsets[b] to offsets[b + 1] and the queries
// [count, width] at b * count * width.
template <class T, class Wide>
struct AttentionInputs {
  const T* states;
  int64_t stride, tokens, size;
  const int64_t* offsets;
  int64_t prompts, count;
  int heads;
  Wide eps;
  const Wide* queries;
  AttentionWeights<const Wide> weights;

  V05_FN int width() const { return kHead * heads; }
};

// What the backward of query_attention needs: attended [prompts, width, count]; the largest score, and 1 over the sum
// of powers relative to it (0 for a prompt without tokens), [prompts, heads, count]; the projected states kv [tokens,
// width].
template <class Wide>
struct AttentionSaved {
  Wide *attended, *largest, *inverse, *kv;
};

// Ratio and weight of whole sequences, rather than of tokens.
constexpr bool whole_sequence(Correction correction) { return correction >= Correction::sequence_truncate; }
constexpr bool masks(Correction correction) {
  return correction == Correction::token_mask || correction == Correction::sequence_mask;
}

// Surrogates that see nothing of a token but its ratio and its advantage.
constexpr bool by_ratio_alone(Surrogate kind) { return kind == Surrogate::ppo || kind == Surrogate::sapo; }

// Whether the tokens of a sequence differ by weight alone, so that one stands for all of them.
template <class T>
constexpr bool tokens_alike(const PolicyInputs<T>& in) {
  return by_ratio_alone(in.surrogate) && in.sequence_level && in.kl == Kl::none && !in.advantage_per_token &&
         (in.correction == Correction::none || whole_sequence(in.correction));
}

}  // namespace v05
