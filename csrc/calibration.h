// The scalar mathematics of calibrated fusion (ours), written once for host and device. Rewards are z = (r - a) / (b -
// a) in [0, 1]; a group has `count` of them with this sum, and a prior centred at c. Two-valued rewards: a mixture of
// Beta(h c, h (1 - c)); graded ones: of N(c, 1 / (4 (1 + h))), with 1/4, the largest variance, for the noise of a
// reward.
#pragma once

#include "formulas.h"

namespace v05 {

constexpr int kComponents = 7;  // six strengths, and one that ignores the prior: strength 1, centred in the middle
constexpr int kFitSteps = 30;
constexpr double kComponentCount = 0.5;  // groups that each component counts for beside the batch and the state
constexpr double kNear = 1e-6;           // of the range: how near to an end a reward of two values lies

template <class T>
V05_FN T component_strength(int i) {
  return i == 0 ? T(0.3) : i == 1 ? T(1) : i == 2 ? T(3) : i == 3 ? T(10) : i == 4 ? T(30) : i == 5 ? T(100) : T(1);
}

template <class T>
V05_FN T component_centre(int i, T centre) {
  return i == kComponents - 1 ? T(0.5) : larger(T(0.02), smaller(T(0.98), centre));
}

// A reward in [0, 1]; of two values, exactly 0 or 1.
template <class T>
V05_FN T unit_reward(T reward, T low, T high, bool graded) {
  T z = (reward - low) / (high - low);
  return graded ? z : z > T(0.5) ? T(1) : T(0);
}

// Whether a reward is neither the smallest nor the largest possible. NaN is not.
template <class T>
V05_FN bool between_ends(T reward, T low, T high, T near) {
  return (std::fabs(reward - low) > near) & (std::fabs(high - reward) > near);
}

constexpr int64_t kMany = 1 << 14;  // rewards of a group: eight factors as large are still a float

// B(x + a, k - x + b) / B(a, b) is a product of k ratios; their logarithm is taken a few at a time, so that nothing
// overflows.
template <class T>
V05_FN T log_beta_ratio(int64_t successes, int64_t count, T a, T b) {
  const int64_t at_once = sizeof(T) == 8 ? 32 : count < kMany ? 8 : 4;
  T log_ratio = 0, above = 1, below = 1;
  for (int64_t i = 0; i < count; ++i) {
    above *= i < successes ? a + T(i) : b + T(i - successes);
    below *= a + b + T(i);
    if ((i & (at_once - 1)) == at_once - 1) {
      log_ratio += std::log(above / below);
      above = below = 1;
    }
  }
  return log_ratio + std::log(above / below);
}

// log L of the rewards under one component, up to a constant of the group; 0 without rewards.
template <class T>
V05_FN T log_likelihood(T sum, int64_t count, T centre, T strength, bool graded) {
  if (count <= 0) return T(0);
  if (!graded) return log_beta_ratio(int64_t(sum + T(0.5)), count, strength * centre, strength * (T(1) - centre));
  T k = T(count), gap = sum / k - centre;
  T variance = (k + T(1) + strength) / (T(4) * k * (T(1) + strength));
  return (std::log(variance) + gap * gap / variance) * T(-0.5);
}

// The likelihoods of a group under every component, the largest of them 1.
template <class T>
V05_FN void likelihoods(T sum, int64_t count, T centre, bool graded, T* out) {
  T most = 0;
  V05_UNROLL
  for (int i = 0; i < kComponents; ++i) {
    out[i] = log_likelihood(sum, count, component_centre(i, centre), component_strength<T>(i), graded);
    most = i == 0 ? out[0] : larger(most, out[i]);
  }
  V05_UNROLL
  for (int i = 0; i < kComponents; ++i) out[i] = std::exp(out[i] - most);
}

// Mean and variance of the expected reward in [0, 1], and the trust in the group's own rewards.
template <class T>
struct Belief {
  T mean, variance, weight;
};

// The mean reward that a component leads to, from prior rewards worth `strength`, centred at c.
template <class T>
V05_FN T component_mean(T sum, T count, T strength, T c) {
  return (sum + strength * c) / (count + strength);
}

// How far a component trusts rewards rather than the prior.
template <class T>
V05_FN T component_trust(T count, T strength) {
  return count / (count + strength);
}

// A component's part in the variance of the expected reward: its own, and the square of its mean's gap to that of all.
template <class T>
V05_FN T component_variance(T own, T gap, T count, T strength, bool graded) {
  return (graded ? T(0.25) : own * (T(1) - own)) / (count + strength + T(1)) + gap * gap;
}

// From the likelihoods of a group, which become the shares of the components, and the weights of these.
template <class T>
V05_FN Belief<T> posterior_of(T* share, T sum, int64_t count, T centre, bool graded, const T* weights) {
  const T k = T(count), extra = graded ? T(1) : T(0);
  T total = 0, mean = 0, variance = 0, weight = 0;
  V05_UNROLL
  for (int i = 0; i < kComponents; ++i) total += share[i] *= weights[i];
  V05_UNROLL
  for (int i = 0; i < kComponents; ++i) {
    T strength = component_strength<T>(i) + extra;
    share[i] /= total;
    mean += share[i] * component_mean(sum, k, strength, component_centre(i, centre));
    weight += share[i] * component_trust(k, strength);
  }
  V05_UNROLL
  for (int i = 0; i < kComponents; ++i) {
    T strength = component_strength<T>(i);
    T own = component_mean(sum, k, strength + extra, component_centre(i, centre)), gap = own - mean;
    variance += share[i] * component_variance(own, gap, k, strength, graded);
  }
  return {mean, variance, weight};
}

// The mean of that belief alone, a component at a time, so that a thread holds no arrays.
template <class T>
V05_FN T posterior_mean(T sum, int64_t count, T centre, bool graded, const T* weights) {
  T most = 0, total = 0, mean = 0;
  V05_ROLLED
  for (int i = 0; i < kComponents; ++i) {
    T strength = component_strength<T>(i), c = component_centre(i, centre);
    T log_l = log_likelihood(sum, count, c, strength, graded);
    if (i == 0 || log_l > most) {
      T factor = i == 0 ? T(1) : std::exp(most - log_l);
      total *= factor, mean *= factor, most = log_l;
    }
    T share = weights[i] * std::exp(log_l - most);
    total += share;
    mean += share * component_mean(sum, T(count), strength + (graded ? T(1) : T(0)), c);
  }
  return mean / total;
}

// 4 e / (u (u + 1)) > cost, without a division: what one more rollout takes off the posterior variance, in units of s.
template <class T>
V05_FN bool calibrated_worth(T strength, T scale, T cost) {
  return T(4) * scale > cost * strength * (strength + T(1));
}

// Everything that calibrated fusion says about a group, NaN where its mean and its belief are. With u the strength of
// the belief, j more rollouts bring the gain of one more to e / ((u + j) (u + j + 1)); the rule decides, from a first
// guess, a step up or down.
template <class T>
V05_FN Fusion<T> calibrated_fusion(T mean, int64_t count, T prior, const Belief<T>& belief, bool graded,
                                   const Budget<T>& budget) {
  const T width = budget.high - budget.low;
  const T strength = graded ? T(0.25) / belief.variance : belief.mean * (T(1) - belief.mean) / belief.variance - T(1);
  const T scale = graded ? T(0.25) : belief.variance * strength;
  int64_t planned = count;
  if (count < budget.k_init) {
    planned = budget.k_init;
  } else if (count < budget.k_max && calibrated_worth(strength, scale, budget.cost)) {
    T about = (std::sqrt(T(1) + T(16) * scale / budget.cost) - T(1)) * T(0.5) - strength + T(count);
    planned = first_guess(about, count, budget.k_max);
    while (planned < budget.k_max && calibrated_worth(strength + T(planned - count), scale, budget.cost)) ++planned;
    while (planned > count && !calibrated_worth(strength + T(planned - 1 - count), scale, budget.cost)) --planned;
  }
  const T deviation = count ? squared_deviation(mean, T(count), prior, budget.variance()) : mean - mean;
  return {deviation,
          belief.weight,
          budget.low + width * belief.mean,
          width * width * belief.variance,
          width * width * scale / (strength * (strength + T(1))),
          planned};
}

// What calibrated fusion reads and writes, on the host and on a device alike; rewards are widened to T as they are
// read. state [kComponents], of earlier batches, may be null and counts `decay` times. table [2 kComponents + 1,
// groups] and weights [kComponents] are scratch. floats, integers, more as those of shrinkage; rollout_baseline [n] and
// advantages [n] may be null; graded [1] says whether a reward lies between the ends.
template <class T, class Reward = T>
struct Calibration {
  const Reward* rewards;
  const int64_t* offsets;
  const T *prior, *state;
  int64_t n, groups;
  Budget<double> budget;
  double decay;
  T *table, *weights, *floats;
  int64_t* integers;
  bool* more;
  T *rollout_baseline, *advantages, *new_state;
  bool* graded;

