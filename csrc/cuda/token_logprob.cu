#include <limits>

#include "cuda/ops.h"
#include "cuda/reduce.cuh"
#include "cuda/vector.cuh"

namespace v05::cuda {

namespace {

constexpr int kThreads = 512;
constexpr int kUnroll = 4;          // 16-byte loads in flight a thread
constexpr int kUnrollBackward = 2;  // fewer, for the stores take registers too

// Relative to the largest logit: sum of e^d and of e^d d, d = (x - max) / temperature.
template <class Wide>
struct RowSums {
  Wide max, sum, weighted;
};

template <class Wide>
__device__ __forceinline__ Wide minus_infinity() {
  return -std::numeric_limits<Wide>::infinity();
}

// The sums relative to a maximum at least as large; without a maximum they are 0, or NaN where a logit was.
template <class Wide>
__device__ __forceinline__ RowSums<Wide> raised(const RowSums<Wide>& row, Wide max, Wide inverse_temperature) {
  if (row.max == minus_infinity<Wide>()) return {max, row.sum, row.weighted};
  Wide shift = (row.max - max) * inverse_temperature, factor = exp(shift);
  return {max, row.sum * factor, factor > Wide(0) ? (row.weighted + row.sum * shift) * factor : Wide(0)};
}

template <class Wide>
__device__ __forceinline__ RowSums<Wide> merged(const RowSums<Wide>& a, const RowSums<Wide>& b,
                                                Wide inverse_temperature) {
  Wide max = larger(a.max, b.max);
  RowSums<Wide> x = raised(a, max, inverse_temperature), y = raised(b, max, inverse_temperature);
  return {max, x.sum + y.sum, x.weighted + y.weighted};
}

// A NaN is never the largest, but it is in the sums.
template <class T, class Wide>
__device__ __forceinline__ void gather(const Vector<T>& values, Wide inverse_temperature, RowSums<Wide>& row) {
  Wide max = row.max;
#pragma unroll
  for (int j = 0; j < Vector<T>::kSize; ++j) max = larger(Wide(widen(values.at[j])), max);
  if (max > row.max) row = raised(row, max, inverse_temperature);
  const Wide base = max == minus_infinity<Wide>() ? Wide(0) : max;
#pragma unroll
  for (int j = 0; j < Vector<T>::kSize; ++j) {
    Wide d = (Wide(widen(values.at[j])) - base) * inverse_temperature, e = exp(d);
    row.sum += e;
    row.weighted += e > Wide(0) ? e * d : Wide(0);
  }
}

template <class T, class Wide>
__global__ void __launch_bounds__(kThreads) forward_kernel(LogprobRows<T> rows, LogprobOutputs<Wide> out) {
  const int64_t t = blockIdx.x, target = rows.targets[t];
  if (target == rows.ignore_index) {
    if (threadIdx.x == 0) {
      out.logprob[t] = out.entropy[t] = out.log_sum[t] = Wide(0);
      out.max[t] = minus_infinity<Wide>();
    }
    return;
  }
  const T* x = rows.logits + t * rows.stride;
  const Wide inverse_temperature = Wide(1 / rows.temperature_of(t));
  const bool whole = aligned(x);
  const T nothing = narrow<T>(minus_infinity<Wide>());
  constexpr int64_t kStep = int64_t(kThreads) * Vector<T>::kSize;
  RowSums<Wide> row{minus_infinity<Wide>(), Wide(0), Wide(0)};
  for (int64_t i = threadIdx.x * Vector<T>::kSize; i < rows.vocabulary; i += kUnroll * kStep) {
    Vector<T> values[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) values[u] = load_vector(x, i + u * kStep, rows.vocabulary, whole, nothing);
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) gather(values[u], inverse_temperature, row);
  }
  row = block_reduce<kThreads>(
      row,
      [](const RowSums<Wide>& v, int step) {
        return RowSums<Wide>{shuffle_down(v.max, step), shuffle_down(v.sum, step), shuffle_down(v.weighted, step)};
      },
      [=](const RowSums<Wide>& a, const RowSums<Wide>& b) { return merged(a, b, inverse_temperature); });
  if (threadIdx.x != 0) return;
  const bool empty = row.max == minus_infinity<Wide>() && row.sum == Wide(0);
  const bool inside = target >= 0 && target < rows.vocabulary;
  const Wide log_sum = empty ? Wide(0) : log(row.sum);
  const Wide chosen = inside ? Wide(widen(x[target])) : std::numeric_limits<Wide>::quiet_NaN();
  out.logprob[t] = (chosen - (empty ? Wide(0) : row.max)) * inverse_temperature - log_sum;
  out.entropy[t] = empty ? Wide(0) : larger(Wide(0), log_sum - row.weighted / row.sum);
  out.max[t] = row.max;
  out.log_sum[t] = log_sum;
}

// dz_j = [g_l (1[j = y] - p_j) - g_H p_j (log p_j + H)] / temperature, written once; grad_logits may be the logits.
template <class T, class Wide>
__global__ void __launch_bounds__(kThreads)
    backward_kernel(LogprobRows<T> rows, LogprobOutputs<const Wide> saved, const Wide* grad_logprob,
                    const Wide* grad_entropy, T* grad_logits, int64_t grad_stride) {
  const int64_t t = blockIdx.x, target = rows.targets[t];
  const T* x = rows.logits + t * rows.stride;
  T* out = grad_logits + t * grad_stride;
  const Wide inverse_temperature = Wide(1 / rows.temperature_of(t));
  const Wide max = saved.max[t], log_sum = saved.log_sum[t], entropy = saved.entropy[t];
  const Wide by_logprob = grad_logprob ? grad_logprob[t] * inverse_temperature : Wide(0);
  const Wide by_entropy = grad_entropy ? grad_entropy[t] * inverse_temperature : Wide(0);
  const bool silent = target == rows.ignore_index || max == minus_infinity<Wide>();
  const bool whole = aligned(x) && aligned(out);
  const T nothing = narrow<T>(minus_infinity<Wide>());
  constexpr int64_t kStep = int64_t(kThreads) * Vector<T>::kSize;
  for (int64_t begin = threadIdx.x * Vector<T>::kSize; begin < rows.vocabulary; begin += kUnrollBackward * kStep) {
    Vector<T> values[kUnrollBackward];
    if (!silent)
#pragma unroll
      for (int u = 0; u < kUnrollBackward; ++u)
        values[u] = load_vector(x, begin + u * kStep, rows.vocabulary, whole, nothing);
#pragma unroll
    for (int u = 0; u < kUnrollBackward; ++u) {
      const int64_t i = begin + u * kStep;
#pragma unroll
      for (int j = 0; j < Vector<T>::kSize; ++j) {
        Wide gradient = 0;
        if (!silent) {
          Wide log_p = (Wide(widen(values[u].at[j])) - max) * inverse_temperature - log_sum, p = exp(log_p);
          gradient = (i + j == target ? by_logprob : Wide(0)) - by_logprob * p;
          gradient -= p > Wide(0) ? by_entropy * p * (log_p + entropy) : Wide(0);
        }
        values[u].at[j] = narrow<T>(gradient);
      }
      if (i < rows.vocabulary) store_vector(out, i, rows.vocabulary, whole, values[u]);
    }
  }
}

}  // namespace

