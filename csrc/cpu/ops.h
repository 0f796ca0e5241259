// What cpu_module.cpp binds: plain pointers and sizes, no Python and no torch.
#pragma once

#include <cstdint>
#include <type_traits>

#include "calibration.h"
#include "formulas.h"
#include "half.h"
#include "inputs.h"

namespace v05::cpu {

// Offsets start at 0, ascend and end at n; rewards [n] and prior [groups] (where not null) lie in [low, high].
template <class T>
bool groups_valid(const T* rewards, const int64_t* offsets, const T* prior, int64_t n, int64_t groups, double low,
                  double high);

// floats [6, groups]: mean, deviation, weight, baseline, mse, gain. integers [2, groups]: count, planned.
// rollout_baseline [n] and advantages [n] may be null.
template <class T>
void shrinkage(const T* rewards, const int64_t* offsets, const T* prior, int64_t n, int64_t groups,
               const Budget<double>& budget, T* floats, int64_t* integers, bool* more, T* rollout_baseline,
               T* advantages);

template <class T>
void calibrated(const Calibration<T>& in);

// lengths [n], where not null, weigh the rewards in the statistics of the batch.
template <class T>
void advantage(const T* rewards, const int64_t* offsets, const T* prior, const T* lengths, int64_t n, int64_t groups,
               Baseline baseline, Scale scale, double low, double high, double eps, T* out);

// ---- token_logprob -----------------------------------------------------------------------------------------------

template <class T>
using WideOf = std::conditional_t<std::is_same_v<T, double>, double, float>;

constexpr double kLowestTemperature = 1e-6, kHighestTemperature = 1e6;

// The first row whose target, temperature or logits are not allowed (and whose outputs are not written), or -1.
template <class T>
int64_t token_logprob(const LogprobRows<T>& rows, const LogprobOutputs<WideOf<T>>& out);

// grad_logits [count, vocabulary] without gaps, or the logits themselves; a null gradient is 0. A target that is not in
// the vocabulary but not ignored either belongs to columns that are elsewhere.
template <class T>
void token_logprob_backward(const LogprobRows<T>& rows, const LogprobOutputs<const WideOf<T>>& saved,
                            const WideOf<T>* grad_logprob, const WideOf<T>* grad_entropy, T* grad_logits);

// ---- query_attention ---------------------------------------------------------------------------------------------

// features [prompts, count * width]. False where offsets are not allowed (and nothing is written) or where something
// given or projected is NaN or infinite.
template <class T>
bool query_attention(const AttentionInputs<T, WideOf<T>>& in, const AttentionSaved<WideOf<T>>& saved,
                     WideOf<T>* features);

// grad_states [tokens, size], where not null, without gaps; grad_queries [prompts, count, width].
template <class T>
void query_attention_backward(const AttentionInputs<T, WideOf<T>>& in, const AttentionSaved<const WideOf<T>>& saved,
                              const WideOf<T>* grad_features, T* grad_states, WideOf<T>* grad_queries,
                              const AttentionWeights<WideOf<T>>& grad_weights);

// ---- policy_loss -------------------------------------------------------------------------------------------------

// False where offsets or values are not allowed; gradient [n] is that of the loss by the log-probabilities.
template <class T>
bool policy_loss(const PolicyInputs<T>& in, T* loss, T* gradient, T* metrics);

}  // namespace v05::cpu
