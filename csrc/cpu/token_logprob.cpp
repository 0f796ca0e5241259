#include <atomic>
#include <cstring>
#include <limits>

#include "half.h"
#include "memory.h"
#include "ops.h"
#include "parallel.h"

namespace v05::cpu {

namespace {

constexpr int64_t kLogitsPerThread = 16384;
constexpr int64_t kBlock = 4096;  // logits that stay in the L1 cache between the passes over them
constexpr int64_t kLanes = 32;    // partial results side by side: fixed, so that their bits depend on the row alone

template <class Wide>
constexpr Wide kInfinity = std::numeric_limits<Wide>::infinity();

// What a pass over a row gathers, relative to the largest logit: sum of e^d and of e^d d, d = (x - max) / temperature.
template <class Wide>
struct RowSums {
  Wide max = -kInfinity<Wide>;
  double sum = 0, weighted = 0;
};

// A row of whole lanes in the wide dtype: the logits themselves where they are that already, or a padded copy.
template <class T, class Wide>
V05_INLINE const Wide* whole_lanes(const T* x, int64_t n, Wide* copy) {
  if constexpr (std::is_same_v<T, Wide>)
    if (n % kLanes == 0) return x;
  for (int64_t i = 0; i < n; ++i) copy[i] = widen(x[i]);
  for (int64_t i = n; i % kLanes != 0; ++i) copy[i] = -kInfinity<Wide>;
  return copy;
}

// Sum of the lanes in float64, by halves.
template <class Wide>
V05_INLINE double sum_of_lanes(const Wide* lanes) {
  double sum[kLanes];
  for (int64_t lane = 0; lane < kLanes; ++lane) sum[lane] = lanes[lane];
  for (int64_t half = kLanes / 2; half > 0; half /= 2)
    for (int64_t lane = 0; lane < half; ++lane) sum[lane] += sum[lane + half];
  return sum[0];
}

// Raises max to the largest of n logits; false where one of them is NaN or inf.
template <class Wide>
V05_INLINE bool block_max(const Wide* x, int64_t n, Wide* max) {
  Wide largest[kLanes];
  int32_t bad[kLanes] = {}, any = 0;
  for (int64_t lane = 0; lane < kLanes; ++lane) largest[lane] = -kInfinity<Wide>;
  for (int64_t i = 0; i < n; i += kLanes)
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      Wide value = x[i + lane];
      largest[lane] = value > largest[lane] ? value : largest[lane];
      bad[lane] |= !(value < kInfinity<Wide>);
    }
  for (int64_t lane = 0; lane < kLanes; ++lane) any |= bad[lane];
  for (int64_t half = kLanes / 2; half > 0; half /= 2)
    for (int64_t lane = 0; lane < half; ++lane) largest[lane] = larger(largest[lane], largest[lane + half]);
  *max = larger(*max, largest[0]);
  return !any;
}

// Adds n logits to sums that are already relative to row->max.
template <class Wide>
V05_INLINE void block_sums(const Wide* x, int64_t n, Wide inverse_temperature, RowSums<Wide>* row) {
  const Wide max = row->max;
  Wide sum[kLanes] = {}, weighted[kLanes] = {};
  for (int64_t i = 0; i < n; i += kLanes)
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      Wide d = (x[i + lane] - max) * inverse_temperature;
      Wide e = exp_negative(d);
      sum[lane] += e;
      weighted[lane] += e * zero_unless(d > Wide(kNegligible), d);
    }
  row->sum += sum_of_lanes(sum);
  row->weighted += sum_of_lanes(weighted);
}

// Makes the sums relative to a larger maximum.
template <class Wide>
V05_INLINE void raise_max(Wide max, double inverse_temperature, RowSums<Wide>* row) {
  if (row->sum > 0) {
    double shift = (double(row->max) - double(max)) * inverse_temperature, factor = std::exp(shift);
    row->weighted = factor > 0 ? (row->weighted + row->sum * shift) * factor : 0;
    row->sum *= factor;
  }
  row->max = max;
}

// One read of a row from memory; false where it holds NaN or inf.
template <class T, class Wide>
V05_INLINE bool read_row(const T* x, int64_t n, double inverse_temperature, RowSums<Wide>* row) {
  alignas(64) Wide copy[kBlock];
  for (int64_t begin = 0; begin < n; begin += kBlock) {
    int64_t count = std::min(kBlock, n - begin);
    const Wide* block = whole_lanes(x + begin, count, copy);
    Wide max = row->max;
    if (!block_max(block, count, &max)) return false;
    if (max == -kInfinity<Wide>) continue;
    if (max > row->max) raise_max(max, inverse_temperature, row);
    block_sums(block, count, Wide(inverse_temperature), row);
  }
  return true;
}

template <class T>
struct Forward {
  using Wide = WideOf<T>;

