// The scalar mathematics, written once for host and device. Everything here is a pure function of its arguments.
// Sources: V0.5 (arXiv 2603.10848) for fusion and look-ahead; each surrogate and KL names its own.
#pragma once

#include <cmath>
#include <cstdint>

#if defined(__CUDACC__)
#define V05_FN __host__ __device__ __forceinline__
#define V05_UNROLL _Pragma("unroll")
#define V05_ROLLED _Pragma("unroll 1")
#else
#define V05_FN inline __attribute__((always_inline))
#define V05_UNROLL
#define V05_ROLLED
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

// Whether x is neither NaN nor infinite.
template <class T>
V05_FN bool finite(T x) {
  return x - x == T(0);
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

// G(k) / s = q^2 / ((k q + 1) ((k + 1) q + 1)), where q = d / s: how much one more rollout lowers the estimated error,
// in units of s, since the square of s itself may be beyond a float.
template <class T>
V05_FN T lookahead_gain(T q, T k) {
  return q * q / ((k * q + T(1)) * ((k + T(1)) * q + T(1)));
}

// The first guess of how many rollouts there will be, from count to k_max: a large k_max fits into no floating type.
template <class T>
V05_FN int64_t first_guess(T about, int64_t count, int64_t k_max) {
  return about >= T(k_max) ? k_max : int64_t(larger(about, T(count)));
}

// G(k) > cost * s, without a division.
template <class T>
V05_FN bool worth_one_more(T q, T k, T cost) {
  return q * q > cost * ((k * q + T(1)) * ((k + T(1)) * q + T(1)));
}

// The first k from count to k_max at which one more rollout is not worth its cost. With u = k + 1 / q the gain is
// s / (u (u + 1)), so that u (u + 1) = 1 / cost says about where; the rule itself decides, a step up or down.
template <class T>
V05_FN int64_t first_not_worth(T q, int64_t count, const Budget<T>& budget) {
  if (!worth_one_more(q, T(count), budget.cost) || count >= budget.k_max) return count;
  T about = (std::sqrt(T(1) + T(4) / budget.cost) - T(1)) * T(0.5) - T(1) / q;
  int64_t k = first_guess(about, count, budget.k_max);
  while (k < budget.k_max && worth_one_more(q, T(k), budget.cost)) ++k;
  while (k > count && !worth_one_more(q, T(k - 1), budget.cost)) --k;
  return k;
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
  T q = d / s, mse = d / (k * q + T(1)), gain = s * lookahead_gain(q, k);
  int64_t planned = count < budget.k_init ? budget.k_init : first_not_worth(q, count, budget);
  return {d, d / (d + s / k), fused_baseline(mean, k, prior, s), mse, gain, planned};
}

// ---- advantages --------------------------------------------------------------------------------------------------

enum class Baseline : int { fused = 0, fused_loo = 1, group = 2, loo = 3, batch = 4, given = 5, by_length = 6 };
enum class Scale : int { none = 0, group = 1, batch = 2, baseline = 3 };

// The mean of a group without one of its rewards, from shifted sums: sum = sum of (r - first).
template <class T>
V05_FN T mean_without(T first, T sum, T reward, int64_t count) {
  return first + (sum - (reward - first)) / T(count - 1);
}

// The std that a baseline implies for a two-valued reward, sqrt(max((b - mu) (mu - a), eps)), and 1 where that is 0.
template <class T>
V05_FN T implied_std(T baseline, T low, T high, T eps) {
  T variance = larger((high - baseline) * (baseline - low), eps);
  return variance > T(0) ? std::sqrt(variance) : T(1);
}

// 1 / (std + eps), and 1 where the std is 0: equal rewards are left unscaled.
template <class T>
V05_FN T inverse_std(T sum_squares, T degrees, T eps) {
  return degrees > T(0) && sum_squares > T(0) ? T(1) / (std::sqrt(sum_squares / degrees) + eps) : T(1);
}

// ---- policy losses -----------------------------------------------------------------------------------------------

enum class Surrogate : int { ppo = 0, cispo = 1, sapo = 2, gpg = 3, clip_cov = 4, kl_cov = 5 };
enum class Kl : int { none = 0, k1 = 1, k2 = 2, k3 = 3, k1_plus = 4, k3_plus = 5 };
enum class Correction : int { none = 0, token_truncate = 1, token_mask = 2, sequence_truncate = 3, sequence_mask = 4 };

template <class T>
struct PolicyNumbers {
  T clip_low, clip_high, dual_clip;  // the ratio's bounds are 1 - low and 1 + high; dual_clip is infinite where unused
  T tau_pos, tau_neg;                // SAPO's temperatures
  T covariance_coef, kl_coef, sampler_floor, sampler_cap;
};

// Log-ratios beyond this many nats are cut off there, so that no ratio overflows.
template <class T>
constexpr T kLogRatioBound = T(20);

template <class T>
V05_FN T clamped(T x, T low, T high) {
  return larger(low, smaller(high, x));
}

#if defined(__CUDA_ARCH__)
// The same in two instructions, for bounds that are numbers.
V05_FN float clamped(float x, float low, float high) {
  asm("min.NaN.f32 %0, %0, %1;\n\tmax.NaN.f32 %0, %0, %2;" : "+f"(x) : "f"(high), "f"(low));
  return x;
}
#endif

template <class T>
V05_FN T one_if(bool condition) {
  return condition ? T(1) : T(0);
}

template <class T>
struct Slope {
  T value, slope;
};

// a - b, cut off at the bound, with slope 0 outside it; two equal infinities differ by 0 and have no slope.
template <class T>
V05_FN Slope<T> log_ratio(T a, T b) {
  T gap = a - b, bound = kLogRatioBound<T>;
  return {a == b ? T(0) : clamped(gap, -bound, bound), std::fabs(gap) <= bound ? T(1) : T(0)};
}

template <class T>
struct PolicyToken {
  T logprob, x, moves;  // x is the token's own log-ratio, moves its slope (0 where it was cut off)
  T ratio, advantage;
  T gate;      // exp(sapo_exponent(...)), where the surrogate is sapo
  T selected;  // 1 where the covariance of the token is large, where the surrogate is clip_cov or kl_cov
};

// A token's loss before its weight, and its derivatives by the logarithm of the ratio and by the log-probability.
template <class T>
struct PolicyTerm {
  T value, by_ratio, by_logprob;
  T low, high, dual;  // 1 for the bound that held the ratio back, else 0
};

// -min(rho A, clip(rho) A), and at most c |A| where A < 0: -A times a ratio clipped on the side that A makes active.
// PPO (arXiv 1707.06347), clip-higher (DAPO, 2503.14476), dual clip (1912.09729).
template <class T>
V05_FN PolicyTerm<T> clipped_term(T ratio, T advantage, const PolicyNumbers<T>& by) {
  bool negative = advantage<T(0), positive = advantage> T(0);
  T bottom = negative ? T(1) - by.clip_low : T(0), top = negative ? by.dual_clip : T(1) + by.clip_high;
  T kept = clamped(ratio, bottom, top);
  return {-advantage * kept,
          kept == ratio ? -advantage * ratio : T(0),
          T(0),
          one_if<T>(negative & (ratio < bottom)),
          one_if<T>(positive & (ratio > top)),
          one_if<T>(negative & (ratio > top))};
}

// SAPO's gate is 4 / tau / (1 + exp(this)).
template <class T>
V05_FN T sapo_exponent(T ratio, T advantage, const PolicyNumbers<T>& by) {
  return -(advantage > T(0) ? by.tau_pos : by.tau_neg) * (ratio - T(1));
}

// CISPO (arXiv 2506.13585), SAPO (2511.20347), GPG (2504.02546), Clip-Cov and KL-Cov (2505.22617).
template <Surrogate kind, class T>
V05_FN PolicyTerm<T> policy_term(const PolicyToken<T>& token, const PolicyNumbers<T>& by) {
  const T advantage = token.advantage, ratio = token.ratio;
  if constexpr (kind == Surrogate::ppo) return clipped_term(ratio, advantage, by);
  if constexpr (kind == Surrogate::clip_cov) {
    PolicyTerm<T> term = clipped_term(ratio, advantage, by);
    bool out = token.selected != T(0);
    return {out ? T(0) : term.value, out ? T(0) : term.by_ratio, T(0), term.low, term.high, T(0)};
  }
  if constexpr (kind == Surrogate::cispo) {
    T low = T(1) - by.clip_low, high = T(1) + by.clip_high, factor = -advantage * clamped(ratio, low, high);
    return {factor * token.logprob, T(0), factor, one_if<T>(ratio < low), one_if<T>(ratio > high), T(0)};
  }
  if constexpr (kind == Surrogate::sapo) {
    T tau = advantage > T(0) ? by.tau_pos : by.tau_neg, sigmoid = T(1) / (T(1) + token.gate);
    T slope = T(4) * sigmoid * (token.gate * sigmoid) * ratio;
    return {-advantage * (T(4) / tau) * sigmoid, -advantage * slope, T(0), T(0), T(0), T(0)};
  }
  if constexpr (kind == Surrogate::kl_cov) {
    T pull = token.selected * by.covariance_coef, sign = token.x > T(0) ? T(1) : token.x < T(0) ? T(-1) : T(0);
    return {-advantage * ratio + pull * std::fabs(token.x),
            -advantage * ratio,
            pull * sign * token.moves,
            T(0),
            T(0),
            T(0)};
  }
  return {-advantage * token.logprob, T(0), -advantage, T(0), T(0), T(0)};  // gpg
}

// Estimators of KL(policy || reference), their slope by the policy's log-probability l; y = q - l, `bounded` the same
// cut off and `power` its exponential. k1_plus and k3_plus have the slope of k2, whose expectation is the gradient of
// the KL. Source: Schulman, "Approximating KL divergence" (joschu.net/blog/kl-approx.html).
template <Kl kind, class T>
V05_FN Slope<T> kl_term(T y, const Slope<T>& bounded, T power) {
  T k3 = power - bounded.value - T(1);
  if constexpr (kind == Kl::k1) return {-y, T(1)};
  if constexpr (kind == Kl::k2) return {T(0.5) * y * y, -y};
  if constexpr (kind == Kl::k3) return {k3, bounded.slope * (T(1) - power)};
  if constexpr (kind == Kl::k1_plus) return {-y, -y};
  if constexpr (kind == Kl::k3_plus) return {k3, -y};
  return {T(0), T(0)};
}

// The weight that corrects for a sampler with other log-probabilities: truncated (TIS), or 0 outside the bounds
// (IcePop).
template <class T>
V05_FN T sampler_weight(T ratio, bool masks, const PolicyNumbers<T>& by) {
  bool inside = ratio >= by.sampler_floor && ratio <= by.sampler_cap;
  return masks ? (inside ? ratio : T(0)) : smaller(by.sampler_cap, ratio);
}

}  // namespace v05