template <class T>
void token_logprob(const LogprobRows<T>& rows, const LogprobOutputs<typename WideOf<T>::type>& out,
                   cudaStream_t stream) {
  if (rows.count == 0) return;
  forward_kernel<<<static_cast<unsigned>(rows.count), kThreads, 0, stream>>>(rows, out);
  check_launch("token_logprob");
}

template <class T>
void token_logprob_backward(const LogprobRows<T>& rows, const LogprobOutputs<const typename WideOf<T>::type>& saved,
                            const typename WideOf<T>::type* grad_logprob, const typename WideOf<T>::type* grad_entropy,
                            T* grad_logits, int64_t grad_stride, cudaStream_t stream) {
  if (rows.count == 0) return;
  backward_kernel<<<static_cast<unsigned>(rows.count), kThreads, 0, stream>>>(rows, saved, grad_logprob, grad_entropy,
                                                                              grad_logits, grad_stride);
  check_launch("token_logprob_backward");
}

#define V05_INSTANTIATE(T)                                                                                     \
  template void token_logprob<T>(const LogprobRows<T>&, const LogprobOutputs<WideOf<T>::type>&, cudaStream_t); \
  template void token_logprob_backward<T>(const LogprobRows<T>&, const LogprobOutputs<const WideOf<T>::type>&, \
                                          const WideOf<T>::type*, const WideOf<T>::type*, T*, int64_t, cudaStream_t);
V05_INSTANTIATE(float)
V05_INSTANTIATE(double)
V05_INSTANTIATE(__nv_bfloat16)
V05_INSTANTIATE(__half)

}  // namespace v05::cuda
