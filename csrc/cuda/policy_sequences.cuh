// What policy losses do by sequence, before and after the pass over tokens.
#pragma once

#include "cuda/ops.h"
#include "cuda/reduce.cuh"

namespace v05::cuda {

namespace {

constexpr int kThreads = 256, kWarps = kThreads / kWarp;
constexpr int64_t kShortMean = kThreads;  // tokens of sequences, in the mean, that a warp each goes through

// The threads that go through a sequence together: a warp, or a block where sequences are long in the mean.
template <bool kLong>
struct Crew {
  static constexpr int kSize = kLong ? kThreads : kWarp;
  const int64_t sequence = kLong ? blockIdx.x : int64_t(blockIdx.x) * kWarps + threadIdx.x / kWarp;
  const int place = threadIdx.x % kSize;

  static unsigned blocks_for(int64_t sequences) {
    return unsigned(kLong ? sequences : (sequences + kWarps - 1) / kWarps);
  }

  // The sum over the crew, in every thread.
  __device__ __forceinline__ static double sum(double value) {
    if constexpr (kLong) return block_sum<kThreads>(value);
    return __shfl_sync(kEveryLane, warp_sum(value), 0);
  }
};

// One sequence: the ratio of its mean and its sampler weight, whichever is asked for.
template <bool kLong, class T>
__global__ void __launch_bounds__(kThreads) sequence_kernel(PolicyInputs<T> in, PolicyScratch<T> scratch) {
  const Crew<kLong> crew;
  const int64_t s = crew.sequence;
  if (s >= in.sequences) return;
  const bool corrects = whole_sequence(in.correction);
  const int64_t end = in.offsets[s + 1];
  double count = 0, x_sum = 0, sampler_sum = 0;
  for (int64_t i = in.offsets[s] + crew.place; i < end; i += crew.kSize) {
    if (in.weights[i] == T(0)) continue;
    const T old = in.old_logprobs[i];
    count += 1;
    if (in.sequence_level) x_sum += log_ratio(in.logprobs[i], old).value;
    if (corrects) sampler_sum += log_ratio(old, in.sampler_logprobs[i]).value;
  }
  if (in.sequence_level) {
    count = crew.sum(count), x_sum = crew.sum(x_sum);
    if (crew.place == 0) scratch.kept[s] = T(count), scratch.ratio[s] = exp(T(x_sum / larger(count, 1.0)));
  }
  if (corrects) {
    const double bound = kLogRatioBound<double>, sum = clamped(crew.sum(sampler_sum), -bound, bound);
    if (crew.place == 0) scratch.correction[s] = sampler_weight(exp(T(sum)), masks(in.correction), in.numbers);
  }
}

// Gives each token of a sequence its share of the derivative by the sequence's mean log-ratio.
template <bool kLong, class T>
__global__ void __launch_bounds__(kThreads)
    share_kernel(PolicyInputs<T> in, PolicyScratch<T> scratch, T* __restrict__ gradient) {
  const Crew<kLong> crew;
  const int64_t s = crew.sequence;
  if (s >= in.sequences) return;
  const int64_t begin = in.offsets[s] + crew.place, end = in.offsets[s + 1];
  double total = 0;
  for (int64_t i = begin; i < end; i += crew.kSize) total += scratch.by_ratio[i];
  const T part = T(crew.sum(total) / larger(double(scratch.kept[s]), 1.0));
  for (int64_t i = begin; i < end; i += crew.kSize)
    if (in.weights[i] != T(0)) gradient[i] += log_ratio(in.logprobs[i], in.old_logprobs[i]).slope * part;
}

}  // namespace

}  // namespace v05::cuda
