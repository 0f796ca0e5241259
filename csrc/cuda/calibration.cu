// Calibrated fusion in three launches: likelihoods of every group, a lane a component; expectation maximisation in one
// block, whose sums have a fixed order; then what each group and each of its rollouts gets.
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
template <class T>
__device__ __forceinline__ T unit_sum(const Calibration<T>& in, const Team<kLanes, T>& team, bool graded) {
  const T low = T(in.budget.low), high = T(in.budget.high);
  T sum = 0;
  for (int64_t i = team.begin + team.lane; i < team.end; i += kLanes)
    sum += unit_reward(in.rewards[i], low, high, graded);
  return team_sum<kLanes>(sum);
}

template <class T>
__device__ __forceinline__ T centre_of(const Calibration<T>& in, const Team<kLanes, T>& team) {
  const T low = T(in.budget.low), high = T(in.budget.high);
  return team.present ? (in.prior[team.group] - low) / (high - low) : T(0.5);
}

template <class T>
__global__ void __launch_bounds__(kThreads) likelihood_kernel(Calibration<T> in) {
  Team<kLanes, T> team(in.rewards, in.offsets, in.groups);
  const bool graded = *in.graded;
  const int component = team.lane < kComponents ? team.lane : kComponents - 1;
  const T sum = unit_sum(in, team, graded), centre = component_centre(component, centre_of(in, team));
  const T log_l = log_likelihood(sum, team.count(), centre, component_strength<T>(component), graded);
  const T relative = exp(log_l - team_max(log_l));
  if (team.present && team.lane < kComponents)
    in.table[team.lane * in.groups + team.group] = team.count() ? relative : T(0);
}

template <class T>
__global__ void __launch_bounds__(kFitThreads<T>) fit_kernel(Calibration<T> in) {
  constexpr int kWarps = kFitThreads<T> / kWarp;
  __shared__ T of_warp[kWarps][kComponents];
  __shared__ double start[kComponents], counts[kComponents];  // before the batch, and with it
  if (threadIdx.x < kComponents)
    start[threadIdx.x] = counts[threadIdx.x] = double(in.state[threadIdx.x]) + kComponentCount;
  __syncthreads();
  for (int step = 0; step <= kFitSteps; ++step) {
    T weights[kComponents], share[kComponents] = {};
    double all = 0;
#pragma unroll
    for (int c = 0; c < kComponents; ++c) all += counts[c];
#pragma unroll
    for (int c = 0; c < kComponents; ++c) weights[c] = T(counts[c] / all);
    if (step == kFitSteps) {
      if (threadIdx.x == 0)
        for (int c = 0; c < kComponents; ++c) in.weights[c] = T(counts[c] / all);
      break;
    }
    for (int64_t g = threadIdx.x; g < in.groups; g += kFitThreads<T>) {
      T joint[kComponents], total = 0;
#pragma unroll
      for (int c = 0; c < kComponents; ++c) total += joint[c] = weights[c] * in.table[c * in.groups + g];
      const T inverse = total > T(0) ? T(1) / total : T(0);
#pragma unroll
      for (int c = 0; c < kComponents; ++c) share[c] += joint[c] * inverse;
    }
#pragma unroll
    for (int c = 0; c < kComponents; ++c) {
      const double sum = warp_sum(share[c]);
      if (threadIdx.x % kWarp == 0) of_warp[threadIdx.x / kWarp][c] = sum;
    }
    __syncthreads();
    if (threadIdx.x < kComponents) {
      double sum = start[threadIdx.x];
      for (int warp = 0; warp < kWarps; ++warp) sum += of_warp[warp][threadIdx.x];
      counts[threadIdx.x] = sum;
    }
    __syncthreads();
  }
  if (threadIdx.x < kComponents) in.new_state[threadIdx.x] = T(counts[threadIdx.x] - kComponentCount);
}

template <class T>
__global__ void __launch_bounds__(kThreads, 2) calibrated_kernel(Calibration<T> in) {
  Team<kLanes, T> team(in.rewards, in.offsets, in.groups);
  const bool graded = *in.graded;
  const T sum = unit_sum(in, team, graded), centre = centre_of(in, team);
  if (!team.present) return;
  const Budget<T> budget{T(in.budget.low), T(in.budget.high), T(in.budget.cost), in.budget.k_init, in.budget.k_max};
  const int64_t count = team.count(), g = team.group;
  const T value = in.prior[g], mean = team.mean(value), width = budget.high - budget.low;
  T row[kComponents];
#pragma unroll
  for (int c = 0; c < kComponents; ++c) row[c] = count ? in.table[c * in.groups + g] : T(1);
  const Belief<T> belief = posterior_of(row, sum, count, centre, graded, in.weights);
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
    T mu = fusion.baseline;
    if (in.rollout_baseline) {
      const T z = unit_reward(in.rewards[i], budget.low, budget.high, graded);
      mu = budget.low + width * posterior_mean(sum - z, count - 1, centre, graded, in.weights);
      in.rollout_baseline[i] = mu;
    }
    if (in.advantages) in.advantages[i] = in.rewards[i] - mu;
  }
}

}  // namespace

template <class T>
void calibrated(const Calibration<T>& in, cudaStream_t stream) {
  if (in.groups) likelihood_kernel<<<blocks_for<kLanes>(in.groups), kThreads, 0, stream>>>(in);
  fit_kernel<<<1, kFitThreads<T>, 0, stream>>>(in);
  if (in.groups) calibrated_kernel<<<blocks_for<kLanes>(in.groups), kThreads, 0, stream>>>(in);
  check_launch("calibrated");
}

template void calibrated<float>(const Calibration<float>&, cudaStream_t);
template void calibrated<double>(const Calibration<double>&, cudaStream_t);

}  // namespace v05::cuda
