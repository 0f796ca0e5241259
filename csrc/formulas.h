// The scalar mathematics, written once for host and device. Everything here is a pure function of its arguments.
// Sources: V0.5 (arXiv 2603.10848) for fusion and look-ahead; each surrogate and KL names its own.
#pragma once

#include <cmath>
#include <cstdint>

#if defined(__CUDACC__)
#define V05_FN __host__ __device__ __forceinline__
#else
#define V05_FN inline __attribute__((always_inline))
#endif

namespace v05 {

template <class T>
V05_FN T larger(T x, T y) {
  return x > y ? x : y;
}

template <class T>
V05_FN T smaller(T x, T y) {
  return x < y ? x : y;
}

// ---- fusion and look-ahead (V0.5, sections 3 and 4) --------------------------------------------------------------

// The range of a reward and the rule that gives out rollouts.
template <class T>
struct Budget {
  T low, high;     // range of a reward
  T cost;          // of one rollout, in units of the largest variance
  int64_t k_init;  // rollouts before the first test
  int64_t k_max;   // rollouts at most

  // s = ((b - a) / 2)^2, the largest variance of a reward in [a, b]
  V05_FN T variance() const { return (high - low) * (high - low) * T(0.25); }
};

template <class T>
struct Fusion {
  T deviation, weight, baseline, mse, gain;
  int64_t planned;
};

// G(k) = s d^2 / ((k d + s) ((k + 1) d + s)): how much one more rollout lowers the estimated error.
template <class T>
V05_FN T lookahead_gain(T deviation, T k, T s) {
  return s * deviation * deviation / ((k * deviation + s) * ((k + T(1)) * deviation + s));
}

// w = d / (d + s / k), with d the positive part of (m - V)^2 - s / k.
template <class T>
V05_FN T squared_deviation(T mean, T k, T prior, T s) {
  T gap = mean - prior;
  return larger(T(0), gap * gap - s / k);
}

// mu = w m + (1 - w) V, written so that w = 0 returns the prior's own bits.
template <class T>
V05_FN T fused_baseline(T mean, T k, T prior, T s) {
  if (k <= T(0)) return prior;
  T d = squared_deviation(mean, k, prior, s);
  return prior + d / (d + s / k) * (mean - prior);
}

// Everything that V0.5 says about a group of k rollouts with this mean. An empty group: the prior, and k_init to come.
template <class T>
V05_FN Fusion<T> fuse(T mean, int64_t count, T prior, const Budget<T>& budget) {
  if (count == 0) return {T(0), T(0), prior, T(0), T(0), budget.k_init};
  T s = budget.variance(), k = T(count);
  T d = squared_deviation(mean, k, prior, s);
  T mse = d * s / (k * d + s), gain = lookahead_gain(d, k, s);
  int64_t planned = count;
  if (count < budget.k_init) {
    planned = budget.k_init;
  } else {
    while (planned < budget.k_max && lookahead_gain(d, T(planned), s) > budget.cost * s) ++planned;
  }
  return {d, d / (d + s / k), fused_baseline(mean, k, prior, s), mse, gain, planned};
}

// ---- advantages --------------------------------------------------------------------------------------------------

enum class Baseline : int { fused = 0, fused_loo = 1, group = 2, loo = 3, batch = 4 };
enum class Scale : int { none = 0, group = 1, batch = 2, baseline = 3 };

// The mean of a group without one of its rewards, from shifted sums: sum = sum of (r - first).
template <class T>
V05_FN T mean_without(T first, T sum, T reward, int64_t count) {
  return first + (sum - (reward - first)) / T(count - 1);
}

// The std that a baseline implies for a two-valued reward, sqrt(max((b - mu) (mu - a), eps)).
template <class T>
V05_FN T implied_std(T baseline, T low, T high, T eps) {
  return std::sqrt(larger((high - baseline) * (baseline - low), eps));
}

// 1 / (std + eps), and 1 where the std is 0: equal rewards are left unscaled.
template <class T>
V05_FN T inverse_std(T sum_squares, T degrees, T eps) {
  return degrees > T(0) && sum_squares > T(0) ? T(1) / (std::sqrt(sum_squares / degrees) + eps) : T(1);
}

}  // namespace v05
