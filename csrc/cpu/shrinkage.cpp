#include <atomic>

#include "ops.h"
#include "parallel.h"

namespace v05::cpu {

namespace {
constexpr int64_t kRewardsPerThread = 16384;
}

template <class T>
bool groups_valid(const T* rewards, const int64_t* offsets, const T* prior, int64_t n, int64_t groups, double low,
                  double high) {
  if (offsets[0] != 0 || offsets[groups] != n) return false;
  std::atomic<bool> valid{true};
  parallel_for(groups, n, kRewardsPerThread, [&](int64_t begin, int64_t end) {
    // Integers and no short circuit: loops that vectorise. Bounds in T, as torch compares.
    int bad = 0;
    const T lowest = T(low), highest = T(high);
    for (int64_t g = begin; g < end; ++g) bad |= offsets[g] > offsets[g + 1];
    if (prior)
      for (int64_t g = begin; g < end; ++g) bad |= !((prior[g] >= lowest) & (prior[g] <= highest));
    if (!bad && offsets[begin] >= 0 && offsets[end] <= n)
      for (int64_t i = offsets[begin]; i < offsets[end]; ++i)
        bad |= !((rewards[i] >= lowest) & (rewards[i] <= highest));
    if (bad) valid = false;
  });
  return valid;
}

template <class T>
void shrinkage(const T* rewards, const int64_t* offsets, const T* prior, int64_t n, int64_t groups,
               const Budget<double>& budget, T* floats, int64_t* integers, bool* more, T* rollout_baseline,
               T* advantages) {
  parallel_for(groups, n, kRewardsPerThread, [&](int64_t begin_group, int64_t end_group) {
    for (int64_t g = begin_group; g < end_group; ++g) {
      int64_t begin = offsets[g], end = offsets[g + 1], count = end - begin;
      double value = prior[g], first = count ? rewards[begin] : value, sum = 0;
      for (int64_t i = begin; i < end; ++i) sum += rewards[i] - first;
      double mean = count ? first + sum / double(count) : value;
      Fusion<double> fusion = fuse(mean, count, value, budget);
      const double fields[6] = {mean, fusion.deviation, fusion.weight, fusion.baseline, fusion.mse, fusion.gain};
      for (int64_t field = 0; field < 6; ++field) floats[field * groups + g] = T(fields[field]);
      integers[g] = count;
      integers[groups + g] = fusion.planned;
      more[g] = fusion.planned > count;
      for (int64_t i = begin; i < end && (rollout_baseline || advantages); ++i) {
        double mu = fusion.baseline;
        if (rollout_baseline) {
          double rest = count > 1 ? mean_without<double>(first, sum, rewards[i], count) : value;
          mu = fused_baseline(rest, double(count - 1), value, budget.variance());
          rollout_baseline[i] = T(mu);
        }
        if (advantages) advantages[i] = T(rewards[i] - mu);
      }
    }
  });
}

#define V05_INSTANTIATE(T)                                                                                    \
  template bool groups_valid<T>(const T*, const int64_t*, const T*, int64_t, int64_t, double, double);        \
  template void shrinkage<T>(const T*, const int64_t*, const T*, int64_t, int64_t, const Budget<double>&, T*, \
                             int64_t*, bool*, T*, T*);
V05_INSTANTIATE(float)
V05_INSTANTIATE(double)

}  // namespace v05::cpu