  // Groups of earlier batches that count for a component.
  V05_FN T remembered(int component) const { return state ? state[component] * T(decay) : T(0); }
  V05_FN T near() const { return T(kNear * (budget.high - budget.low)); }
  // [kComponents, groups], the likelihoods of two-valued or of graded rewards.
  V05_FN T* table_of(bool graded) const { return table + (graded ? kComponents * groups : 0); }
  // [groups], 1 where a group has a reward between the ends, and finite values alone.
  V05_FN T* between() const { return table + 2 * kComponents * groups; }
};

// From addresses: those of the inputs (rewards to state), and those of what is written (scratch to graded).
template <class T, class Reward = T>
Calibration<T, Reward> calibration_at(const uintptr_t* in, int64_t n, int64_t groups, const Budget<double>& budget,
                                      double decay, const uintptr_t* out) {
  Calibration<T, Reward> c{};
  c.rewards = reinterpret_cast<const Reward*>(in[0]), c.offsets = reinterpret_cast<const int64_t*>(in[1]);
  c.prior = reinterpret_cast<const T*>(in[2]), c.state = reinterpret_cast<const T*>(in[3]);
  c.n = n, c.groups = groups, c.budget = budget, c.decay = decay;
  c.table = reinterpret_cast<T*>(out[0]), c.weights = c.table + (2 * kComponents + 1) * groups;
  c.floats = reinterpret_cast<T*>(out[1]), c.integers = reinterpret_cast<int64_t*>(out[2]);
  c.more = reinterpret_cast<bool*>(out[3]), c.rollout_baseline = reinterpret_cast<T*>(out[4]);
  c.advantages = reinterpret_cast<T*>(out[5]), c.new_state = reinterpret_cast<T*>(out[6]);
  c.graded = reinterpret_cast<bool*>(out[7]);
  return c;
}

}  // namespace v05
