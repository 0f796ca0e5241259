// Policy losses: one pass over the tokens stores the gradient and leaves partial sums, which a last launch adds up in a
// fixed order; a batch of a few thousand tokens needs no such launch. Options on whole sequences take a launch before
// the pass, and, at the level of sequences, one after it.
#include "cuda/ops.h"
#include "cuda/policy_token.cuh"
#include "cuda/reduce.cuh"
#include "cuda/sequences.cuh"

namespace v05::cuda {

namespace {

constexpr int kThreads = 256, kWarps = kThreads / kWarp;
constexpr int kEach = 4;  // neighbouring tokens of a thread, read together
constexpr int64_t kWarpTokens = kWarp * kEach, kTile = kThreads * kEach;
constexpr int kResident = 4;        // blocks of the pass at a time on one multiprocessor
constexpr int64_t kAloneTiles = 4;  // of a batch that one block goes through

template <class T>
struct alignas(16) Four {
  T at[kEach];
};

// Tokens i to i + kEach of n, or 0 past the end.
template <class T>
__device__ __forceinline__ Four<T> load_four(const T* __restrict__ values, int64_t i, int64_t n, bool aligned) {
  if (aligned && i + kEach <= n) return *reinterpret_cast<const Four<T>*>(values + i);
  Four<T> four;
#pragma unroll
  for (int k = 0; k < kEach; ++k) four.at[k] = i + k < n ? values[i + k] : T(0);
  return four;
}

template <class T>
__device__ __forceinline__ void store_four(T* __restrict__ values, int64_t i, int64_t n, bool aligned,
                                           const Four<T>& four) {
  if (aligned && i + kEach <= n) {
    *reinterpret_cast<Four<T>*>(values + i) = four;
    return;
  }
#pragma unroll
  for (int k = 0; k < kEach; ++k)
    if (i + k < n) values[i + k] = four.at[k];
}

// One sequence: the ratio of its mean and its sampler weight, whichever is asked for.
template <class T>
__global__ void __launch_bounds__(kThreads) sequence_kernel(PolicyInputs<T> in, PolicyScratch<T> scratch) {
  const int64_t s = blockIdx.x, begin = in.offsets[s], end = in.offsets[s + 1];
  const bool corrects = whole_sequence(in.correction);
  double count = 0, x_sum = 0, sampler_sum = 0;
  for (int64_t i = begin + threadIdx.x; i < end; i += kThreads) {
    if (in.weights[i] == T(0)) continue;
    const T old = in.old_logprobs[i];
    count += 1;
    if (in.sequence_level) x_sum += log_ratio(in.logprobs[i], old).value;
    if (corrects) sampler_sum += log_ratio(old, in.sampler_logprobs[i]).value;
  }
  const double sums[] = {count, x_sum, sampler_sum};
  const double sum = block_sums<kThreads>(sums);
  if (threadIdx.x >= kWarp) return;
  count = __shfl_sync(kEveryLane, sum, 0), x_sum = __shfl_sync(kEveryLane, sum, 1);
  sampler_sum = __shfl_sync(kEveryLane, sum, 2);
  if (threadIdx.x != 0) return;
  if (in.sequence_level) {
    scratch.kept[s] = T(count);
    scratch.ratio[s] = exp(T(x_sum / larger(count, 1.0)));
  }
  if (corrects) {
    const double bound = kLogRatioBound<double>;
    scratch.correction[s] =
        sampler_weight(exp(T(clamped(sampler_sum, -bound, bound))), masks(in.correction), in.numbers);
  }
}

// How many of every `stride`-th sequences from `first` on have an unmasked token, in a warp's first lane.
template <class T>
__device__ __forceinline__ T sequences_kept(const PolicyInputs<T>& in, int64_t first, int64_t stride) {
  const int lane = threadIdx.x % kWarp;
  T kept = 0;
  for (int64_t s = first; s < in.sequences; s += stride) {
    const int64_t end = in.offsets[s + 1];
    for (int64_t start = in.offsets[s]; start < end; start += kWarp)
      if (__any_sync(kEveryLane, start + lane < end && in.weights[start + lane] != T(0))) {
        kept += lane == 0 ? 1 : 0;
        break;
      }
  }
  return kept;
}

// The fields that a plain token leaves out, and where a sum goes: metrics follow the loss.
template <class T>
__device__ __forceinline__ void store_sum(int field, double sum, T* __restrict__ loss, T* __restrict__ metrics) {
  *(field == kLoss ? loss : metrics + field - 1) = T(sum);
}

template <Surrogate kSurrogate, bool kPlain, class T>
__global__ void __launch_bounds__(kThreads, sizeof(T) == 8 ? 2 : kResident)
    token_kernel(PolicyInputs<T> in, PolicyScratch<T> scratch, bool aligned, T* __restrict__ gradient,
                 T* __restrict__ loss, T* __restrict__ metrics) {
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const bool looks_up = !in.advantage_per_token || !kPlain;
  T sums[kPolicySums] = {};
  int64_t low = 0;
  for (int64_t tile = blockIdx.x; tile * kTile < in.n; tile += gridDim.x) {
    const int64_t first = tile * kTile + warp * kWarpTokens, i = first + lane * kEach;
    if (first >= in.n) break;
    // Together, before the mask is known: what a masked token holds is read but never used.
    const Four<T> weight = load_four(in.weights, i, in.n, aligned);
    const Four<T> logprob = load_four(in.logprobs, i, in.n, aligned);
    const Four<T> old = load_four(in.old_logprobs, i, in.n, aligned);
    Four<T> advantage, slope, by_ratio;
    if (in.advantage_per_token) advantage = load_four(in.advantages, i, in.n, aligned);
    int64_t s = 0, next = 0;
    if (looks_up) {
      const Span span(in.offsets, in.sequences, first, smaller(first + kWarpTokens, in.n) - 1, low);
      low = span.first;
      s = span.of(in.offsets, i);
      next = s < span.last ? in.offsets[s + 1] : in.n;
    }
#pragma unroll
    for (int k = 0; k < kEach; ++k) {
      while (looks_up && i + k >= next && i + k < in.n) next = in.offsets[++s + 1];
      if (!in.advantage_per_token) advantage.at[k] = in.advantages[s];
      slope.at[k] = by_ratio.at[k] = T(0);
      if (weight.at[k] != T(0))
        slope.at[k] = add_token<kSurrogate, kPlain>(in, scratch, i + k, s, weight.at[k], logprob.at[k], old.at[k],
                                                    advantage.at[k], sums, &by_ratio.at[k]);
    }
    store_four(gradient, i, in.n, aligned, slope);
    if (!kPlain && in.sequence_level) store_four(scratch.by_ratio, i, in.n, aligned, by_ratio);
  }
  sums[kSequences] = sequences_kept(in, int64_t(blockIdx.x) * kWarps + warp, int64_t(gridDim.x) * kWarps);
  if (kPlain) sums[kSamplerWeight] = sums[kTokens];
  double wide[kPolicySums];
#pragma unroll
  for (int field = 0; field < kPolicySums; ++field) wide[field] = sums[field];
  const double sum = block_sums<kThreads>(wide);
  if (threadIdx.x >= kPolicySums) return;
  if (gridDim.x == 1)
    store_sum(threadIdx.x, sum, loss, metrics);
  else
    scratch.partial[threadIdx.x * int64_t(gridDim.x) + blockIdx.x] = sum;
}

// Gives each token of a sequence its share of the derivative by the sequence's mean log-ratio.
template <class T>
__global__ void __launch_bounds__(kThreads)
    share_kernel(PolicyInputs<T> in, PolicyScratch<T> scratch, T* __restrict__ gradient) {
  const int64_t s = blockIdx.x, begin = in.offsets[s], end = in.offsets[s + 1];
  double total = 0;
  for (int64_t i = begin + threadIdx.x; i < end; i += kThreads) total += scratch.by_ratio[i];
  const T part = T(block_sum<kThreads>(total) / larger(double(scratch.kept[s]), 1.0));
  for (int64_t i = begin + threadIdx.x; i < end; i += kThreads)
    if (in.weights[i] != T(0)) gradient[i] += log_ratio(in.logprobs[i], in.old_logprobs[i]).slope * part;
}

// Adds up what the blocks left, a warp a field.
template <class T>
__global__ void __launch_bounds__(kPolicySums* kWarp)
    finish_kernel(const double* __restrict__ partial, int64_t blocks, T* __restrict__ loss, T* __restrict__ metrics) {
  const int field = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  double total = 0;
  for (int64_t i = lane; i < blocks; i += kWarp) total += partial[field * blocks + i];
  total = warp_sum(total);
  if (lane == 0) store_sum(field, total, loss, metrics);
}

// Multiplies in place, where the factor is not 1.
template <class T>
__global__ void __launch_bounds__(kThreads)
    scale_kernel(T* __restrict__ values, int64_t n, const T* __restrict__ factor, bool aligned) {
  const T by = *factor;
  if (by == T(1)) return;
  for (int64_t i = (int64_t(blockIdx.x) * kThreads + threadIdx.x) * kEach; i < n; i += gridDim.x * kTile) {
    Four<T> four = load_four(values, i, n, aligned);
#pragma unroll
    for (int k = 0; k < kEach; ++k) four.at[k] *= by;
    store_four(values, i, n, aligned, four);
  }
}

template <bool kPlain, class T>
auto kernel_of(Surrogate kind) {
  switch (kind) {
    case Surrogate::ppo:
      return token_kernel<Surrogate::ppo, kPlain, T>;
    case Surrogate::cispo:
      return token_kernel<Surrogate::cispo, kPlain, T>;
    case Surrogate::sapo:
      return token_kernel<Surrogate::sapo, kPlain, T>;
    case Surrogate::clip_cov:
      return token_kernel<Surrogate::clip_cov, kPlain, T>;
    case Surrogate::kl_cov:
      return token_kernel<Surrogate::kl_cov, kPlain, T>;
    default:
      return token_kernel<Surrogate::gpg, kPlain, T>;
  }
}

int64_t blocks_at_a_time() {
  int device = 0, count = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
  return int64_t(kResident) * (count ? count : 1);
}

template <class... Pointers>
bool all_aligned(Pointers... pointers) {
  return (reinterpret_cast<uintptr_t>(nullptr) | ... | reinterpret_cast<uintptr_t>(pointers)) % 16 == 0;
}

}  // namespace

int64_t policy_blocks(int64_t n) {
  const int64_t tiles = (n + kTile - 1) / kTile;
  return tiles <= kAloneTiles ? 1 : smaller(tiles, blocks_at_a_time());
}

template <class T>
void policy_loss(const PolicyInputs<T>& in, const PolicyScratch<T>& scratch, T* gradient, T* loss, T* metrics,
                 cudaStream_t stream) {
  const unsigned blocks = static_cast<unsigned>(policy_blocks(in.n)), sequences = static_cast<unsigned>(in.sequences);
  const bool whole = in.sequence_level || whole_sequence(in.correction);
  const bool plain = !in.sequence_level && in.kl == Kl::none && in.correction == Correction::none;
  const bool aligned = all_aligned(in.weights, in.logprobs, in.old_logprobs, gradient, scratch.by_ratio,
                                   in.advantage_per_token ? in.advantages : nullptr);
  if (whole && sequences) sequence_kernel<<<sequences, kThreads, 0, stream>>>(in, scratch);
  const auto kernel = plain ? kernel_of<true, T>(in.surrogate) : kernel_of<false, T>(in.surrogate);
  kernel<<<blocks, kThreads, 0, stream>>>(in, scratch, aligned, gradient, loss, metrics);
  if (in.sequence_level && sequences) share_kernel<<<sequences, kThreads, 0, stream>>>(in, scratch, gradient);
  if (blocks > 1) finish_kernel<<<1, kPolicySums * kWarp, 0, stream>>>(scratch.partial, blocks, loss, metrics);
  check_launch("policy_loss");
}

template <class T>
void scale_unless_one(T* values, int64_t n, const T* factor, cudaStream_t stream) {
  const int64_t tiles = smaller((n + kTile - 1) / kTile, 2 * blocks_at_a_time());
  if (tiles)
    scale_kernel<<<static_cast<unsigned>(tiles), kThreads, 0, stream>>>(values, n, factor, all_aligned(values));
  check_launch("scale_unless_one");
}

#define V05_INSTANTIATE(T)                                                                                 \
  template void policy_loss<T>(const PolicyInputs<T>&, const PolicyScratch<T>&, T*, T*, T*, cudaStream_t); \
  template void scale_unless_one<T>(T*, int64_t, const T*, cudaStream_t);
V05_INSTANTIATE(float)
V05_INSTANTIATE(double)

}  // namespace v05::cuda
