// Log-probs: a block takes a row, reads it once forward, and reads and writes it once backward.
#include <limits>

#include "cuda/exponent.cuh"
#include "cuda/launch.cuh"
#include "cuda/ops.h"
#include "cuda/reduce.cuh"
#include "cuda/vector.cuh"

namespace v05::cuda {

namespace {

constexpr int kThreads = 512;
constexpr int kUnroll = 4;          // 16-byte loads in flight a thread
constexpr int kUnrollBackward = 2;  // fewer, for the stores take registers too

template <class Wide>
__device__ __forceinline__ Wide minus_infinity() {
  return -std::numeric_limits<Wide>::infinity();
}

// Of some logits x: the largest, and the sums of power(y), plain and times y, where y = (x - max) scale. In what
// follows `scale` is unit / temperature.
template <class Wide>
struct RowSums {
  Wide max, sum, weighted;
};

// The sums relative to a maximum at least as large; without a maximum they are 0, or NaN where a logit was.
template <class Wide>
__device__ __forceinline__ RowSums<Wide> raised(const RowSums<Wide>& row, Wide max, Wide scale) {
  if (row.max == minus_infinity<Wide>()) return {max, row.sum, row.weighted};
  const Wide shift = finite((row.max - max) * scale), factor = power(shift);
  return {max, row.sum * factor, (row.weighted + row.sum * shift) * factor};
}

// The sums of a team of lanes, side by side in a warp, in its first lane; every lane gets its maximum.
template <int kLanes, class Wide>
__device__ __forceinline__ RowSums<Wide> gathered(RowSums<Wide> row, Wide scale) {
  Wide max = row.max;
#pragma unroll
  for (int step = kLanes / 2; step > 0; step /= 2) max = fmax(max, __shfl_xor_sync(kEveryLane, max, step, kLanes));
  row = raised(row, max, scale);
#pragma unroll
  for (int step = kLanes / 2; step > 0; step /= 2) {
    row.sum += __shfl_xor_sync(kEveryLane, row.sum, step, kLanes);
    row.weighted += __shfl_xor_sync(kEveryLane, row.weighted, step, kLanes);
  }
  return row;
}

// The sums of the block, in the first warp.
template <class Wide>
__device__ __forceinline__ RowSums<Wide> gathered_in_block(RowSums<Wide> row, Wide scale) {
  constexpr int kWarps = kThreads / kWarp;
  __shared__ RowSums<Wide> of_warp[kWarps];
  row = gathered<kWarp>(row, scale);
  if (threadIdx.x % kWarp == 0) of_warp[threadIdx.x / kWarp] = row;
  __syncthreads();
  return threadIdx.x < kWarp ? gathered<kWarps>(of_warp[threadIdx.x % kWarps], scale) : row;
}

// A NaN is never the largest, but it is in the sums.
template <class T, class Wide, int kCount>
__device__ __forceinline__ void add(const Vector<T> (&values)[kCount], Wide scale, RowSums<Wide>& row) {
  const Wide max = fmax(row.max, largest<Wide>(values));
  if (max > row.max) row = raised(row, max, scale);
  const Wide base = max == minus_infinity<Wide>() ? Wide(0) : max;
#pragma unroll
  for (int u = 0; u < kCount; ++u) {
    const Widened<Wide, T> x(values[u]);
#pragma unroll
    for (int j = 0; j < Vector<T>::kSize; ++j) {
      const Wide y = finite((x.at[j] - base) * scale), e = power(y);
      row.sum += e;
      row.weighted += e * y;
    }
  }
}

// kWhole: the row is read in vectors.
template <bool kWhole, class T, class Wide>
__device__ __forceinline__ RowSums<Wide> sums_of(const T* __restrict__ x, int columns, Wide scale) {
  constexpr int kStep = kThreads * Vector<T>::kSize;
  const T nothing = narrow<T>(minus_infinity<Wide>());
  RowSums<Wide> row{minus_infinity<Wide>(), Wide(0), Wide(0)};
  int i = threadIdx.x * Vector<T>::kSize;
  for (; i < columns - (kUnroll - 1) * kStep; i += kUnroll * kStep) {
    Vector<T> values[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) values[u] = load_vector<kWhole>(x, i + u * kStep, columns, nothing);
    add(values, scale, row);
  }
  for (; i < columns; i += kStep) {
    const Vector<T> values[1] = {load_vector<kWhole>(x, i, columns, nothing)};
    add(values, scale, row);
  }
  return row;
}

template <class T, class Wide>
__global__ void __launch_bounds__(kThreads, sizeof(Wide) == 8 ? 1 : 2)
    forward_kernel(LogprobRows<T> rows, LogprobOutputs<Wide> out) {
  const int64_t t = blockIdx.x, target = rows.targets[t];
  if (target == rows.ignore_index) {
    if (threadIdx.x == 0) {
      out.logprob[t] = out.entropy[t] = out.log_sum[t] = Wide(0);
      out.max[t] = minus_infinity<Wide>();
    }
    return;
  }
  const T* x = rows.logits + t * rows.stride;
  const Wide inverse_temperature = Wide(1 / rows.temperature_of(t)), scale = inverse_temperature * unit<Wide>();
  const int columns = int(rows.vocabulary);
  RowSums<Wide> row = in_vectors(x, columns) ? sums_of<true>(x, columns, scale) : sums_of<false>(x, columns, scale);
  row = gathered_in_block(row, scale);
  if (threadIdx.x != 0) return;
  const bool empty = row.max == minus_infinity<Wide>() && row.sum == Wide(0);
  const bool inside = target >= 0 && target < columns;
  const Wide log_sum = empty ? Wide(0) : log(row.sum);
  const Wide chosen = inside ? Wide(widen(x[target])) : std::numeric_limits<Wide>::quiet_NaN();
  out.logprob[t] = (chosen - (empty ? Wide(0) : row.max)) * inverse_temperature - log_sum;
  out.entropy[t] = empty ? Wide(0) : larger(Wide(0), log_sum - row.weighted / (row.sum * unit<Wide>()));
  out.max[t] = row.max;
  out.log_sum[t] = log_sum;
}

// The gradient of a row: dz_j = [g_l (1[j = y] - p_j) - g_H p_j (log p_j + H)] / temperature, where g_l / temperature
// is by_logprob and g_H / temperature by_entropy.
template <class Wide>
struct RowSlope {
  Wide max, scale, log_sum, by_logprob, by_entropy, entropy;

