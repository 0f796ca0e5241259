#include <vector>

#include "ops.h"
#include "parallel.h"

namespace v05::cpu {

namespace {

constexpr int64_t kRewardsPerThread = 16384;
constexpr int64_t kChunk = 8192;  // of the batch statistics: fixed, so that their bits do not depend on the threads

struct Moments {
  double mean, inverse_std;
};

// Sum of term(i) over [0, n): chunks in parallel, then in order.
template <class Term>
double chunked_sum(int64_t n, const Term& term) {
  int64_t chunks = (n + kChunk - 1) / kChunk;
  std::vector<double> partial(static_cast<size_t>(chunks));
  parallel_for(chunks, n, kRewardsPerThread, [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c) {
      double sum = 0;
      for (int64_t i = c * kChunk; i < std::min(n, (c + 1) * kChunk); ++i) sum += term(i);
      partial[static_cast<size_t>(c)] = sum;
    }
  });
  double sum = 0;
  for (double part : partial) sum += part;
  return sum;
}

// Mean and unbiased std of all rewards, each weighted by its length where there is one.
template <class T>
Moments batch_moments(const T* rewards, const T* lengths, int64_t n, double eps) {
  if (n == 0) return {0, 1};
  auto weight = [&](int64_t i) { return lengths ? double(lengths[i]) : 1.0; };
  double first = rewards[0];
  double total = lengths ? chunked_sum(n, weight) : double(n);
  if (total <= 0) return {first, 1};
  double mean = first + chunked_sum(n, [&](int64_t i) { return weight(i) * (rewards[i] - first); }) / total;
  double squares = chunked_sum(n, [&](int64_t i) { return weight(i) * (rewards[i] - mean) * (rewards[i] - mean); });
  return {mean, inverse_std(squares, total - 1, eps)};
}

// Mean of a group's rewards, each weighted by its length; its first reward where all are 0.
template <class T>
double mean_by_length(const T* rewards, const T* lengths, int64_t begin, int64_t end) {
  double first = rewards[begin], total = 0, shifted = 0;
  for (int64_t i = begin; i < end; ++i) total += lengths[i], shifted += lengths[i] * (rewards[i] - first);
  return first + shifted / (total > 0 ? total : 1);
}

}  // namespace

template <class T>
void advantage(const T* rewards, const int64_t* offsets, const T* prior, const T* lengths, int64_t n, int64_t groups,
               Baseline baseline, Scale scale, double low, double high, double eps, T* out) {
  const Budget<double> range{low, high, 0, 1, 1};
  const double s = range.variance();
  Moments batch{0, 1};
  if (baseline == Baseline::batch || scale == Scale::batch)
    batch = batch_moments(rewards, baseline == Baseline::batch ? lengths : nullptr, n, eps);
  parallel_for(groups, n, kRewardsPerThread, [&](int64_t begin_group, int64_t end_group) {
    for (int64_t g = begin_group; g < end_group; ++g) {
      int64_t begin = offsets[g], end = offsets[g + 1], count = end - begin;
      if (count == 0) continue;
      double first = rewards[begin], sum = 0, squares = 0,
             value = prior && baseline != Baseline::given ? double(prior[g]) : 0;
      for (int64_t i = begin; i < end; ++i) sum += rewards[i] - first;
      double mean = first + sum / double(count), common = mean, factor = 1;
      if (scale == Scale::group)
        for (int64_t i = begin; i < end; ++i) squares += (rewards[i] - mean) * (rewards[i] - mean);
      if (baseline == Baseline::fused) common = fused_baseline(mean, double(count), value, s);
      if (baseline == Baseline::batch) common = batch.mean;
      if (baseline == Baseline::by_length) common = mean_by_length(rewards, lengths, begin, end);
      if (scale == Scale::group) factor = inverse_std(squares, double(count - 1), eps);
      if (scale == Scale::batch) factor = batch.inverse_std;
      for (int64_t i = begin; i < end; ++i) {
        double mu = baseline == Baseline::given ? double(prior[i]) : common;
        if (baseline == Baseline::loo) mu = count > 1 ? mean_without<double>(first, sum, rewards[i], count) : first;
        if (baseline == Baseline::fused_loo) {
          double rest = count > 1 ? mean_without<double>(first, sum, rewards[i], count) : value;
          mu = fused_baseline(rest, double(count - 1), value, s);
        }
        if (scale == Scale::baseline) factor = 1 / implied_std(mu, low, high, eps);
        out[i] = T((rewards[i] - mu) * factor);
      }
    }
  });
}

#define V05_INSTANTIATE(T)                                                                                            \
  template void advantage<T>(const T*, const int64_t*, const T*, const T*, int64_t, int64_t, Baseline, Scale, double, \
                             double, double, T*);
V05_INSTANTIATE(float)
V05_INSTANTIATE(double)

}  // namespace v05::cpu
