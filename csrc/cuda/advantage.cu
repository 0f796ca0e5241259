#include "cuda/groups.cuh"
#include "cuda/ops.h"

namespace v05::cuda {

namespace {

template <class T>
__global__ void __launch_bounds__(kThreads)
    advantage_kernel(const T* __restrict__ rewards, const int64_t* __restrict__ offsets, const T* __restrict__ prior,
                     const T* __restrict__ moments, int64_t groups, Baseline baseline, Scale scale, T low, T high,
                     T eps, T* __restrict__ out) {
  Team<T> team(rewards, offsets, groups);
  int64_t count = team.count();
  T k = T(count), mean = team.mean(T(0)), s = (high - low) * (high - low) * T(0.25);
  T value = prior && team.present && baseline != Baseline::given ? prior[team.group] : T(0);
  T common = mean, factor = 1;
  if (baseline == Baseline::fused) common = fused_baseline(mean, k, value, s);
  if (baseline == Baseline::batch) common = moments[0];
  if (scale == Scale::batch) factor = 1 / moments[1];
  if (scale == Scale::group) {
    T squares = 0;
    for (int64_t i = team.begin + team.lane; i < team.end; i += kLanes)
      squares += (rewards[i] - mean) * (rewards[i] - mean);
    factor = inverse_std(team_sum(squares), k - 1, eps);
  }
  for (int64_t i = team.begin + team.lane; i < team.end; i += kLanes) {
    T reward = rewards[i], mu = baseline == Baseline::given ? prior[i] : common;
    if (baseline == Baseline::loo) mu = count > 1 ? mean_without(team.first, team.shifted, reward, count) : reward;
    if (baseline == Baseline::fused_loo) {
      T rest = count > 1 ? mean_without(team.first, team.shifted, reward, count) : value;
      mu = fused_baseline(rest, k - 1, value, s);
    }
    if (scale == Scale::baseline) factor = 1 / implied_std(mu, low, high, eps);
    out[i] = (reward - mu) * factor;
  }
}

}  // namespace

template <class T>
void advantage(const T* rewards, const int64_t* offsets, const T* prior, const T* moments, int64_t groups,
               Baseline baseline, Scale scale, T low, T high, T eps, T* out, cudaStream_t stream) {
  if (groups == 0) return;
  advantage_kernel<<<blocks_for(groups), kThreads, 0, stream>>>(rewards, offsets, prior, moments, groups, baseline,
                                                                scale, low, high, eps, out);
  check_launch("advantage");
}

#define V05_INSTANTIATE(T)                                                                                        \
  template void advantage<T>(const T*, const int64_t*, const T*, const T*, int64_t, Baseline, Scale, T, T, T, T*, \
                             cudaStream_t);
V05_INSTANTIATE(float)
V05_INSTANTIATE(double)

}  // namespace v05::cuda
