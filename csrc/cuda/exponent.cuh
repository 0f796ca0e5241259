// Powers of e for sums over a vocabulary: in float32 by the hardware's power of 2, within 2^-22 of the value.
#pragma once

#include "cuda/ptx.cuh"

namespace v05::cuda {

constexpr float kLog2E = 1.44269504088896340736f;

// power(unit<Wide>() * x) is e^x, so that a factor on x takes the unit in once for all.
template <class Wide>
__device__ __forceinline__ Wide unit() {
  return Wide(1);
}
template <>
__device__ __forceinline__ float unit() {
  return kLog2E;
}

__device__ __forceinline__ double power(double x) { return exp(x); }
__device__ __forceinline__ float power(float x) { return power_of_2(x); }

// x, or where its power is 0 a number of which that is true as well: what is multiplied with that power must not be
// infinite. NaN stays NaN.
__device__ __forceinline__ double finite(double x) { return x < -1000 ? -1000 : x; }
__device__ __forceinline__ float finite(float x) { return larger_or_nan(x, -160.0f); }

}  // namespace v05::cuda
