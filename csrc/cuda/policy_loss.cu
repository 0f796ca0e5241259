// Policy losses: one pass over the tokens stores the gradient and leaves partial sums, which a second launch adds up in
// a fixed order; what one block goes through needs no such launch. Options on whole sequences have a pass of their own.
#include <type_traits>

#include "cuda/policy_sequences.cuh"
#include "cuda/policy_sums.cuh"
#include "cuda/policy_token.cuh"
#include "cuda/sequences.cuh"

namespace v05::cuda {

namespace {

constexpr int kEach = 4;  // neighbouring tokens of a thread, read together
constexpr int64_t kWarpTokens = kWarp * kEach, kTile = kThreads * kEach;

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

// The advantages of neighbouring tokens of a thread, each the token's own or its sequence's.
template <class T>
__device__ __forceinline__ Four<T> advantages_of(const PolicyInputs<T>& in, const Span& span, int64_t i, bool full) {
  if (in.advantage_per_token) return load_four(in.advantages, i, in.n, full);
  Four<T> advantage;
  int64_t s = span.one() ? span.first : span.of(in.offsets, i);
  int64_t next = s < span.last ? in.offsets[s + 1] : in.n;
#pragma unroll
  for (int k = 0; k < kEach; ++k) {
    if (!span.one())
      while (s < span.last && i + k >= next) next = in.offsets[++s + 1];
    advantage.at[k] = span.one() && k ? advantage.at[0] : in.advantages[s];
  }
  return advantage;
}

template <Surrogate kSurrogate, Form kForm, class T>
__global__ void __launch_bounds__(kThreads, kLeast<T>)
    token_kernel(PolicyInputs<T> in, bool aligned, T* __restrict__ gradient, PolicyOutputs<T> out) {
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
    const Four<T> advantage = advantages_of(in, span, i, full);
    Four<T> slope;
#pragma unroll
    for (int k = 0; k < kEach; ++k) {
      slope.at[k] = T(0);
      if (weight.at[k] != T(0))
        slope.at[k] = add_token<kSurrogate, kForm>(in, i + k, weight.at[k], logprob.at[k], old.at[k], advantage.at[k],
                                                   Whole<T>{}, sums)
                          .direct;
    }
    store_four(gradient, i, in.n, full, slope);
  }
  sums[kSequences] = sequences_kept(in, int64_t(blockIdx.x) * kWarps + warp, int64_t(gridDim.x) * kWarps);
  if (kForm == Form::plain) sums[kSamplerWeight] = sums[kTokens];
  out.leave(sums);
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

// Calls body with a surrogate that the compiler knows.
template <class Body>
void with_surrogate(Surrogate kind, const Body& body) {
  switch (kind) {
    case Surrogate::ppo:
      return body(std::integral_constant<Surrogate, Surrogate::ppo>());
    case Surrogate::cispo:
      return body(std::integral_constant<Surrogate, Surrogate::cispo>());
    case Surrogate::sapo:
      return body(std::integral_constant<Surrogate, Surrogate::sapo>());
    case Surrogate::clip_cov:
      return body(std::integral_constant<Surrogate, Surrogate::clip_cov>());
    case Surrogate::kl_cov:
      return body(std::integral_constant<Surrogate, Surrogate::kl_cov>());
    default:
      return body(std::integral_constant<Surrogate, Surrogate::gpg>());
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

int64_t policy_blocks(int64_t n, int64_t sequences, bool whole) {
  const int64_t tiles = (n + kTile - 1) / kTile, crews = long_sequences(n, sequences) ? 1 : kWarps;
  const int64_t blocks = whole ? (sequences + crews - 1) / crews : tiles;
  return blocks <= 1 ? 1 : smaller(blocks, blocks_at_a_time());
}

template <class T>
void policy_loss(const PolicyInputs<T>& in, double* partial, T* gradient, T* loss, T* metrics, cudaStream_t stream) {
  const bool whole = in.sequence_level || whole_sequence(in.correction);
  const bool plain = in.kl == Kl::none && in.correction == Correction::none;
  const unsigned blocks = static_cast<unsigned>(policy_blocks(in.n, in.sequences, whole));
  const PolicyOutputs<T> out{loss, metrics, partial};
  with_surrogate(in.surrogate, [&](auto kind) {
    constexpr Surrogate kSurrogate = decltype(kind)::value;
    if (whole) {
      const auto kernel = long_sequences(in.n, in.sequences) ? sequence_kernel<kSurrogate, kThreads, T>
                                                             : sequence_kernel<kSurrogate, kWarp, T>;
      kernel<<<blocks, kThreads, 0, stream>>>(in, gradient, out);
      return;
    }
    const bool aligned = all_aligned(in.weights, in.logprobs, in.old_logprobs, gradient,
                                     in.advantage_per_token ? in.advantages : nullptr);
    const auto kernel = plain ? token_kernel<kSurrogate, Form::plain, T> : token_kernel<kSurrogate, Form::token, T>;
    kernel<<<blocks, kThreads, 0, stream>>>(in, aligned, gradient, out);
  });
  if (blocks > 1) finish_kernel<<<1, kPolicySums * kWarp, 0, stream>>>(out, int64_t(blocks));
  check_launch("policy_loss");
}

template <class T>
void scale_unless_one(T* values, int64_t n, const T* factor, cudaStream_t stream) {
  const int64_t tiles = smaller((n + kTile - 1) / kTile, 2 * blocks_at_a_time());
  if (tiles)
    scale_kernel<<<static_cast<unsigned>(tiles), kThreads, 0, stream>>>(values, n, factor, all_aligned(values));
  check_launch("scale_unless_one");
}

#define V05_INSTANTIATE(T)                                                                 \
  template void policy_loss<T>(const PolicyInputs<T>&, double*, T*, T*, T*, cudaStream_t); \
  template void scale_unless_one<T>(T*, int64_t, const T*, cudaStream_t);
V05_INSTANTIATE(float)
V05_INSTANTIATE(double)

}  // namespace v05::cuda