  // unit log p
  __device__ __forceinline__ Wide exponent(Wide logit) const { return finite((logit - max) * scale - log_sum); }

  __device__ __forceinline__ Wide at(Wide logit) const {
    const Wide y = exponent(logit), level = -by_logprob - by_entropy * entropy, slope = by_entropy / unit<Wide>();
    return power(y) * (level - slope * y);
  }

  // Its p is close to 1 in most rows, where 1 - p would have few digits left.
  __device__ __forceinline__ Wide at_target(Wide logit) const {
    const Wide y = exponent(logit), log_p = y / unit<Wide>();
    return -by_logprob * expm1(log_p) - by_entropy * power(y) * (log_p + entropy);
  }
};

template <bool kWhole, int kCount, class T, class Wide>
__device__ __forceinline__ void write_vectors(const T* x, int first, int columns, const RowSlope<Wide>& row, T* out) {
  constexpr int kStep = kThreads * Vector<T>::kSize;
  Vector<T> values[kCount];
#pragma unroll
  for (int u = 0; u < kCount; ++u)
    values[u] = load_vector<kWhole>(x, first + u * kStep, columns, narrow<T>(minus_infinity<Wide>()));
#pragma unroll
  for (int u = 0; u < kCount; ++u) {
    Widened<Wide, T> logits(values[u]);
#pragma unroll
    for (int j = 0; j < Vector<T>::kSize; ++j) logits.at[j] = row.at(logits.at[j]);
    store_vector<kWhole>(out, first + u * kStep, columns, narrowed<T>(logits.at));
  }
}

// The target, the only one with a share of its own, is written once more by the thread that wrote it before; -1: none.
template <bool kWhole, class T, class Wide>
__device__ __forceinline__ void write_slopes(const T* x, int columns, const RowSlope<Wide>& row, int target, T* out) {
  constexpr int kSize = Vector<T>::kSize, kStep = kThreads * kSize;
  const bool owns = target >= 0 && target / kSize % kThreads == threadIdx.x;
  const Wide chosen = owns ? row.at_target(Wide(widen(x[target]))) : Wide(0);
  int i = threadIdx.x * kSize;
  for (; i < columns - (kUnrollBackward - 1) * kStep; i += kUnrollBackward * kStep)
    write_vectors<kWhole, kUnrollBackward>(x, i, columns, row, out);
  for (; i < columns; i += kStep) write_vectors<kWhole, 1>(x, i, columns, row, out);
  if (owns) out[target] = narrow<T>(chosen);
}

template <bool kWhole, class T>
__device__ __forceinline__ void write_zeros(T* out, int columns) {
  constexpr int kSize = Vector<T>::kSize;
  for (int i = threadIdx.x * kSize; i < columns; i += kThreads * kSize)
    store_vector<kWhole>(out, i, columns, Vector<T>{});
}

// grad_logits may be the logits, of which each is read before it is written.
template <class T, class Wide>
__global__ void __launch_bounds__(kThreads, sizeof(Wide) == 8 ? 1 : 2)
    backward_kernel(LogprobRows<T> rows, LogprobOutputs<const Wide> saved, const Wide* grad_logprob,
                    const Wide* grad_entropy, T* grad_logits, int64_t grad_stride) {
  const int64_t t = blockIdx.x, target = rows.targets[t];
  const int columns = int(rows.vocabulary);
  const T* x = rows.logits + t * rows.stride;
  T* out = grad_logits + t * grad_stride;
  const Wide max = saved.max[t];
  const Wide inverse_temperature = Wide(1 / rows.temperature_of(t));
  const Wide by_logprob = grad_logprob ? grad_logprob[t] * inverse_temperature : Wide(0);
  const Wide by_entropy = grad_entropy ? grad_entropy[t] * inverse_temperature : Wide(0);
  const bool wide = in_vectors(out, columns), idle = by_logprob == Wide(0) && by_entropy == Wide(0);
  if (target == rows.ignore_index || max == minus_infinity<Wide>() || idle) {  // whatever the row holds
    wide ? write_zeros<true>(out, columns) : write_zeros<false>(out, columns);
    return;
  }
  const RowSlope<Wide> row{max,
                           inverse_temperature * unit<Wide>(),
                           saved.log_sum[t] * unit<Wide>(),
                           by_logprob,
                           by_entropy,
                           saved.entropy[t]};
  const int place = target >= 0 && target < columns ? int(target) : -1;
  if (wide && in_vectors(x, columns))
    write_slopes<true>(x, columns, row, place, out);
  else
    write_slopes<false>(x, columns, row, place, out);
}

}  // namespace

template <class T>
void token_logprob(const LogprobRows<T>& rows, const LogprobOutputs<typename WideOf<T>::type>& out,
                   cudaStream_t stream) {
  if (rows.count == 0) return;
  launch(forward_kernel<T, typename WideOf<T>::type>, static_cast<unsigned>(rows.count), kThreads, stream, rows, out);
  check_launch("token_logprob");
}

template <class T>
void token_logprob_backward(const LogprobRows<T>& rows, const LogprobOutputs<const typename WideOf<T>::type>& saved,
                            const typename WideOf<T>::type* grad_logprob, const typename WideOf<T>::type* grad_entropy,
                            T* grad_logits, int64_t grad_stride, cudaStream_t stream) {
  if (rows.count == 0) return;
  launch(backward_kernel<T, typename WideOf<T>::type>, static_cast<unsigned>(rows.count), kThreads, stream, rows, saved,
         grad_logprob, grad_entropy, grad_logits, grad_stride);
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
