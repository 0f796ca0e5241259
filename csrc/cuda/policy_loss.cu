// Policy losses: one pass over the tokens stores the gradient and leaves partial sums, which a last launch adds up in a
// fixed order. Options on whole sequences take a launch before it, and, at the level of sequences, one after it.
#include "cuda/ops.h"
#include "cuda/reduce.cuh"

namespace v05::cuda {

namespace {

constexpr int kThreads = 256;
constexpr int kPerThread = 8;  // tokens, kThreads apart
constexpr int64_t kBlockTokens = int64_t(kThreads) * kPerThread;

// The last sequence of [low, high] that begins at or before a token.
__device__ __forceinline__ int64_t sequence_of(const int64_t* __restrict__ offsets, int64_t token, int64_t low,
                                               int64_t high) {
  while (low < high) {
    int64_t middle = (low + high + 1) / 2;
    if (offsets[middle] <= token)
      low = middle;
    else
      high = middle - 1;
  }
  return low;
}

// One sequence: whether a token is unmasked and, where an option asks, the ratio of its mean and its sampler weight.
template <class T>
__global__ void __launch_bounds__(kThreads) sequence_kernel(PolicyInputs<T> in, PolicyScratch<T> scratch) {
  const int64_t s = blockIdx.x, begin = in.offsets[s], end = in.offsets[s + 1];
  const bool corrects = whole_sequence(in.correction), whole = in.sequence_level || corrects;
  double count = 0, x_sum = 0, sampler_sum = 0;
  for (int64_t start = begin; start < end; start += kThreads) {
    int64_t i = start + threadIdx.x;
    bool keep = i < end && in.weights[i] != T(0);
    count += keep ? 1 : 0;
    if (whole && keep) {
      T old = in.old_logprobs[i];
      if (in.sequence_level) x_sum += log_ratio(in.logprobs[i], old).value;
      if (corrects) sampler_sum += log_ratio(old, in.sampler_logprobs[i]).value;
    }
    if (!whole && __syncthreads_or(keep)) break;
  }
  count = block_sum<kThreads>(count);
  if (in.sequence_level) x_sum = block_sum<kThreads>(x_sum);
  if (corrects) sampler_sum = block_sum<kThreads>(sampler_sum);
  if (threadIdx.x != 0) return;
  scratch.present[s] = count > 0 ? T(1) : T(0);
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

template <class T>
__device__ __forceinline__ PolicyTerm<T> surrogate(Surrogate kind, const PolicyToken<T>& token,
                                                   const PolicyNumbers<T>& by) {
  switch (kind) {
    case Surrogate::ppo:
      return policy_term<Surrogate::ppo>(token, by);
    case Surrogate::cispo:
      return policy_term<Surrogate::cispo>(token, by);
    case Surrogate::sapo: {
      PolicyToken<T> gated = token;
      gated.gate = exp(sapo_exponent(token.ratio, token.advantage, by));
      return policy_term<Surrogate::sapo>(gated, by);
    }
    case Surrogate::clip_cov:
      return policy_term<Surrogate::clip_cov>(token, by);
    case Surrogate::kl_cov:
      return policy_term<Surrogate::kl_cov>(token, by);
    default:
      return policy_term<Surrogate::gpg>(token, by);
  }
}

template <class T>
__device__ __forceinline__ Slope<T> kl(Kl kind, T ref, T logprob) {
  T gap = ref - logprob;
  if (ref == logprob && !(gap == gap)) return {T(0), T(0)};  // equal infinities
  Slope<T> bounded = log_ratio(ref, logprob);
  switch (kind) {
    case Kl::k1:
      return kl_term<Kl::k1>(gap, bounded, T(0));
    case Kl::k2:
      return kl_term<Kl::k2>(gap, bounded, T(0));
    case Kl::k3:
      return kl_term<Kl::k3>(gap, bounded, T(exp(bounded.value)));
    case Kl::k1_plus:
      return kl_term<Kl::k1_plus>(gap, bounded, T(0));
    case Kl::k3_plus:
      return kl_term<Kl::k3_plus>(gap, bounded, T(exp(bounded.value)));
    default:
      return {T(0), T(0)};
  }
}

// What one unmasked token adds to the sums, the gradient and, at the level of sequences, to by_ratio.
template <class T>
__device__ __forceinline__ void add_token(const PolicyInputs<T>& in, const PolicyScratch<T>& scratch, int64_t i,
                                          int64_t s, T weight, T logprob, T old, T* sums, T* gradient) {
  const T advantage = in.advantages[in.advantage_per_token ? i : s];
  const Slope<T> x = log_ratio(logprob, old);
  const T ratio = in.sequence_level ? scratch.ratio[s] : exp(x.value);
  const T selected = in.selected && in.selected[i] ? T(1) : T(0);
  const PolicyToken<T> token{logprob, x.value, x.slope, ratio, advantage, T(0), selected};
  const PolicyTerm<T> term = surrogate(in.surrogate, token, in.numbers);
  T correction = 1;
  if (whole_sequence(in.correction))
    correction = scratch.correction[s];
  else if (in.correction != Correction::none)
    correction = sampler_weight(T(exp(log_ratio(old, in.sampler_logprobs[i]).value)), masks(in.correction), in.numbers);
  const T scale = weight * correction;
  T value = scale * term.value, direct = scale * term.by_logprob;
  const T by_ratio = scale * term.by_ratio;
  if (in.kl != Kl::none) {
    const Slope<T> penalty = kl(in.kl, in.ref_logprobs[i], logprob);
    value += weight * in.numbers.kl_coef * penalty.value;
    direct += weight * in.numbers.kl_coef * penalty.slope;
    sums[kKl] += penalty.value;
  }
  if (in.sequence_level) scratch.by_ratio[i] = by_ratio;
  gradient[i] = in.sequence_level ? direct : direct + x.slope * by_ratio;
  sums[kLoss] += value;
  sums[kTokens] += 1;
  sums[kRatio] += ratio;
  sums[kLogRatio] += x.value;
  sums[kClippedLow] += term.low;
  sums[kClippedHigh] += term.high;
  sums[kDualClipped] += term.dual;
  sums[kSamplerWeight] += correction;
  sums[kSamplerMasked] += masks(in.correction) && correction == T(0) ? 1 : 0;
  sums[kSelected] += selected;
}

template <class T>
__global__ void __launch_bounds__(kThreads, 3)
    token_kernel(PolicyInputs<T> in, PolicyScratch<T> scratch, T* __restrict__ gradient) {
  __shared__ int64_t edges[2];
  const int64_t begin = int64_t(blockIdx.x) * kBlockTokens, end = smaller(begin + kBlockTokens, in.n);
  if (threadIdx.x < 2)
    edges[threadIdx.x] = sequence_of(in.offsets, threadIdx.x == 0 ? begin : end - 1, 0, in.sequences - 1);
  __syncthreads();
  T sums[kPolicySums] = {};
#pragma unroll 4
  for (int step = 0; step < kPerThread; ++step) {
    const int64_t i = begin + step * kThreads + threadIdx.x;
    if (i >= end) break;
    // Together, before the mask is known: what a masked token holds is read but never used.
    const T weight = in.weights[i], logprob = in.logprobs[i], old = in.old_logprobs[i];
    if (weight == T(0)) {
      gradient[i] = 0;
      if (in.sequence_level) scratch.by_ratio[i] = 0;
      continue;
    }
    add_token(in, scratch, i, sequence_of(in.offsets, i, edges[0], edges[1]), weight, logprob, old, sums, gradient);
  }
#pragma unroll
  for (int field = 0; field < kPolicySums; ++field) {
    T total = block_sum<kThreads>(sums[field]);
    if (threadIdx.x == 0) scratch.partial[int64_t(field) * gridDim.x + blockIdx.x] = total;
  }
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

// Adds one field up, the loss or a metric; kSequences from the sequences, the others from the blocks of token_kernel.
template <class T>
__global__ void __launch_bounds__(kThreads) finish_kernel(PolicyScratch<T> scratch, int64_t blocks, int64_t sequences,
                                                          T* __restrict__ loss, T* __restrict__ metrics) {
  const int field = blockIdx.x;
  const T* values = field == kSequences ? scratch.present : scratch.partial + field * blocks;
  const int64_t length = field == kSequences ? sequences : blocks;
  double total = 0;
  for (int64_t i = threadIdx.x; i < length; i += kThreads) total += values[i];
  total = block_sum<kThreads>(total);
  if (threadIdx.x == 0) *(field == kLoss ? loss : metrics + field - 1) = T(total);
}

}  // namespace

int64_t policy_blocks(int64_t n) { return (n + kBlockTokens - 1) / kBlockTokens; }

template <class T>
void policy_loss(const PolicyInputs<T>& in, const PolicyScratch<T>& scratch, T* gradient, T* loss, T* metrics,
                 cudaStream_t stream) {
  const unsigned blocks = static_cast<unsigned>(policy_blocks(in.n)), sequences = static_cast<unsigned>(in.sequences);
  if (sequences) sequence_kernel<<<sequences, kThreads, 0, stream>>>(in, scratch);
  if (blocks) token_kernel<<<blocks, kThreads, 0, stream>>>(in, scratch, gradient);
  if (blocks && in.sequence_level) share_kernel<<<sequences, kThreads, 0, stream>>>(in, scratch, gradient);
  finish_kernel<<<kPolicySums, kThreads, 0, stream>>>(scratch, blocks, in.sequences, loss, metrics);
  check_launch("policy_loss");
}

#define V05_INSTANTIATE(T) \
  template void policy_loss<T>(const PolicyInputs<T>&, const PolicyScratch<T>&, T*, T*, T*, cudaStream_t);
V05_INSTANTIATE(float)
V05_INSTANTIATE(double)

}  // namespace v05::cuda
