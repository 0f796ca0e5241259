// Calibrated fusion: likelihoods of every group, expectation maximisation over the batch, then what each group gets.
// Sums are gathered by blocks of groups, whatever the number of threads.
#include "calibration.h"

#include <atomic>
#include <vector>

#include "ops.h"
#include "parallel.h"
#include "vector_math.h"

namespace v05::cpu {

namespace {

constexpr int64_t kGroupsPerThread = 512, kRewardsPerThread = 1 << 16, kLanes = 16, kBlock = 1024;

template <class T>
bool any_between_ends(const Calibration<T>& in) {
  const T low = T(in.budget.low), high = T(in.budget.high), near = in.near();
  std::atomic<bool> found{false};
  parallel_for(in.n, in.n, kRewardsPerThread, [&](int64_t begin, int64_t end) {
    bool some = false;
    for (int64_t i = begin; i < end; ++i) some |= between_ends(in.rewards[i], low, high, near);
    if (some) found = true;
  });
  return found;
}

// Sum of a group's rewards in [0, 1], exact where they have two values.
template <class T>
double unit_sum(const Calibration<T>& in, int64_t begin, int64_t end, bool graded) {
  double sum = 0;
  for (int64_t i = begin; i < end; ++i)
    sum += unit_reward<double>(in.rewards[i], in.budget.low, in.budget.high, graded);
  return sum;
}

template <class T>
double centre_of(const Calibration<T>& in, int64_t g) {
  return (in.prior[g] - in.budget.low) / (in.budget.high - in.budget.low);
}

template <class T>
void tabulate(const Calibration<T>& in, bool graded, int64_t begin, int64_t end) {
  T* table = in.table_of(graded);
  for (int64_t g = begin; g < end; ++g) {
    int64_t first = in.offsets[g], last = in.offsets[g + 1];
    double row[kComponents] = {};  // a group without rewards counts for nothing
    if (last > first) likelihoods(unit_sum(in, first, last, graded), last - first, centre_of(in, g), graded, row);
    for (int i = 0; i < kComponents; ++i) table[i * in.groups + g] = T(row[i]);
  }
}

// Adds the shares of groups [begin, end) in each component; lanes, because a sum in order does not vectorise.
template <class T>
struct Shares {
  static V05_INLINE void run(const T* table, int64_t groups, const T* weights, int64_t begin, int64_t end,
                             double* sums) {
    T lanes[kComponents][kLanes] = {};
    for (int64_t start = begin; start < end; start += kLanes) {
      const int64_t valid = smaller(kLanes, end - start);
      T joint[kComponents][kLanes] = {}, total[kLanes] = {};
      for (int i = 0; i < kComponents; ++i)
        for (int64_t j = 0; j < valid; ++j) total[j] += joint[i][j] = weights[i] * table[i * groups + start + j];
      for (int64_t j = 0; j < kLanes; ++j) total[j] = T(1) / (total[j] > T(0) ? total[j] : T(1));
      for (int i = 0; i < kComponents; ++i)
        for (int64_t j = 0; j < kLanes; ++j) lanes[i][j] += joint[i][j] * total[j];
    }
    for (int i = 0; i < kComponents; ++i) {
      sums[i] = 0;
      for (int64_t j = 0; j < kLanes; ++j) sums[i] += lanes[i][j];
    }
  }
};

template <class T>
void fit(const Calibration<T>& in, bool graded) {
  const int64_t blocks = (in.groups + kBlock - 1) / kBlock;
  std::vector<double> partial(blocks * kComponents);
  double start[kComponents], soft[kComponents] = {}, all = 0;
  for (int i = 0; i < kComponents; ++i) all += start[i] = in.remembered(i) + kComponentCount;
  for (int i = 0; i < kComponents; ++i) in.weights[i] = T(start[i] / all);
  for (int step = 0; step < kFitSteps; ++step) {
    parallel_for(blocks, in.groups, kGroupsPerThread * 16, [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b)
        vectorised<Shares<T>>(in.table_of(graded), in.groups, in.weights, b * kBlock,
                              smaller((b + 1) * kBlock, in.groups), &partial[b * kComponents]);
    });
    all = 0;
    for (int i = 0; i < kComponents; ++i) {
      soft[i] = 0;
      for (int64_t b = 0; b < blocks; ++b) soft[i] += partial[b * kComponents + i];
      all += soft[i] + start[i];
    }
    for (int i = 0; i < kComponents; ++i) in.weights[i] = T((soft[i] + start[i]) / all);
  }
  for (int i = 0; i < kComponents; ++i) in.new_state[i] = T(soft[i] + in.remembered(i));
}

template <class T>
void finish(const Calibration<T>& in, bool graded, const double* weights, int64_t begin_group, int64_t end_group) {
  const double low = in.budget.low, width = in.budget.high - low;
  const T* table = in.table_of(graded);
  for (int64_t g = begin_group; g < end_group; ++g) {
    int64_t begin = in.offsets[g], end = in.offsets[g + 1], count = end - begin;
    double value = in.prior[g], first = count ? in.rewards[begin] : value, shifted = 0;
    for (int64_t i = begin; i < end; ++i) shifted += in.rewards[i] - first;
    double mean = count ? first + shifted / double(count) : value, centre = centre_of(in, g);
    double sum = unit_sum(in, begin, end, graded), row[kComponents];
    for (int i = 0; i < kComponents; ++i) row[i] = count ? table[i * in.groups + g] : 1;
    Belief<double> belief = posterior_of(row, sum, count, centre, graded, weights);
    Fusion<double> fusion = calibrated_fusion(mean, count, value, belief, graded, in.budget);
    const double fields[6] = {mean, fusion.deviation, fusion.weight, fusion.baseline, fusion.mse, fusion.gain};
    for (int64_t field = 0; field < 6; ++field) in.floats[field * in.groups + g] = T(fields[field]);
    in.integers[g] = count;
    in.integers[in.groups + g] = fusion.planned;
    in.more[g] = fusion.planned > count;
    double known[2];  // without a failure, without a success: two-valued rewards have no other leave-one-out baseline
    if (in.rollout_baseline && !graded)
      for (int z = 0; z < 2; ++z)
        if (z ? sum > 0 : sum < double(count))
          known[z] = low + width * posterior_mean(sum - z, count - 1, centre, graded, weights);
    for (int64_t i = begin; i < end && (in.rollout_baseline || in.advantages); ++i) {
      double mu = fusion.baseline;
      if (in.rollout_baseline) {
        double z = unit_reward<double>(in.rewards[i], low, in.budget.high, graded);
        mu = graded ? low + width * posterior_mean(sum - z, count - 1, centre, graded, weights) : known[int(z)];
        in.rollout_baseline[i] = T(mu);
      }
      if (in.advantages) in.advantages[i] = T(in.rewards[i] - mu);
    }
  }
}

}  // namespace

template <class T>
void calibrated(const Calibration<T>& in) {
  const bool graded = *in.graded = any_between_ends(in);
  parallel_for(in.groups, in.groups, kGroupsPerThread,
               [&](int64_t begin, int64_t end) { tabulate(in, graded, begin, end); });
  fit(in, graded);
  double weights[kComponents];
  for (int i = 0; i < kComponents; ++i) weights[i] = in.weights[i];
  parallel_for(in.groups, in.groups, kGroupsPerThread,
               [&](int64_t begin, int64_t end) { finish(in, graded, weights, begin, end); });
}

template void calibrated<float>(const Calibration<float>&);
template void calibrated<double>(const Calibration<double>&);

}  // namespace v05::cpu
