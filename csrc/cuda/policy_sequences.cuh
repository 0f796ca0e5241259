// Policy losses with an option on whole sequences: a crew of threads goes through a sequence two or three times, from
// memory once and then from the cache, or from registers where the sequence is short.
#pragma once

#include "cuda/policy_sums.cuh"
#include "cuda/policy_token.cuh"

namespace v05::cuda {

namespace {

constexpr int64_t kShortMean = kThreads;  // tokens of sequences, in the mean, that a warp each goes through
constexpr int kAhead = 4;                 // tokens of a thread, read together where they come from memory

// Whether blocks go through sequences, rather than warps: where they are long in the mean.
inline bool long_sequences(int64_t n, int64_t sequences) { return n > sequences * kShortMean; }

// The threads that go through a sequence together: a warp or a block.
template <int kSize>
struct Crew {
  static constexpr int kCrews = kThreads / kSize;  // of a block

  const int place = threadIdx.x % kSize;  // of the calling thread
  const int64_t first = int64_t(blockIdx.x) * kCrews + threadIdx.x / kSize, step = int64_t(gridDim.x) * kCrews;

  // The sum over the crew, in every thread.
  __device__ __forceinline__ static double sum(double value) {
    if constexpr (kSize == kThreads) return block_sum<kThreads>(value);
    return __shfl_sync(kEveryLane, warp_sum(value), 0);
  }

  // Whether a thread has no more tokens of a sequence than it reads together.
  template <class T>
  __device__ __forceinline__ static bool at_once(const PolicyInputs<T>& in, int64_t s) {
    return in.offsets[s + 1] - in.offsets[s] <= kAhead * kSize;
  }

  // Calls body with which it is and its place for every token of such a sequence that is the calling thread's.
  template <class T, class Body>
  __device__ __forceinline__ void each_place(const PolicyInputs<T>& in, int64_t s, const Body& body) const {
    const int64_t begin = in.offsets[s] + place, end = in.offsets[s + 1];
#pragma unroll
    for (int u = 0; u < kAhead; ++u)
      if (begin + u * kSize < end) body(u, begin + u * kSize);
  }

