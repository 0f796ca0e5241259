// What cpu_module.cpp binds: plain pointers and sizes, no Python and no torch.
#pragma once

#include <cstdint>

#include "formulas.h"

namespace v05::cpu {

// Offsets start at 0, ascend and end at n; rewards [n] and prior [groups] (where not null) lie in [low, high].
template <class T>
bool groups_valid(const T* rewards, const int64_t* offsets, const T* prior, int64_t n, int64_t groups, double low,
                  double high);

// floats [6, groups]: mean, deviation, weight, baseline, mse, gain. integers [2, groups]: count, planned.
template <class T>
void shrinkage(const T* rewards, const int64_t* offsets, const T* prior, int64_t n, int64_t groups,
               const Budget<double>& budget, T* floats, int64_t* integers, bool* more, T* rollout_baseline);

// lengths [n], where not null, weigh the rewards in the statistics of the batch.
template <class T>
void advantage(const T* rewards, const int64_t* offsets, const T* prior, const T* lengths, int64_t n, int64_t groups,
               Baseline baseline, Scale scale, double low, double high, double eps, T* out);

}  // namespace v05::cpu
