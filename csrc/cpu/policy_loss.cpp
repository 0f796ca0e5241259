// Policy losses in one pass that leaves the gradient behind: chunks of tokens in parallel, each in tiles. Options on
// whole sequences take two more passes over a chunk, then made of whole sequences, while it is in the cache; one where
// the tokens of a sequence are alike.
#include <vector>

#include "ops.h"
#include "parallel.h"
#include "policy_alike.h"
#include "policy_pass.h"
#include "vector_math.h"

namespace v05::cpu {

namespace {

constexpr int64_t kChunk = 8192;  // tokens: fixed, so that sums do not depend on the threads
constexpr int64_t kTokensPerThread = 8192;

// Tokens [begin, end), the first of which belongs to sequence `first`.
struct Chunk {
  int64_t begin, end, first;
};

// Before any token of a sequence: the ratio of its mean, and the sampler's weight. Starts counting at the sequence, so
// that the bits do not depend on where it is.
template <class T>
V05_INLINE void summarise(const PolicyInputs<T>& in, SequenceState<T>& state, int64_t s, Tile<T>& tile, Sums& sums) {
  const bool corrects = whole_sequence(in.correction);
  double x_sum = 0, sampler_sum = 0;
  Flag<T> kept = 0, bad = 0;
  for (int64_t begin = in.offsets[s]; begin < in.offsets[s + 1]; begin += kTile) {
    const int64_t count = std::min(kTile, in.offsets[s + 1] - begin);
    const T* __restrict logprobs = in.logprobs + begin, * __restrict old = in.old_logprobs + begin;
    const T* __restrict weights = in.weights + begin, * __restrict sampler =
                                                          corrects ? in.sampler_logprobs + begin : old;
    for (int64_t i = 0; i < count; ++i) {
      T l = logprobs[i], o = old[i], v = sampler[i];
      bool keep = weights[i] != T(0);
      l = keep ? l : T(0), o = keep ? o : T(0), v = keep ? v : T(0);
      tile.x[i] = log_ratio(l, o).value, tile.scratch[i] = log_ratio(o, v).value;
      kept += flag<T>(keep);
      bad |= flag<T>(!(v < std::numeric_limits<T>::infinity()));
    }
    x_sum += lane_sum(tile.x, count);
    if (corrects) sampler_sum += lane_sum(tile.scratch, count);
  }
  sums.bad |= bad != 0;
  if (in.sequence_level) {
    state.kept[size_t(s)] = kept;
    state.ratio[size_t(s)] = T(std::exp(kept ? x_sum / double(kept) : 0.0));
  }
  if (!corrects) return;
  const double bound = kLogRatioBound<double>;
  T ratio = T(std::exp(clamped(sampler_sum, -bound, bound)));
  state.correction[size_t(s)] = sampler_weight(ratio, masks(in.correction), in.numbers);
}

// After all tokens of a sequence: each one's share of the derivative by the mean log-ratio.
template <class T>
V05_INLINE void share(const PolicyInputs<T>& in, const SequenceState<T>& state, int64_t s, T* __restrict gradient) {
  if (state.kept[size_t(s)] == 0) return;
  double total = 0;
  for (int64_t begin = in.offsets[s]; begin < in.offsets[s + 1]; begin += kTile)
    total += lane_sum(state.by_ratio.get() + begin, std::min(kTile, in.offsets[s + 1] - begin));
  const T part = T(total / double(state.kept[size_t(s)]));
  const T* __restrict logprobs = in.logprobs, * __restrict old = in.old_logprobs, * __restrict weights = in.weights;
  for (int64_t i = in.offsets[s]; i < in.offsets[s + 1]; ++i) {
    bool moves = (weights[i] != T(0)) & (log_ratio(logprobs[i], old[i]).slope != T(0));
    gradient[i] += moves ? part : T(0);
  }
}

template <class T>
struct ChunkPass {
  static V05_INLINE void run(const PolicyInputs<T>* inputs, SequenceState<T>* states, Chunk chunk, T* gradient,
                             Sums* total) {
    const PolicyInputs<T>& in = *inputs;
    SequenceState<T>& state = *states;
    Sums sums;
    Tile<T> tile;
    std::memset(static_cast<void*>(&tile), 0, sizeof tile);
    std::fill(tile.correction, tile.correction + kTile, T(1));
    const bool whole = in.sequence_level || whole_sequence(in.correction), alike = tokens_alike(in);
    for (int64_t s = chunk.first; alike && s < in.sequences && in.offsets[s] < chunk.end; ++s)
      if (in.surrogate == Surrogate::ppo)
        alike_pass<Surrogate::ppo>(in, s, tile, gradient, sums);
      else
        alike_pass<Surrogate::sapo>(in, s, tile, gradient, sums);
    *total = sums;
    if (alike) return;
    for (int64_t s = chunk.first; s < in.sequences && in.offsets[s] < chunk.end; ++s) {
      if (whole) summarise(in, state, s, tile, sums);
      if (in.offsets[s] < chunk.begin) continue;
      int64_t i = in.offsets[s], end = in.offsets[s + 1];
      while (i < end && in.weights[i] == T(0)) ++i;
      sums.field[kSequences] += i < end ? 1 : 0;
    }
    int64_t s = chunk.first;
    for (int64_t begin = chunk.begin; begin < chunk.end; begin += kTile) {
      const int64_t count = std::min(kTile, chunk.end - begin);
      while (in.offsets[s + 1] <= begin) ++s;
      spread_all(in, state, begin, count, s, tile, sums);
      if (in.sequence_level)
        policy_switch<true>(in, begin, count, tile, gradient, state.by_ratio.get(), sums);
      else
        policy_switch<false>(in, begin, count, tile, gradient, static_cast<T*>(nullptr), sums);
      kl_switch(in, begin, count, gradient, sums);
    }
    for (s = chunk.first; in.sequence_level && s < in.sequences && in.offsets[s] < chunk.end; ++s)
      share(in, state, s, gradient);
    *total = sums;
  }
};

// Cuts the tokens into chunks of kChunk, or, where sequences must stay whole, of sequences up to about kChunk tokens.
std::vector<Chunk> chunks_of(const int64_t* offsets, int64_t n, int64_t sequences, bool whole) {
  std::vector<Chunk> chunks;
  int64_t s = 0;
  for (int64_t begin = 0; begin < n;) {
    while (offsets[s + 1] <= begin) ++s;
    int64_t end = std::min(n, begin + kChunk);
    if (whole) end = *std::lower_bound(offsets + s + 1, offsets + sequences, end);
    chunks.push_back({begin, end, s});
    begin = end;
  }
  return chunks;
}

bool offsets_ascend(const int64_t* offsets, int64_t n, int64_t sequences) {
  bool good = offsets[0] == 0 && offsets[sequences] == n;
  for (int64_t s = 0; s < sequences; ++s) good &= offsets[s] <= offsets[s + 1];
  return good;
}

}  // namespace

template <class T>
bool policy_loss(const PolicyInputs<T>& in, T* loss, T* gradient, T* metrics) {
  if (!offsets_ascend(in.offsets, in.n, in.sequences)) return false;
  const bool whole = in.sequence_level || whole_sequence(in.correction);
  const std::vector<Chunk> chunks = chunks_of(in.offsets, in.n, in.sequences, whole);
  SequenceState<T> state;
  if (in.sequence_level && !tokens_alike(in)) {
    state.ratio.reset(new T[size_t(in.sequences)]);
    state.kept.reset(new int64_t[size_t(in.sequences)]);
    state.by_ratio.reset(new T[size_t(in.n)]);
  }
  if (whole_sequence(in.correction)) state.correction.reset(new T[size_t(in.sequences)]);
  std::vector<Sums> partial(chunks.size());
  parallel_for(int64_t(chunks.size()), in.n, kTokensPerThread, [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c)
      vectorised<ChunkPass<T>>(&in, &state, chunks[size_t(c)], gradient, &partial[size_t(c)]);
  });
  Sums total;
  for (const Sums& part : partial) {
    for (int field = 0; field < kPolicySums; ++field) total.field[field] += part.field[field];
    total.bad |= part.bad;
  }
  *loss = T(total.field[kLoss]);
  for (int field = 1; field < kPolicySums; ++field) metrics[field - 1] = T(total.field[field]);
  return !total.bad;
}

#define V05_INSTANTIATE(T) template bool policy_loss<T>(const PolicyInputs<T>&, T*, T*, T*);
V05_INSTANTIATE(float)
V05_INSTANTIATE(double)

}  // namespace v05::cpu
