// Policy losses: one pass over the tokens stores the gradient and leaves partial sums, which a last launch adds up in a
// fixed order; what one block goes through needs no such launch. Options on whole sequences take a launch before the
// pass, and, at the level of sequences, one after it.
#include "cuda/ops.h"
#include "cuda/policy_sequences.cuh"
#include "cuda/policy_token.cuh"
#include "cuda/reduce.cuh"
#include "cuda/sequences.cuh"

namespace v05::cuda {

namespace {

constexpr int kEach = 4;  // neighbouring tokens of a thread, read together
constexpr int64_t kWarpTokens = kWarp * kEach, kTile = kThreads * kEach;
constexpr int kResident = 4;  // blocks of the pass at a time on one multiprocessor

template <class T>
struct alignas(16) Four {
  T at[kEach];
};

// Tokens i to i + kEach of n, or 0 past the end; `whole` where they are all there and begin at a multiple of 16 bytes.
template <class T>
__device__ __forceinline__ Four<T> load_four(const T* __restrict__ values, int64_t i, int64_t n, bool whole) {
  if (whole) return *reinterpret_cast<const Four<T>*>(values + i);
  Four<T> four;
#pragma unroll
  for (int k = 0; k < kEach; ++k) four.at[k] = i + k < n ? values[i + k] : T(0);
  return four;
}

template <class T>
__device__ __forceinline__ void store_four(T* __restrict__ values, int64_t i, int64_t n, bool whole,
                                           const Four<T>& four) {
  if (whole) {
    *reinterpret_cast<Four<T>*>(values + i) = four;
    return;
  }
#pragma unroll
  for (int k = 0; k < kEach; ++k)
    if (i + k < n) values[i + k] = four.at[k];
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

// Where a sum goes: the first field is the loss, the others are metrics.
template <class T>
__device__ __forceinline__ void store_sum(int field, double sum, T* __restrict__ loss, T* __restrict__ metrics) {
  *(field == kLoss ? loss : metrics + field - 1) = T(sum);
}

// What neighbouring tokens of a thread take from their sequences.
template <bool kPlain, class T>
struct Shared {
  Four<T> advantage;
  int64_t sequence[kEach];

  __device__ __forceinline__ Shared(const PolicyInputs<T>& in, const Span& span, int64_t i, bool full) {
    if (in.advantage_per_token) advantage = load_four(in.advantages, i, in.n, full);
    if (kPlain && in.advantage_per_token) return;
    int64_t s = span.one() ? span.first : span.of(in.offsets, i);
    int64_t next = s < span.last ? in.offsets[s + 1] : in.n;
#pragma unroll
    for (int k = 0; k < kEach; ++k) {
      if (!span.one())
        while (s < span.last && i + k >= next) next = in.offsets[++s + 1];
      sequence[k] = s;
      if (!in.advantage_per_token) advantage.at[k] = span.one() && k ? advantage.at[0] : in.advantages[s];
    }
  }
};

template <Surrogate kSurrogate, bool kPlain, class T>
__global__ void __launch_bounds__(kThreads, sizeof(T) == 8 ? 2 : kResident)
    token_kernel(PolicyInputs<T> in, PolicyScratch<T> scratch, bool aligned, T* __restrict__ gradient,
                 T* __restrict__ loss, T* __restrict__ metrics) {
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  // Every block takes tiles that follow each other, the first ones one more where they do not come out even.
  const int64_t tiles = (in.n + kTile - 1) / kTile, each = tiles / gridDim.x, more = tiles % gridDim.x;
  const int64_t begin = blockIdx.x * each + smaller<int64_t>(blockIdx.x, more);
  const int64_t end = begin + each + (blockIdx.x < more ? 1 : 0);
  T sums[kPolicySums] = {};
  int64_t low = -1;
  for (int64_t tile = begin; tile < end; ++tile) {
    const int64_t first = tile * kTile + warp * kWarpTokens, i = first + lane * kEach;
    if (first >= in.n) break;
    // Together, before the mask is known: what a masked token holds is read but never used.
    const bool full = aligned && i + kEach <= in.n;
    const Four<T> weight = load_four(in.weights, i, in.n, full);
    const Four<T> logprob = load_four(in.logprobs, i, in.n, full);
    const Four<T> old = load_four(in.old_logprobs, i, in.n, full);
    if (low < 0) low = sequence_of(in.offsets, first, 0, in.sequences - 1);
    const Span span(in.offsets, in.sequences, first, smaller(first + kWarpTokens, in.n) - 1, low);
    low = span.first;
    const Shared<kPlain, T> shared(in, span, i, full);
    Four<T> slope, by_ratio;
#pragma unroll
    for (int k = 0; k < kEach; ++k) {
      slope.at[k] = by_ratio.at[k] = T(0);
      if (weight.at[k] != T(0))
        slope.at[k] = add_token<kSurrogate, kPlain>(in, scratch, i + k, shared.sequence[k], weight.at[k], logprob.at[k],
                                                    old.at[k], shared.advantage.at[k], sums, &by_ratio.at[k]);
    }
    store_four(gradient, i, in.n, full, slope);
    if (!kPlain && in.sequence_level) store_four(scratch.by_ratio, i, in.n, full, by_ratio);
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
    const bool full = aligned && i + kEach <= n;
    Four<T> four = load_four(values, i, n, full);
#pragma unroll
    for (int k = 0; k < kEach; ++k) four.at[k] *= by;
    store_four(values, i, n, full, four);
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
  return tiles <= 1 ? 1 : smaller(tiles, blocks_at_a_time());
}

template <bool kLong, class T>
static void launch(const PolicyInputs<T>& in, const PolicyScratch<T>& scratch, T* gradient, T* loss, T* metrics,
                   cudaStream_t stream) {
  const unsigned blocks = static_cast<unsigned>(policy_blocks(in.n));
  const unsigned crews = Crew<kLong>::blocks_for(in.sequences);
  const bool whole = in.sequence_level || whole_sequence(in.correction);
  const bool plain = !in.sequence_level && in.kl == Kl::none && in.correction == Correction::none;
  const bool aligned = all_aligned(in.weights, in.logprobs, in.old_logprobs, gradient, scratch.by_ratio,
                                   in.advantage_per_token ? in.advantages : nullptr);
  if (whole && crews) sequence_kernel<kLong><<<crews, kThreads, 0, stream>>>(in, scratch);
  const auto kernel = plain ? kernel_of<true, T>(in.surrogate) : kernel_of<false, T>(in.surrogate);
  kernel<<<blocks, kThreads, 0, stream>>>(in, scratch, aligned, gradient, loss, metrics);
  if (in.sequence_level && crews) share_kernel<kLong><<<crews, kThreads, 0, stream>>>(in, scratch, gradient);
  if (blocks > 1) finish_kernel<<<1, kPolicySums * kWarp, 0, stream>>>(scratch.partial, blocks, loss, metrics);
  check_launch("policy_loss");
}

template <class T>
void policy_loss(const PolicyInputs<T>& in, const PolicyScratch<T>& scratch, T* gradient, T* loss, T* metrics,
                 cudaStream_t stream) {
  const auto run = in.n > in.sequences * kShortMean ? launch<true, T> : launch<false, T>;
  run(in, scratch, gradient, loss, metrics, stream);
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