  static V05_INLINE void run(LogprobRows<T> rows, LogprobOutputs<Wide> out, int64_t begin, int64_t end,
                             int64_t* first_bad) {
    for (int64_t t = begin; t < end; ++t) {
      int64_t target = rows.targets[t];
      if (target == rows.ignore_index) {
        out.logprob[t] = out.entropy[t] = out.log_sum[t] = 0;
        out.max[t] = -kInfinity<Wide>;
        continue;
      }
      const T* x = rows.logits + t * rows.stride;
      double inverse_temperature = 1 / rows.temperature_of(t);
      RowSums<Wide> row;
      if (target < 0 || target >= rows.vocabulary ||
          !(rows.temperature_of(t) >= kLowestTemperature && rows.temperature_of(t) <= kHighestTemperature) ||
          !read_row(x, rows.vocabulary, inverse_temperature, &row)) {
        *first_bad = smaller(*first_bad, t);
        continue;
      }
      bool empty = row.max == -kInfinity<Wide>;  // every logit is -inf
      double log_sum = empty ? 0 : std::log(row.sum);
      double d = (double(widen(x[target])) - (empty ? 0 : double(row.max))) * inverse_temperature;
      out.logprob[t] = Wide(d - log_sum);
      out.entropy[t] = empty ? Wide(0) : Wide(larger(0.0, log_sum - row.weighted / row.sum));
      out.max[t] = row.max;
      out.log_sum[t] = Wide(log_sum);
    }
  }
};

// dz_j = [g_l (1[j = y] - p_j) - g_H p_j (log p_j + H)] / temperature.
template <class T>
struct Backward {
  using Wide = WideOf<T>;

  static V05_INLINE void block(const T* __restrict x, int64_t count, Wide max, Wide inverse_temperature, Wide log_sum,
                               Wide constant, Wide slope, T* __restrict out) {
    for (int64_t j = 0; j < count; ++j) {
      Wide l = (widen(x[j]) - max) * inverse_temperature - log_sum;
      narrow(exp_negative(l) * (constant + slope * zero_unless(l > Wide(kNegligible), l)), out + j);
    }
  }

  static V05_INLINE void run(LogprobRows<T> rows, LogprobOutputs<const Wide> saved, const Wide* grad_logprob,
                             const Wide* grad_entropy, T* grad_logits, int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      const T* x = rows.logits + t * rows.stride;
      T* out = grad_logits + t * rows.vocabulary;
      double scale = 1 / rows.temperature_of(t);
      double g_l = grad_logprob ? scale * grad_logprob[t] : 0, g_h = grad_entropy ? scale * grad_entropy[t] : 0;
      Wide max = saved.max[t], log_sum = saved.log_sum[t], inverse_temperature = Wide(scale);
      int64_t target = rows.targets[t];
      if (target == rows.ignore_index || max == -kInfinity<Wide> || (g_l == 0 && g_h == 0)) {
        for (int64_t j = 0; j < rows.vocabulary; ++j) narrow(Wide(0), out + j);
        continue;
      }
      const Wide constant = Wide(-g_l - g_h * saved.entropy[t]), slope = Wide(-g_h);
      const bool inside = target >= 0 && target < rows.vocabulary, in_place = x == out;
      const Wide chosen = inside ? widen(x[target]) : Wide(0);  // read before out, which may be x itself, is written
      T copy[kBlock];
      for (int64_t first = 0; first < rows.vocabulary; first += kBlock) {
        const int64_t count = smaller(kBlock, rows.vocabulary - first);
        if (in_place) std::memcpy(copy, x + first, size_t(count) * sizeof(T));
        block(in_place ? copy : x + first, count, max, inverse_temperature, log_sum, constant, slope, out + first);
      }
      if (!inside) continue;
      double l = (double(chosen) - max) * scale - log_sum;
      double p = std::exp(l), spread = p > 0 ? p * (l + saved.entropy[t]) : 0;
      narrow(Wide(-g_l * std::expm1(l) - g_h * spread), out + target);
    }
  }
};

}  // namespace

template <class T>
int64_t token_logprob(const LogprobRows<T>& rows, const LogprobOutputs<WideOf<T>>& out) {
  std::atomic<int64_t> first_bad{rows.count};
  parallel_for(rows.count, rows.count * rows.vocabulary, kLogitsPerThread, [&](int64_t begin, int64_t end) {
    int64_t bad = rows.count, known = first_bad;
    vectorised<Forward<T>>(rows, out, begin, end, &bad);
    while (bad < known && !first_bad.compare_exchange_weak(known, bad)) {
    }
  });
  return first_bad == rows.count ? -1 : first_bad.load();
}

template <class T>
void token_logprob_backward(const LogprobRows<T>& rows, const LogprobOutputs<const WideOf<T>>& saved,
                            const WideOf<T>* grad_logprob, const WideOf<T>* grad_entropy, T* grad_logits) {
  prefer_large_pages(grad_logits, rows.count * rows.vocabulary * int64_t(sizeof(T)));
  parallel_for(rows.count, rows.count * rows.vocabulary, kLogitsPerThread, [&](int64_t begin, int64_t end) {
    vectorised<Backward<T>>(rows, saved, grad_logprob, grad_entropy, grad_logits, begin, end);
  });
}

#define V05_INSTANTIATE(T)                                                                               \
  template int64_t token_logprob<T>(const LogprobRows<T>&, const LogprobOutputs<WideOf<T>>&);            \
  template void token_logprob_backward<T>(const LogprobRows<T>&, const LogprobOutputs<const WideOf<T>>&, \
                                          const WideOf<T>*, const WideOf<T>*, T*);
V05_INSTANTIATE(float)
V05_INSTANTIATE(double)
V05_INSTANTIATE(BFloat16)
V05_INSTANTIATE(Float16)

}  // namespace v05::cpu
