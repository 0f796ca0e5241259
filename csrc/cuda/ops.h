// What cuda_module.cpp binds: launches on a stream, over device addresses. Each throws std::runtime_error where the
// launch is refused, and returns before the kernel has run.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "calibration.h"
#include "formulas.h"
#include "inputs.h"

namespace v05::cuda {

// floats [6, groups]: mean, deviation, weight, baseline, mse, gain. integers [2, groups]: count, planned.
// rollout_baseline [n] and advantages [n] may be null.
template <class T>
void shrinkage(const T* rewards, const int64_t* offsets, const T* prior, int64_t groups, const Budget<T>& budget,
               T* floats, int64_t* integers, bool* more, T* rollout_baseline, T* advantages, cudaStream_t stream);

template <class T>
void calibrated(const Calibration<T>& in, cudaStream_t stream);

// moments [2]: mean of the batch, and its std + eps; read only where baseline or scale is the batch's. A given baseline
// [n] comes in place of the prior.
template <class T>
void advantage(const T* rewards, const int64_t* offsets, const T* prior, const T* moments, int64_t groups,
               Baseline baseline, Scale scale, T low, T high, T eps, T* out, cudaStream_t stream);

// The dtype in which sums over values of T are kept.
template <class T>
struct WideOf {
  using type = float;
};
template <>
struct WideOf<double> {
  using type = double;
};

template <class T>
void token_logprob(const LogprobRows<T>& rows, const LogprobOutputs<typename WideOf<T>::type>& out,
                   cudaStream_t stream);

// grad_logits [count, vocabulary], rows grad_stride apart; it may be the logits themselves. A null gradient is 0.
template <class T>
void token_logprob_backward(const LogprobRows<T>& rows, const LogprobOutputs<const typename WideOf<T>::type>& saved,
                            const typename WideOf<T>::type* grad_logprob, const typename WideOf<T>::type* grad_entropy,
                            T* grad_logits, int64_t grad_stride, cudaStream_t stream);

// Scratch of policy_loss: partial [kPolicySums, blocks] and present [sequences] always; kept and ratio [sequences] and
// by_ratio [n] at the level of sequences; correction [sequences] where the sampler's weight is a sequence's.
template <class T>
struct PolicyScratch {
  T *partial, *present, *kept, *ratio, *correction, *by_ratio;
};

// How many blocks of policy_loss share n tokens.
int64_t policy_blocks(int64_t n);

// gradient [n] is that of the loss by the log-probabilities; loss is one number, metrics [kPolicySums - 1].
template <class T>
void policy_loss(const PolicyInputs<T>& in, const PolicyScratch<T>& scratch, T* gradient, T* loss, T* metrics,
                 cudaStream_t stream);

}  // namespace v05::cuda