  // Calls body with every token of a sequence that is the calling thread's, masked ones included: which of kTogether it
  // is, its place, weight, log-prob and old one. What a masked token holds is read, together with the rest, but must
  // not be used.
  template <int kTogether, class T, class Body>
  __device__ __forceinline__ void each_token(const PolicyInputs<T>& in, int64_t s, const Body& body) const {
    constexpr int kStep = kTogether * kSize;
    const int64_t end = in.offsets[s + 1];
    for (int64_t i = in.offsets[s] + place; i < end; i += kStep) {
      const int left = int(smaller<int64_t>(end - i, kStep));
      const T *weights = in.weights + i, *logprobs = in.logprobs + i, *old_logprobs = in.old_logprobs + i;
      T weight[kTogether], logprob[kTogether], old[kTogether];
#pragma unroll
      for (int u = 0; u < kTogether; ++u) {
        const bool there = u * kSize < left;
        weight[u] = there ? weights[u * kSize] : T(0);
        logprob[u] = there ? logprobs[u * kSize] : T(0);
        old[u] = there ? old_logprobs[u * kSize] : T(0);
      }
#pragma unroll
      for (int u = 0; u < kTogether; ++u)
        if (u * kSize < left) body(u, i + u * kSize, weight[u], logprob[u], old[u]);
    }
  }
};

// Whether the tokens of a sequence differ by weight alone: one then stands for all of them.
template <Surrogate kSurrogate, class T>
__device__ __forceinline__ bool tokens_alike(const PolicyInputs<T>& in) {
  const bool of_sequence = in.correction == Correction::none || whole_sequence(in.correction);
  return (kSurrogate == Surrogate::ppo || kSurrogate == Surrogate::sapo) && in.sequence_level && in.kl == Kl::none &&
         !in.advantage_per_token && of_sequence;
}

// Adds such a sequence: `count` unmasked tokens with the sum of their weights and their mean log-ratio.
template <Surrogate kSurrogate, class T>
__device__ __forceinline__ T add_alike(const PolicyInputs<T>& in, int64_t s, T count, T weight, T mean,
                                       const Whole<T>& whole, T (&sums)[kPolicySums]) {
  T one[kPolicySums] = {};
  const TokenGradient<T> token =
      add_token<kSurrogate, Form::sequence>(in, in.offsets[s], weight, mean, T(0), in.advantages[s], whole, one);
#pragma unroll
  for (int field = 0; field < kPolicySums; ++field) sums[field] += field == kLoss ? one[field] : count * one[field];
  return token.by_ratio;
}

template <Surrogate kSurrogate, int kSize, class T>
__global__ void __launch_bounds__(kThreads, kLeast<T>)
    sequence_kernel(PolicyInputs<T> in, T* gradient, PolicyOutputs<T> out) {
  allow_next_launch();
  const Crew<kSize> crew;
  const bool corrects = whole_sequence(in.correction);
  // At the level of sequences, what a token has beside its share of the ratio's derivative waits in the gradient.
  const bool waits = in.kl != Kl::none || kByLogprob<kSurrogate>, alike = tokens_alike<kSurrogate>(in);
  T sums[kPolicySums] = {};
  for (int64_t s = crew.first; s < in.sequences; s += crew.step) {
    double count = 0, weight_sum = 0, x_sum = 0, sampler_sum = 0;
    T slope[kAhead];      // of the log-ratio, by the log-prob
    bool kept[kAhead]{};  // of these the unmasked ones
    crew.template each_token<kAhead>(in, s, [&](int u, int64_t i, T weight, T logprob, T old) {
      kept[u] = weight != T(0);
      if (!kept[u]) return;
      count += 1, weight_sum += weight;
      const Slope<T> x = log_ratio(logprob, old);
      slope[u] = x.slope;
      if (in.sequence_level) x_sum += x.value;
      if (corrects) sampler_sum += log_ratio(old, in.sampler_logprobs[i]).value;
    });
    Whole<T> whole{T(1), T(1)};
    count = crew.sum(count);
    const T mean = in.sequence_level ? T(crew.sum(x_sum) / larger(count, 1.0)) : T(0);
    if (in.sequence_level) whole.ratio = exp(mean);
    if (corrects) {
      const double bound = kLogRatioBound<double>, sum = clamped(crew.sum(sampler_sum), -bound, bound);
      whole.correction = sampler_weight(exp(T(sum)), masks(in.correction), in.numbers);
    }
    if (crew.place == 0) sums[kSequences] += count > 0 ? 1 : 0;
    double by_ratio = 0;  // the derivative by the ratio, of the calling thread's tokens
    if (alike) {
      weight_sum = crew.sum(weight_sum);
      if (crew.place == 0 && count > 0)
        by_ratio = add_alike<kSurrogate>(in, s, T(count), T(weight_sum), mean, whole, sums);
    } else {
      crew.template each_token<1>(in, s, [&](int, int64_t i, T weight, T logprob, T old) {
        TokenGradient<T> token{T(0), T(0)};
        if (weight != T(0)) {
          const T advantage = in.advantages[in.advantage_per_token ? i : s];
          token = add_token<kSurrogate, Form::sequence>(in, i, weight, logprob, old, advantage, whole, sums);
        }
        by_ratio += token.by_ratio;
        if (waits || !in.sequence_level) gradient[i] = token.direct;
      });
    }
    if (!in.sequence_level) continue;
    const T part = T(crew.sum(by_ratio) / larger(count, 1.0));
    const auto leave = [&](int64_t i, bool unmasked, T by_logprob) {
      const T direct = waits ? gradient[i] : T(0);
      gradient[i] = unmasked ? direct + by_logprob * part : T(0);
    };
    if (crew.at_once(in, s))
      crew.each_place(in, s, [&](int u, int64_t i) { leave(i, kept[u], slope[u]); });
    else
      crew.template each_token<kAhead>(in, s, [&](int, int64_t i, T weight, T logprob, T old) {
        leave(i, weight != T(0), log_ratio(logprob, old).slope);
      });
  }
  out.leave(sums);
}

}  // namespace

}  // namespace v05::cuda
