// Calibrated fusion in three launches: the likelihoods of every group as two-valued and as graded, a lane a component;
// whether any is graded, and the fit of the mixture; then what each group and each of its rollouts gets.
#include "calibration.h"
#include "cuda/groups.cuh"
#include "cuda/launch.cuh"
#include "cuda/mixture_fit.cuh"
#include "cuda/ops.h"

namespace v05::cuda {

namespace {

constexpr int kLanes = 8;  // of a team: one for each component of the mixture at least

static_assert(kComponents <= kLanes, "a lane a component");

template <class T>
__device__ __forceinline__ T team_max(T value) {
#pragma unroll
  for (int step = kLanes / 2; step > 0; step /= 2)
    value = larger(value, __shfl_xor_sync(kEveryLane, value, step, kLanes));
  return value;
}

// The prior in [0, 1].
template <class T>
__device__ __forceinline__ T centre_of(T prior, const Budget<double>& budget) {
  return (prior - T(budget.low)) / (T(budget.high) - T(budget.low));
}

template <class T, class Reward>
__global__ void __launch_bounds__(kThreads) likelihood_kernel(Calibration<T, Reward> in, Mailbox<T> mail) {
  if (blockIdx.x == 0 && mail.words)
    for (int i = threadIdx.x; i < Mailbox<T>::kWords; i += kThreads) mail.words[i] = 0;
  Team<kLanes, T> team(in.offsets, in.groups);
  const T value = team.present ? in.prior[team.group] : T(0);
  team.load(in.rewards);
  const T low = T(in.budget.low), high = T(in.budget.high), near = in.near();
  T sums[2] = {};                   // of the rewards in [0, 1], two-valued and graded
  T kind = !finite(value) ? 2 : 0;  // 1: graded; 2: not finite, which takes no part
  team.each(in.rewards, [&](int64_t, T reward) {
#pragma unroll
    for (int graded = 0; graded < 2; ++graded) sums[graded] += unit_reward(reward, low, high, graded);
    kind = larger(kind, finite(reward) ? one_if<T>(between_ends(reward, low, high, near)) : T(2));
  });
  kind = team_max(kind);
  if (team.present && team.lane == 0) in.between()[team.group] = one_if<T>(kind == T(1));
  const int component = team.lane < kComponents ? team.lane : kComponents - 1;
  const T centre = component_centre(component, centre_of(value, in.budget)),
          strength = component_strength<T>(component);
#pragma unroll
  for (int graded = 0; graded < 2; ++graded) {
    const T log_l = log_likelihood(team_sum<kLanes>(sums[graded]), team.count(), centre, strength, graded);
    const T relative = exp(log_l - team_max(log_l));
    if (team.present && team.lane < kComponents)
      in.table_of(graded)[team.lane * in.groups + team.group] = team.count() && kind < T(2) ? relative : T(0);
  }
}

// The component of a lane, of weight 0 where a lane has none.
template <class T>
struct Component {
  T weight, strength, centre;

