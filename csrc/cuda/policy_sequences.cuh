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

// What a crew adds up over the unmasked tokens of a sequence.
enum SequenceSum { kCount, kWeights, kLogRatios, kOfSampler, kSequenceSums };

// A sequence's tokens, and its advantage where it has one of its own.
template <class T>
struct Sequence {
  int64_t begin = 0, end = 0;
  T advantage = 0;

  __device__ __forceinline__ Sequence(const PolicyInputs<T>& in, int64_t s) {
    begin = in.offsets[s], end = in.offsets[s + 1];
    if (!in.advantage_per_token) advantage = in.advantages[s];
  }
};

// The threads that go through a sequence together: a warp or a block.
template <int kSize>
struct Crew {
  static constexpr int kCrews = kThreads / kSize;  // of a block

  const int place = threadIdx.x % kSize;  // of the calling thread
  const int64_t first = int64_t(blockIdx.x) * kCrews + threadIdx.x / kSize, step = int64_t(gridDim.x) * kCrews;

  // Adds up each value over the crew, and hands what body makes of the sums, in the first warp alone, to every thread.
  template <class Body>
  __device__ __forceinline__ auto from_sums(double (&values)[kSequenceSums], const Body& body) const {
    constexpr int kSame = kWarp / kSequenceSums;  // lanes of a warp that have the same sum
    double total = warp_sums(values);
    if constexpr (kSize == kWarp) {
#pragma unroll
      for (int i = 0; i < kSequenceSums; ++i) values[i] = __shfl_sync(kEveryLane, total, i * kSame);
      return body(values);
    } else {
      static_assert(kSize == kThreads && kWarps * kSequenceSums == kWarp);
      __shared__ double of_warps[kWarps][kSequenceSums];
      __shared__ decltype(body(values)) made;
      const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
      if (lane % kSame == 0) of_warps[warp][lane / kSame] = total;
      __syncthreads();
      if (warp == 0) {
        total = of_warps[lane / kSequenceSums][lane % kSequenceSums];
#pragma unroll
        for (int bit = kSequenceSums; bit < kWarp; bit *= 2) total += __shfl_xor_sync(kEveryLane, total, bit);
#pragma unroll
        for (int i = 0; i < kSequenceSums; ++i) values[i] = __shfl_sync(kEveryLane, total, i);
        const auto mine = body(values);
        if (lane == 0) made = mine;
      }
      __syncthreads();
      return made;
    }
  }

