// What cuda_module.cpp binds: launches on a stream, over device addresses. Each throws std::runtime_error where the
// launch is refused, and returns before the kernel has run.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "calibration.h"
#include "formulas.h"
#include "inputs.h"

namespace v05::cuda {

// Rewards are read in their own dtype and widened to T, that of everything else.
//
// floats [6, groups]: mean, deviation, weight, baseline, mse, gain. integers [2, groups]: count, planned.
// rollout_baseline [n] and advantages [n] may be null.
template <class Reward, class T>
void shrinkage(const Reward* rewards, const int64_t* offsets, const T* prior, int64_t groups, const Budget<T>& budget,
               T* floats, int64_t* integers, bool* more, T* rollout_baseline, T* advantages, cudaStream_t stream);

template <class T, class Reward>
void calibrated(const Calibration<T, Reward>& in, cudaStream_t stream);

// What a part of the batch adds up to: the weight of its rewards, their mean, and the weighted squares about it.
struct Pool {
  double weight, mean, squares;
};

// How many blocks of batch_moments share n rewards.
int64_t moment_blocks(int64_t n);

// moments [2] of n > 0 rewards: their mean, and their std + eps (1 where the std is 0 or undefined); each reward counts
// as often as lengths [n], where not null, say. Scratch: partial [blocks], not touched where there is one block.
template <class Reward, class T>
void batch_moments(const Reward* rewards, const T* lengths, int64_t n, double eps, Pool* partial, T* moments,
                   cudaStream_t stream);

// moments [2], as above, are read only where baseline or scale is the batch's. A given baseline [n] comes in place of
// the prior; lengths [n] are read where the baseline is by_length.
template <class Reward, class T>
void advantage(const Reward* rewards, const int64_t* offsets, const T* prior, const T* lengths, const T* moments,
               int64_t groups, Baseline baseline, Scale scale, T low, T high, T eps, T* out, cudaStream_t stream);

// The dtype in which sums over values of T are kept.
template <class T>
struct WideOf {
  using type = float;
};
template <>
struct WideOf<double> {
  using type = double;
};

// Rows have 2^30 columns at most.
template <class T>
void token_logprob(const LogprobRows<T>& rows, const LogprobOutputs<typename WideOf<T>::type>& out,
                   cudaStream_t stream);

// grad_logits [count, vocabulary], rows grad_stride apart; it may be the logits themselves. A null gradient is 0.
template <class T>
void token_logprob_backward(const LogprobRows<T>& rows, const LogprobOutputs<const typename WideOf<T>::type>& saved,
                            const typename WideOf<T>::type* grad_logprob, const typename WideOf<T>::type* grad_entropy,
                            T* grad_logits, int64_t grad_stride, cudaStream_t stream);

// How many blocks of policy_loss share n tokens on the current device; `whole`: with an option on whole sequences.
int64_t policy_blocks(int64_t n, int64_t sequences, bool whole);

// gradient [n] is that of the loss by the log-probabilities; loss is one number, metrics [kPolicySums - 1]; partial
// [kPolicySums, policy_blocks] is scratch where there are several blocks.
template <class T>
void policy_loss(const PolicyInputs<T>& in, double* partial, T* gradient, T* loss, T* metrics, cudaStream_t stream);

// Multiplies n values by a number on the device; reads and writes nothing where that is 1.
template <class T>
void scale_unless_one(T* values, int64_t n, const T* factor, cudaStream_t stream);

// How many numbers the scratch of query_attention holds.
int64_t attention_scratch(int64_t tokens, int64_t prompts, int64_t heads, int64_t count);

template <class T>
void query_attention(const AttentionInputs<T, typename WideOf<T>::type>& in,
                     const AttentionSaved<typename WideOf<T>::type>& saved, typename WideOf<T>::type* scratch,
                     typename WideOf<T>::type* features, cudaStream_t stream);

// How many numbers of the working dtype the backward needs as scratch, which begins at a multiple of 16 bytes.
int64_t attention_backward_scratch(int64_t tokens, int64_t size, int64_t prompts, int64_t count, int heads);

// grad_states [tokens, size], where not null, without gaps.
template <class T>
void query_attention_backward(const AttentionInputs<T, typename WideOf<T>::type>& in,
                              const AttentionSaved<const typename WideOf<T>::type>& saved,
                              const typename WideOf<T>::type* grad_features, typename WideOf<T>::type* scratch,
                              T* grad_states, typename WideOf<T>::type* grad_queries,
                              const AttentionWeights<typename WideOf<T>::type>& grad_weights, cudaStream_t stream);

}  // namespace v05::cuda