  __device__ Component(int lane, const T* weights, T prior_centre) {
    const int i = lane < kComponents ? lane : kComponents - 1;
    weight = lane < kComponents ? weights[i] : T(0);
    strength = component_strength<T>(i);
    centre = component_centre(i, prior_centre);
  }
  // The mean reward that it leads to.
  __device__ T mean(T sum, T count, bool graded) const {
    return component_mean(sum, count, strength + (graded ? T(1) : T(0)), centre);
  }
};

// The belief of a team's group, from the likelihood of the lane's component.
template <class T>
__device__ __forceinline__ Belief<T> team_posterior(const Component<T>& own, T likelihood, T sum, T count,
                                                    bool graded) {
  T share = likelihood * own.weight;
  share /= team_sum<kLanes>(share);
  const T expected = own.mean(sum, count, graded),
          trust = component_trust(count, own.strength + (graded ? T(1) : T(0)));
  const T mean = team_sum<kLanes>(share * expected), weight = team_sum<kLanes>(share * trust);
  const T variance = component_variance(expected, expected - mean, count, own.strength, graded);
  return {mean, team_sum<kLanes>(share * variance), weight};
}

// The mean of the belief from rewards of two values alone.
template <class T>
__device__ __forceinline__ T team_mean(const Component<T>& own, T sum, int64_t count) {
  const T log_l = log_likelihood(sum, count, own.centre, own.strength, false);
  const T share = own.weight * exp(log_l - team_max(log_l));
  return team_sum<kLanes>(share * own.mean(sum, T(count), false)) / team_sum<kLanes>(share);
}

template <class T, class Reward>
__global__ void __launch_bounds__(kThreads, 2) calibrated_kernel(Calibration<T, Reward> in) {
  Team<kLanes, T> team(in.offsets, in.groups);
  const T value = team.present ? in.prior[team.group] : T(0), centre = centre_of(value, in.budget);
  const bool graded = *in.graded, leads = team.present && team.lane == 0;
  team.load(in.rewards);
  team.add_up(in.rewards);
  const Budget<T> budget{T(in.budget.low), T(in.budget.high), T(in.budget.cost), in.budget.k_init, in.budget.k_max};
  const int64_t count = team.count(), g = team.group;
  const T width = budget.high - budget.low;
  T sum = 0;  // of the rewards in [0, 1]
  team.each(in.rewards, [&](int64_t, T reward) { sum += unit_reward(reward, budget.low, budget.high, graded); });
  sum = team_sum<kLanes>(sum);
  const Component<T> own(team.lane, in.weights, centre);
  const bool tabulated = team.lane < kComponents && (count || !finite(value));  // a row of 0 makes all NaN
  const T likelihood = tabulated ? in.table_of(graded)[team.lane * in.groups + g] : T(1);
  const Belief<T> belief = team_posterior(own, likelihood, sum, T(count), graded);
  const bool counted = finite(belief.mean);
  const T mean = counted ? team.mean(value) : belief.mean;
  const Fusion<T> fusion = calibrated_fusion(mean, count, value, belief, graded, budget);
  if (leads) {
    in.floats[g] = mean;
    in.floats[in.groups + g] = fusion.deviation;
    in.floats[2 * in.groups + g] = fusion.weight;
    in.floats[3 * in.groups + g] = fusion.baseline;
    in.floats[4 * in.groups + g] = fusion.mse;
    in.floats[5 * in.groups + g] = fusion.gain;
    in.integers[g] = count;
    in.integers[in.groups + g] = fusion.planned;
    in.more[g] = fusion.planned > count;
  }
  if (!in.rollout_baseline && !in.advantages) return;
  T known[2] = {};  // without a failure, without a success: rewards of two values have no other leave-one-out baseline
  if (in.rollout_baseline && !graded)
#pragma unroll
    for (int z = 0; z < 2; ++z)
      known[z] = budget.low + width * team_mean(own, smaller(larger(sum - T(z), T(0)), T(count - 1)), count - 1);
  team.each(in.rewards, [&](int64_t i, T reward) {
    T mu = fusion.baseline;
    if (in.rollout_baseline) {
      const T z = unit_reward(reward, budget.low, budget.high, graded);
      if (counted && graded)
        mu = budget.low + width * posterior_mean(sum - z, count - 1, centre, graded, in.weights);
      else if (counted)
        mu = z > T(0.5) ? known[1] : known[0];
      in.rollout_baseline[i] = mu;
    }
    if (in.advantages) in.advantages[i] = reward - mu;
  });
}

}  // namespace

template <class T, class Reward>
void calibrated(const Calibration<T, Reward>& in, cudaStream_t stream) {
  const unsigned blocks = fit_blocks<T>(in.groups, multiprocessors());
  // Nothing is in the outputs of groups before the last launch: there the blocks of the fit hand each other their sums.
  const Mailbox<T> mail{blocks > 1 ? reinterpret_cast<Word*>(in.floats) : nullptr};
  if (in.groups) launch(likelihood_kernel<T, Reward>, blocks_for<kLanes>(in.groups), kThreads, stream, in, mail);
  launch_at_once(fit_kernel<T, Reward>, blocks, kFitThreads, stream, in, mail);
  if (in.groups) launch(calibrated_kernel<T, Reward>, blocks_for<kLanes>(in.groups), kThreads, stream, in);
  check_launch("calibrated");
}

template void calibrated(const Calibration<float, float>&, cudaStream_t);
template void calibrated(const Calibration<double, double>&, cudaStream_t);
template void calibrated(const Calibration<float, __nv_bfloat16>&, cudaStream_t);
template void calibrated(const Calibration<float, __half>&, cudaStream_t);

}  // namespace v05::cuda