  // Calls body with every token of a sequence that is the calling thread's, masked ones included: which of kTogether it
  // is, its place, weight, log-prob and old one. What a masked token holds is read, together with the rest, but must
  // not be used.
  template <int kTogether, class T, class Body>
  __device__ __forceinline__ void each_token(const PolicyInputs<T>& in, const Sequence<T>& of, const Body& body) const {
    constexpr int kStep = kTogether * kSize;
    for (int64_t i = of.begin + place; i < of.end; i += kStep) {
      const int left = int(smaller<int64_t>(of.end - i, kStep));
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

  // Calls body with which it is and its place for every token that is the calling thread's of a sequence of which it
  // has no more than kAhead.
  template <class T, class Body>
  __device__ __forceinline__ void each_place(const Sequence<T>& of, const Body& body) const {
    const int left = int(of.end - of.begin) - place;
#pragma unroll
    for (int u = 0; u < kAhead; ++u)
      if (u * kSize < left) body(u, of.begin + place + u * kSize);
  }
};

// Adds a sequence whose tokens are alike, `count` of them unmasked, and returns its derivative by the ratio.
template <Surrogate kSurrogate, class T>
__device__ __forceinline__ T add_alike(const PolicyInputs<T>& in, const Sequence<T>& of, T count, T weight, T mean,
                                       const Whole<T>& whole, bool adds, T (&sums)[kPolicySums]) {
  T one[kPolicySums] = {};
  const TokenGradient<T> token =
      add_token<kSurrogate, Form::sequence>(in, of.begin, weight, mean, T(0), of.advantage, whole, one);
  if (adds)
#pragma unroll
    for (int field = 0; field < kPolicySums; ++field) sums[field] += field == kLoss ? one[field] : count * one[field];
  return token.by_ratio;
}

// What the threads of a crew need to know of a sequence; `part` is a token's share of the derivative by the ratio.
template <class T>
struct Known {
  Whole<T> whole;
  T part;
};

template <Surrogate kSurrogate, int kSize, class T>
__global__ void __launch_bounds__(kThreads, kLeast<T>)
    sequence_kernel(PolicyInputs<T> in, T* gradient, PolicyOutputs<T> out) {
  out.begin();
  const Crew<kSize> crew;
  const bool corrects = whole_sequence(in.correction);
  // At the level of sequences, what a token has beside its share of the ratio's derivative waits in the gradient.
  const bool waits = in.kl != Kl::none || kByLogprob<kSurrogate>,
             alike = by_ratio_alone(kSurrogate) && tokens_alike(in);
  T sums[kPolicySums] = {};
  for (int64_t s = crew.first; s < in.sequences; s += crew.step) {
    const Sequence<T> of(in, s);
    double total[kSequenceSums] = {};
    T slope[kAhead];      // of the log-ratio, by the log-prob
    bool kept[kAhead]{};  // of these the unmasked ones
    int unmasked = 0;
    crew.template each_token<kAhead>(in, of, [&](int u, int64_t i, T weight, T logprob, T old) {
      kept[u] = weight != T(0);
      if (!kept[u]) return;
      ++unmasked, total[kWeights] += weight;
      const Slope<T> x = log_ratio(logprob, old);
      slope[u] = x.slope;
      total[kLogRatios] += x.value;
      if (corrects) total[kOfSampler] += log_ratio(old, in.sampler_logprobs[i]).value;
    });
    total[kCount] = unmasked;
    double share = 0;  // of a token; in the first warp
    Known<T> known = crew.from_sums(total, [&](const double (&sum)[kSequenceSums]) {
      Known<T> made{{T(1), T(1)}, T(0)};
      share = 1 / larger(sum[kCount], 1.0);
      if (crew.place == 0) sums[kSequences] += sum[kCount] > 0 ? 1 : 0;
      const T mean = in.sequence_level ? T(sum[kLogRatios] * share) : T(0);
      if (in.sequence_level) made.whole.ratio = exp(mean);
      if (corrects) {
        const double bound = kLogRatioBound<double>, of_sampler = clamped(sum[kOfSampler], -bound, bound);
        made.whole.correction = sampler_weight(exp(T(of_sampler)), masks(in.correction), in.numbers);
      }
      if (alike && sum[kCount] > 0)
        made.part = T(share * add_alike<kSurrogate>(in, of, T(sum[kCount]), T(sum[kWeights]), mean, made.whole,
                                                    crew.place == 0, sums));
      return made;
    });
    if (!alike) {
      double by_ratio[kSequenceSums] = {};  // the derivative by the ratio, of the calling thread's tokens
      crew.template each_token<1>(in, of, [&](int, int64_t i, T weight, T logprob, T old) {
        TokenGradient<T> token{T(0), T(0)};
        if (weight != T(0)) {
          const T advantage = in.advantage_per_token ? in.advantages[i] : of.advantage;
          token = add_token<kSurrogate, Form::sequence>(in, i, weight, logprob, old, advantage, known.whole, sums);
        }
        by_ratio[0] += token.by_ratio;
        if (waits || !in.sequence_level) gradient[i] = token.direct;
      });
      if (!in.sequence_level) continue;
      known.part = crew.from_sums(by_ratio, [&](const double (&sum)[kSequenceSums]) { return T(sum[0] * share); });
    }
    const auto leave = [&](int64_t i, bool unmasked, T by_logprob) {
      const T direct = waits ? gradient[i] : T(0);
      gradient[i] = unmasked ? direct + by_logprob * known.part : T(0);
    };
    if (of.end - of.begin <= kAhead * kSize)
      crew.each_place(of, [&](int u, int64_t i) { leave(i, kept[u], slope[u]); });
    else
      crew.template each_token<kAhead>(in, of, [&](int, int64_t i, T weight, T logprob, T old) {
        leave(i, weight != T(0), log_ratio(logprob, old).slope);
      });
  }
  out.leave(sums);
}

}  // namespace

}  // namespace v05::cuda
