// Advantages in one launch; where the batch's moments are asked for, one before it, or two in a large batch.
#include "cuda/groups.cuh"
#include "cuda/launch.cuh"
#include "cuda/ops.h"

namespace v05::cuda {

namespace {

constexpr int kLanes = 4;  // of a team: groups have 4 to 16 rollouts, and the formulas are evaluated in every lane

constexpr int kPoolThreads = 1024;
constexpr int64_t kPoolRewards = 8 * kPoolThreads;  // of a block

// Pools at(begin) to at(end - 1) in one block. Sums are shifted by the first mean, so that equal rewards have squares
// of exactly 0.
template <class At>
__device__ __forceinline__ Pool pooled(int64_t begin, int64_t end, const At& at) {
  const double first = at(begin).mean;
  double weight = 0, shifted = 0, squares = 0;
  for (int64_t i = begin + threadIdx.x; i < end; i += kPoolThreads) {
    const Pool part = at(i);
    weight += part.weight;
    shifted += part.weight * (part.mean - first);
  }
  weight = block_sum<kPoolThreads>(weight);
  shifted = block_sum<kPoolThreads>(shifted);
  const double mean = first + shifted / (weight > 0 ? weight : 1);
  for (int64_t i = begin + threadIdx.x; i < end; i += kPoolThreads) {
    const Pool part = at(i);
    squares += part.squares + part.weight * (part.mean - mean) * (part.mean - mean);
  }
  return {weight, mean, block_sum<kPoolThreads>(squares)};
}

// Mean, and std + eps. NaN stays NaN.
template <class T>
__device__ __forceinline__ void store_moments(const Pool& all, double eps, T* moments) {
  const double degrees = all.weight - 1;
  const bool flat = degrees <= 0 || all.squares <= 0;
  moments[0] = T(all.mean);
  moments[1] = T(flat ? 1 : sqrt(all.squares / (degrees < 1 ? 1 : degrees)) + eps);
}

template <class Reward, class T>
__global__ void __launch_bounds__(kPoolThreads)
    pool_kernel(const Reward* __restrict__ rewards, const T* __restrict__ lengths, int64_t n, double eps,
                Pool* __restrict__ partial, T* __restrict__ moments) {
  const int64_t begin = int64_t(blockIdx.x) * kPoolRewards, end = smaller(begin + kPoolRewards, n);
  const Pool pool = pooled(
      begin, end, [&](int64_t i) { return Pool{lengths ? double(lengths[i]) : 1.0, double(widen(rewards[i])), 0.0}; });
  if (threadIdx.x != 0) return;
  if (gridDim.x == 1)
    store_moments(pool, eps, moments);
  else
    partial[blockIdx.x] = pool;
}

template <class T>
__global__ void __launch_bounds__(kPoolThreads)
    merge_kernel(const Pool* __restrict__ partial, int64_t blocks, double eps, T* __restrict__ moments) {
  const Pool all = pooled(0, blocks, [&](int64_t i) { return partial[i]; });
  if (threadIdx.x == 0) store_moments(all, eps, moments);
}

template <class Reward, class T>
__global__ void __launch_bounds__(kThreads)
    advantage_kernel(const Reward* __restrict__ rewards, const int64_t* __restrict__ offsets,
                     const T* __restrict__ prior, const T* __restrict__ lengths, const T* __restrict__ moments,
                     int64_t groups, Baseline baseline, Scale scale, T low, T high, T eps, T* __restrict__ out) {
  Team<kLanes, T> team(offsets, groups);
  const T value = prior && team.present && baseline != Baseline::given ? prior[team.group] : T(0);
  team.load(rewards);
  team.add_up(rewards);
  int64_t count = team.count();
  T k = T(count), mean = team.mean(T(0)), s = (high - low) * (high - low) * T(0.25);
  T common = mean, factor = 1;
  if (baseline == Baseline::fused) common = fused_baseline(mean, k, value, s);
  if (baseline == Baseline::batch) common = moments[0];
  if (baseline == Baseline::by_length) {  // the first reward where all lengths are 0
    T total = 0, shifted = 0;
    team.each(rewards, [&](int64_t i, T reward) {
      total += lengths[i];
      shifted += lengths[i] * (reward - team.first);
    });
    total = team_sum<kLanes>(total);
    common = team.first + team_sum<kLanes>(shifted) / (total > 0 ? total : T(1));
  }
  if (scale == Scale::batch) factor = 1 / moments[1];
  if (scale == Scale::group) {
    T squares = 0;
    team.each(rewards, [&](int64_t, T reward) { squares += (reward - mean) * (reward - mean); });
    factor = inverse_std(team_sum<kLanes>(squares), k - 1, eps);
  }
  for (int64_t i = team.begin + team.lane; i < team.end; i += kLanes) {
    T reward = widen(rewards[i]), mu = baseline == Baseline::given ? prior[i] : common;
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

int64_t moment_blocks(int64_t n) { return (n + kPoolRewards - 1) / kPoolRewards; }

template <class Reward, class T>
void batch_moments(const Reward* rewards, const T* lengths, int64_t n, double eps, Pool* partial, T* moments,
                   cudaStream_t stream) {
  const unsigned blocks = static_cast<unsigned>(moment_blocks(n));
  if (blocks) launch(pool_kernel<Reward, T>, blocks, kPoolThreads, stream, rewards, lengths, n, eps, partial, moments);
  if (blocks > 1)
    launch(merge_kernel<T>, 1, kPoolThreads, stream, static_cast<const Pool*>(partial), blocks, eps, moments);
  check_launch("batch_moments");
}

template <class Reward, class T>
void advantage(const Reward* rewards, const int64_t* offsets, const T* prior, const T* lengths, const T* moments,
               int64_t groups, Baseline baseline, Scale scale, T low, T high, T eps, T* out, cudaStream_t stream) {
  if (groups == 0) return;
  launch(advantage_kernel<Reward, T>, blocks_for<kLanes>(groups), kThreads, stream, rewards, offsets, prior, lengths,
         moments, groups, baseline, scale, low, high, eps, out);
  check_launch("advantage");
}

#define V05_INSTANTIATE(Reward, T)                                                                                     \
  template void batch_moments(const Reward*, const T*, int64_t, double, Pool*, T*, cudaStream_t);                      \
  template void advantage(const Reward*, const int64_t*, const T*, const T*, const T*, int64_t, Baseline, Scale, T, T, \
                          T, T*, cudaStream_t);
V05_INSTANTIATE(float, float)
V05_INSTANTIATE(double, double)
V05_INSTANTIATE(__nv_bfloat16, float)
V05_INSTANTIATE(__half, float)

}  // namespace v05::cuda
