// Policy losses: one pass over the tokens stores the gradient and leaves partial sums, which a second launch adds up in
// a fixed order; what one block goes through needs no such launch, nor do a few that are a cluster. Options on whole
// sequences have a pass of their own.
#include <type_traits>

#include "cuda/async.cuh"
#include "cuda/policy_sequences.cuh"
#include "cuda/policy_sums.cuh"
#include "cuda/policy_token.cuh"
#include "cuda/sequences.cuh"

namespace v05::cuda {

namespace {

constexpr int kTile = 1024;  // tokens that blocks are dealt
constexpr int kAlone = 2;    // tiles up to which one block takes all

enum Array { kWeight, kLogprob, kOldLogprob, kAdvantage, kArrays };

// What the threads of a block read of as many vectors of neighbouring tokens, each its own.
template <class T>
struct Fetched {
  Vector<T> of[kArrays][kThreads];

  // Begins with the elements from i on, up to `end`.
  __device__ __forceinline__ void begin(const PolicyInputs<T>& in, int64_t i, int64_t end, bool aligned) {
    const T* from[kArrays] = {in.weights + i, in.logprobs + i, in.old_logprobs + i, in.advantages + i};
    if (aligned && end - i >= Vector<T>::kSize) {
#pragma unroll
      for (int a = 0; a < kArrays; ++a)
        if (a < kAdvantage || in.advantage_per_token) copy_async<16>(of[a][threadIdx.x].at, from[a]);
    } else {
#pragma unroll
      for (int a = 0; a < kArrays; ++a)
        if (a < kAdvantage || in.advantage_per_token) copy_part(of[a][threadIdx.x], from[a], end - i);
    }
    commit_copies();
  }
};

// Counts, in the lanes' sum, how many of every `stride`-th sequences from `first` on have an unmasked token, for a
// warp. The first token of the first ones, which nearly always tells, is read long before it is looked at.
template <class T>
struct SequencesKept {
  const int64_t first, stride;
  const T early;

  __device__ __forceinline__ SequencesKept(const PolicyInputs<T>& in, int64_t first, int64_t stride)
      : first(first), stride(stride), early(first_weight(in, first + threadIdx.x % kWarp * stride)) {}

  // The weight of a sequence's first token; 0 where it has none.
  __device__ __forceinline__ static T first_weight(const PolicyInputs<T>& in, int64_t s) {
    if (s >= in.sequences) return T(0);
    const int64_t start = in.offsets[s];
    return start < in.offsets[s + 1] ? in.weights[start] : T(0);
  }

