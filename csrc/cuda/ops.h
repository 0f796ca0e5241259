// What cuda_module.cpp binds: launches on a stream, over device addresses. Each throws std::runtime_error where the
// launch is refused, and returns before the kernel has run.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "formulas.h"

namespace v05::cuda {

// floats [6, groups]: mean, deviation, weight, baseline, mse, gain. integers [2, groups]: count, planned.
// rollout_baseline [n] and advantages [n] may be null.
template <class T>
void shrinkage(const T* rewards, const int64_t* offsets, const T* prior, int64_t groups, const Budget<T>& budget,
               T* floats, int64_t* integers, bool* more, T* rollout_baseline, T* advantages, cudaStream_t stream);

// moments [2]: mean of the batch, and its std + eps; read only where baseline or scale is the batch's.
template <class T>
void advantage(const T* rewards, const int64_t* offsets, const T* prior, const T* moments, int64_t groups,
               Baseline baseline, Scale scale, T low, T high, T eps, T* out, cudaStream_t stream);

}  // namespace v05::cuda
