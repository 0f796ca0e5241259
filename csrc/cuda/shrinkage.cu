#include "cuda/groups.cuh"
#include "cuda/launch.cuh"
#include "cuda/ops.h"

namespace v05::cuda {

namespace {

constexpr int kLanes = 4;  // of a team: groups have 4 to 16 rollouts, and the formulas are evaluated in every lane

// Statistics, test, weight, baseline, error, gain, plan and advantages of every group, in one pass over the rewards.
template <class Reward, class T>
__global__ void __launch_bounds__(kThreads)
    shrinkage_kernel(const Reward* __restrict__ rewards, const int64_t* __restrict__ offsets,
                     const T* __restrict__ prior, int64_t groups, Budget<T> budget, T* __restrict__ floats,
                     int64_t* __restrict__ integers, bool* __restrict__ more, T* __restrict__ rollout_baseline,
                     T* __restrict__ advantages) {
  Team<kLanes, T> team(offsets, groups);
  const T value = team.present ? prior[team.group] : T(0);
  team.load(rewards);
  team.add_up(rewards);
  if (!team.present) return;
  int64_t count = team.count(), g = team.group;
  T mean = team.mean(value), s = budget.variance();
  Fusion<T> fusion = fuse(mean, count, value, budget);
  if (team.lane == 0) {
    floats[g] = mean;
    floats[groups + g] = fusion.deviation;
    floats[2 * groups + g] = fusion.weight;
    floats[3 * groups + g] = fusion.baseline;
    floats[4 * groups + g] = fusion.mse;
    floats[5 * groups + g] = fusion.gain;
    integers[g] = count;
    integers[groups + g] = fusion.planned;
    more[g] = fusion.planned > count;
  }
  if (!rollout_baseline && !advantages) return;
  for (int64_t i = team.begin + team.lane; i < team.end; i += kLanes) {
    T reward = widen(rewards[i]), mu = fusion.baseline;
    if (rollout_baseline) {
      T rest = count > 1 ? mean_without(team.first, team.shifted, reward, count) : value;
      mu = fused_baseline(rest, T(count - 1), value, s);
      rollout_baseline[i] = mu;
    }
    if (advantages) advantages[i] = reward - mu;
  }
}

}  // namespace

template <class Reward, class T>
void shrinkage(const Reward* rewards, const int64_t* offsets, const T* prior, int64_t groups, const Budget<T>& budget,
               T* floats, int64_t* integers, bool* more, T* rollout_baseline, T* advantages, cudaStream_t stream) {
  if (groups == 0) return;
  launch(shrinkage_kernel<Reward, T>, blocks_for<kLanes>(groups), kThreads, stream, rewards, offsets, prior, groups,
         budget, floats, integers, more, rollout_baseline, advantages);
  check_launch("shrinkage");
}

#define V05_INSTANTIATE(Reward, T)                                                                                     \
  template void shrinkage(const Reward*, const int64_t*, const T*, int64_t, const Budget<T>&, T*, int64_t*, bool*, T*, \
                          T*, cudaStream_t);
V05_INSTANTIATE(float, float)
V05_INSTANTIATE(double, double)
V05_INSTANTIATE(__nv_bfloat16, float)
V05_INSTANTIATE(__half, float)

}  // namespace v05::cuda