  __device__ __forceinline__ T count(const PolicyInputs<T>& in) const {
    const int lane = threadIdx.x % kWarp;
    T kept = 0;
    for (int64_t base = first; base < in.sequences; base += stride * kWarp) {
      const int64_t s = base + lane * stride;
      const bool at_once = (base == first ? early : first_weight(in, s)) != T(0);
      kept += at_once ? 1 : 0;
      const bool unclear = !at_once && s < in.sequences && in.offsets[s + 1] - in.offsets[s] > 1;
      for (unsigned open = __ballot_sync(kEveryLane, unclear); open; open &= open - 1) {
        const int whose = __ffs(open) - 1;
        const int64_t of = base + whose * stride, end = in.offsets[of + 1];
        bool found = false;
        for (int64_t i = in.offsets[of] + lane; !found && i - lane < end; i += kWarp)
          found = __any_sync(kEveryLane, i < end && in.weights[i] != T(0));
        kept += found && lane == whose ? 1 : 0;
      }
    }
    return kept;
  }
};

// The advantages of neighbouring tokens of several sequences.
template <class T>
__device__ __forceinline__ Vector<T> advantages_of(const PolicyInputs<T>& in, const Span& span, int64_t i) {
  Vector<T> advantage;
  int64_t s = span.of(in.offsets, i);
  int64_t next = s < span.last ? in.offsets[s + 1] : in.n;
#pragma unroll
  for (int k = 0; k < Vector<T>::kSize; ++k) {
    while (s < span.last && i + k >= next) next = in.offsets[++s + 1];
    advantage.at[k] = in.advantages[s];
  }
  return advantage;
}

// The next tokens of a block, and where they are, are read while it works on those before.
template <Surrogate kSurrogate, Form kForm, class T>
__global__ void __launch_bounds__(kThreads, kLeast<T>)
    token_kernel(PolicyInputs<T> in, bool aligned, T* __restrict__ gradient, PolicyOutputs<T> out) {
  constexpr int kEach = Vector<T>::kSize, kStep = kThreads * kEach, kOfWarp = kWarp * kEach;
  __shared__ Fetched<T> fetched[2];
  out.begin();
  const int warp = threadIdx.x / kWarp;
  // Every block takes tiles that follow each other, the first ones one more where they do not come out even.
  const int64_t tiles = (in.n + kTile - 1) / kTile, each = tiles / gridDim.x, more = tiles % gridDim.x;
  const int64_t begin = (blockIdx.x * each + smaller<int64_t>(blockIdx.x, more)) * kTile;
  const int64_t end = smaller(in.n, begin + (each + (blockIdx.x < more ? 1 : 0)) * kTile);
  fetched[0].begin(in, begin + threadIdx.x * kEach, end, aligned);
  const SequencesKept<T> sequences(in, int64_t(blockIdx.x) * kWarps + warp, int64_t(gridDim.x) * kWarps);
  T sums[kPolicySums] = {};
  int64_t first = begin + warp * kOfWarp;  // of the warp's tokens
  const auto span_from = [&](int64_t low, int64_t nearby) {
    return Span(in.offsets, in.sequences, first, smaller(first + kOfWarp, end) - 1, low, nearby);
  };
  const bool of_sequence = !in.advantage_per_token;
  int64_t low = of_sequence && first < end ? sequence_of(in.offsets, first, 0, in.sequences - 1) : 0;
  Span span = span_from(low, of_sequence && first < end ? nearby_begin(in.offsets, in.sequences, low) : INT64_MAX);
  T of_span = of_sequence && first < end ? in.advantages[span.first] : T(0);
  for (int now = 0; first < end; now ^= 1) {
    const int64_t i = first + threadIdx.x % kWarp * kEach;
    fetched[now ^ 1].begin(in, i + kStep, end, aligned);
    const bool goes_on = of_sequence && first + kStep < end;
    const int64_t nearby = goes_on ? nearby_begin(in.offsets, in.sequences, span.first) : INT64_MAX;
    wait_for_copies<1>();
    const Fetched<T>& mine = fetched[now];
    const Vector<T> weight = mine.of[kWeight][threadIdx.x], logprob = mine.of[kLogprob][threadIdx.x];
    const Vector<T> old = mine.of[kOldLogprob][threadIdx.x];
    Vector<T> advantage;
    if (in.advantage_per_token) {
      advantage = mine.of[kAdvantage][threadIdx.x];
    } else if (span.one()) {
#pragma unroll
      for (int k = 0; k < kEach; ++k) advantage.at[k] = of_span;
    } else {
      advantage = advantages_of(in, span, i);
    }
    Vector<T> slope;
#pragma unroll
    for (int k = 0; k < kEach; ++k) {
      slope.at[k] = T(0);
      if (weight.at[k] != T(0))
        slope.at[k] = add_token<kSurrogate, kForm>(in, i + k, weight.at[k], logprob.at[k], old.at[k], advantage.at[k],
                                                   Whole<T>{}, sums)
                          .direct;
    }
    first += kStep;
    if (goes_on) {
      span = span_from(span.first, nearby);
      of_span = in.advantages[span.first];
    }
    store_vector(gradient, i, end, aligned && i + kEach <= end, slope);
  }
  wait_for_copies<0>();
  sums[kSequences] = sequences.count(in);
  if (kForm == Form::plain) sums[kSamplerWeight] = sums[kTokens];
  out.leave(sums);
}

// Multiplies in place, where the factor is not 1.
template <class T>
__global__ void __launch_bounds__(kThreads) scale_kernel(T* values, int64_t n, const T* factor, bool aligned) {
  wait_for_last_launch();
  const T by = *factor;
  if (by == T(1)) return;
  constexpr int kEach = Vector<T>::kSize;
  for (int64_t i = (int64_t(blockIdx.x) * kThreads + threadIdx.x) * kEach; i < n;
       i += int64_t(gridDim.x) * kThreads * kEach) {
    const bool whole = aligned && i + kEach <= n;
    Vector<T> each = load_vector(values, i, n, whole, T(0));
#pragma unroll
    for (int k = 0; k < kEach; ++k) each.at[k] *= by;
    store_vector(values, i, n, whole, each);
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

int64_t blocks_at_a_time() { return kResident * multiprocessors(); }

template <class... Pointers>
bool all_aligned(Pointers... pointers) {
  return (reinterpret_cast<uintptr_t>(nullptr) | ... | reinterpret_cast<uintptr_t>(pointers)) % 16 == 0;
}

}  // namespace

int64_t policy_blocks(int64_t n, int64_t sequences, bool whole) {
  const int64_t tiles = (n + kTile - 1) / kTile, crews = long_sequences(n, sequences) ? 1 : kWarps;
  const int64_t blocks = whole ? (sequences + crews - 1) / crews : tiles > kAlone ? tiles : 1;
  return blocks <= 1 ? 1 : smaller(blocks, blocks_at_a_time());
}

template <class T>
void policy_loss(const PolicyInputs<T>& in, double* partial, T* gradient, T* loss, T* metrics, cudaStream_t stream) {
  const bool whole = in.sequence_level || whole_sequence(in.correction);
  const bool plain = in.kl == Kl::none && in.correction == Correction::none;
  const unsigned blocks = static_cast<unsigned>(policy_blocks(in.n, in.sequences, whole));
  PolicyOutputs<T> out{loss, metrics, partial, false};
  const auto start = [&](auto kernel, auto... arguments) {
    out.cluster = blocks > 1 && blocks <= kMostOfCluster && of_sm_90(kernel);
    if (out.cluster)
      launch_cluster(kernel, blocks, kThreads, stream, arguments..., out);
    else
      launch(kernel, blocks, kThreads, stream, arguments..., out);
  };
  with_surrogate(in.surrogate, [&](auto kind) {
    constexpr Surrogate kSurrogate = decltype(kind)::value;
    if (whole) {
      const auto kernel = long_sequences(in.n, in.sequences) ? sequence_kernel<kSurrogate, kThreads, T>
                                                             : sequence_kernel<kSurrogate, kWarp, T>;
      return start(kernel, in, gradient);
    }
    const bool aligned = all_aligned(in.weights, in.logprobs, in.old_logprobs, gradient,
                                     in.advantage_per_token ? in.advantages : nullptr);
    const auto kernel = plain ? token_kernel<kSurrogate, Form::plain, T> : token_kernel<kSurrogate, Form::token, T>;
    start(kernel, in, aligned, gradient);
  });
  if (blocks > 1 && !out.cluster) launch_next(finish_kernel<T>, 1, kPolicySums * kWarp, stream, out, int64_t(blocks));
  check_launch("policy_loss");
}

template <class T>
void scale_unless_one(T* values, int64_t n, const T* factor, cudaStream_t stream) {
  const int64_t tiles = smaller((n + kTile - 1) / kTile, 2 * blocks_at_a_time());
  if (tiles)
    launch_next(scale_kernel<T>, static_cast<unsigned>(tiles), kThreads, stream, values, n, factor,
                all_aligned(values));
  check_launch("scale_unless_one");
}

#define V05_INSTANTIATE(T)                                                                 \
  template void policy_loss<T>(const PolicyInputs<T>&, double*, T*, T*, T*, cudaStream_t); \
  template void scale_unless_one<T>(T*, int64_t, const T*, cudaStream_t);
V05_INSTANTIATE(float)
V05_INSTANTIATE(double)

}  // namespace v05::cuda
