// Calibrated fusion in three launches: the likelihoods of every group as two-valued and as graded, a lane a component;
// in one block whether any is graded, and expectation maximisation, whose sums have a fixed order; then what each group
// and each of its rollouts gets.
#include "calibration.h"
#include "cuda/groups.cuh"
#include "cuda/ops.h"

namespace v05::cuda {

namespace {

constexpr int kLanes = 8;  // of a team: one for each component of the mixture at least

template <class T>
constexpr int kFitThreads = sizeof(T) == 8 ? 512 : 1024;

static_assert(kComponents <= kLanes, "a lane a component");

template <class T>
__device__ __forceinline__ T team_max(T value) {
#pragma unroll
  for (int step = kLanes / 2; step > 0; step /= 2)
    value = larger(value, __shfl_xor_sync(kEveryLane, value, step, kLanes));
  return value;
}

// Sum of the rewards of a team's group in [0, 1], in every lane.
template <class T, class Reward>
__device__ __forceinline__ T unit_sum(const Calibration<T, Reward>& in, const Team<kLanes, T>& team, bool graded) {
  const T low = T(in.budget.low), high = T(in.budget.high);
  T sum = 0;
  for (int64_t i = team.begin + team.lane; i < team.end; i += kLanes)
    sum += unit_reward(widen(in.rewards[i]), low, high, graded);
  return team_sum<kLanes>(sum);
}

template <class T, class Reward>
__device__ __forceinline__ T centre_of(const Calibration<T, Reward>& in, const Team<kLanes, T>& team) {
  const T low = T(in.budget.low), high = T(in.budget.high);
  return team.present ? (in.prior[team.group] - low) / (high - low) : T(0.5);
}

template <class T, class Reward>
__global__ void __launch_bounds__(kThreads) likelihood_kernel(Calibration<T, Reward> in) {
  Team<kLanes, T> team(in.offsets, in.groups);
  const T low = T(in.budget.low), high = T(in.budget.high), near = in.near();
  T sums[2] = {};                                                  // of the rewards in [0, 1], two-valued and graded
  T kind = team.present && !finite(in.prior[team.group]) ? 2 : 0;  // 1: graded; 2: not finite, which takes no part
  for (int64_t i = team.begin + team.lane; i < team.end; i += kLanes) {
    const T reward = widen(in.rewards[i]);
#pragma unroll
    for (int graded = 0; graded < 2; ++graded) sums[graded] += unit_reward(reward, low, high, graded);
    kind = larger(kind, finite(reward) ? one_if<T>(between_ends(reward, low, high, near)) : T(2));
  }
  kind = team_max(kind);
  if (team.present && team.lane == 0) in.between()[team.group] = one_if<T>(kind == T(1));
  const int component = team.lane < kComponents ? team.lane : kComponents - 1;
  const T centre = component_centre(component, centre_of(in, team)), strength = component_strength<T>(component);
#pragma unroll
  for (int graded = 0; graded < 2; ++graded) {
    const T log_l = log_likelihood(team_sum<kLanes>(sums[graded]), team.count(), centre, strength, graded);
    const T relative = exp(log_l - team_max(log_l));
    if (team.present && team.lane < kComponents)
      in.table_of(graded)[team.lane * in.groups + team.group] = team.count() && kind < T(2) ? relative : T(0);
  }
}

// The sum of the first kComponents lanes of a warp, in every lane.
__device__ __forceinline__ double sum_of_components(double value) {
  double sum = 0;
#pragma unroll
  for (int c = 0; c < kComponents; ++c) sum += __shfl_sync(kEveryLane, value, c);
  return sum;
}

template <class T, class Reward>
__global__ void __launch_bounds__(kFitThreads<T>) fit_kernel(Calibration<T, Reward> in) {
  constexpr int kWarps = kFitThreads<T> / kWarp;
  __shared__ T of_warp[kWarps][kComponents], weights[kComponents];
  bool some = false;
  for (int64_t g = threadIdx.x; g < in.groups; g += kFitThreads<T>) some |= in.between()[g] > T(0);
  const bool graded = __syncthreads_or(some);
  const T* table = in.table_of(graded);
  const bool leads = threadIdx.x < kComponents;  // a component
  const double start = leads ? double(in.remembered(threadIdx.x)) + kComponentCount : 0;
  double count = start;  // groups that the component counts for: before the batch, and with it
  for (int step = 0;; ++step) {
    if (threadIdx.x < kWarp) {
      const double all = sum_of_components(count);
      if (leads) weights[threadIdx.x] = T(count / all);
    }
    __syncthreads();
    if (step == kFitSteps) break;
    T share[kComponents] = {};
#pragma unroll 1  // unrolled, it would not fit into the registers of so many threads
    for (int64_t g = threadIdx.x; g < in.groups; g += kFitThreads<T>) {
      T joint[kComponents], total = 0;
#pragma unroll
      for (int c = 0; c < kComponents; ++c) total += joint[c] = weights[c] * table[c * in.groups + g];
      const T inverse = total > T(0) ? T(1) / total : T(0);
#pragma unroll
      for (int c = 0; c < kComponents; ++c) share[c] += joint[c] * inverse;
    }
#pragma unroll
    for (int c = 0; c < kComponents; ++c) {
      const T sum = warp_sum(share[c]);
      if (threadIdx.x % kWarp == 0) of_warp[threadIdx.x / kWarp][c] = sum;
    }
    __syncthreads();
    if (leads) {
      count = start;
      for (int warp = 0; warp < kWarps; ++warp) count += of_warp[warp][threadIdx.x];
    }
  }
  if (threadIdx.x == 0) *in.graded = graded;
  if (leads) {
    in.weights[threadIdx.x] = weights[threadIdx.x];
    in.new_state[threadIdx.x] = T(count - kComponentCount);
  }
}

template <class T, class Reward>
__global__ void __launch_bounds__(kThreads, 2) calibrated_kernel(Calibration<T, Reward> in) {
  Team<kLanes, T> team(in.rewards, in.offsets, in.groups);
  const bool graded = *in.graded;
  const T sum = unit_sum(in, team, graded), centre = centre_of(in, team);
  if (!team.present) return;
  const Budget<T> budget{T(in.budget.low), T(in.budget.high), T(in.budget.cost), in.budget.k_init, in.budget.k_max};
  const int64_t count = team.count(), g = team.group;
  const T value = in.prior[g], width = budget.high - budget.low;
  const T* table = in.table_of(graded);
  T row[kComponents];
#pragma unroll
  for (int c = 0; c < kComponents; ++c) row[c] = count || !finite(value) ? table[c * in.groups + g] : T(1);
  const Belief<T> belief = posterior_of(row, sum, count, centre, graded, in.weights);  // NaN from a row of 0
  const bool counted = finite(belief.mean);
  const T mean = counted ? team.mean(value) : belief.mean;
  const Fusion<T> fusion = calibrated_fusion(mean, count, value, belief, graded, budget);
  if (team.lane == 0) {
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
  for (int64_t i = team.begin + team.lane; i < team.end; i += kLanes) {
    const T reward = widen(in.rewards[i]);
    T mu = fusion.baseline;
    if (in.rollout_baseline) {
      const T z = unit_reward(reward, budget.low, budget.high, graded);
      if (counted) mu = budget.low + width * posterior_mean(sum - z, count - 1, centre, graded, in.weights);
      in.rollout_baseline[i] = mu;
    }
    if (in.advantages) in.advantages[i] = reward - mu;
  }
}

}  // namespace

template <class T, class Reward>
void calibrated(const Calibration<T, Reward>& in, cudaStream_t stream) {
  if (in.groups) likelihood_kernel<<<blocks_for<kLanes>(in.groups), kThreads, 0, stream>>>(in);
  fit_kernel<<<1, kFitThreads<T>, 0, stream>>>(in);
  if (in.groups) calibrated_kernel<<<blocks_for<kLanes>(in.groups), kThreads, 0, stream>>>(in);
  check_launch("calibrated");
}

template void calibrated(const Calibration<float, float>&, cudaStream_t);
template void calibrated(const Calibration<double, double>&, cudaStream_t);
template void calibrated(const Calibration<float, __nv_bfloat16>&, cudaStream_t);
template void calibrated(const Calibration<float, __half>&, cudaStream_t);

}  // namespace v05::cuda
