// 16-byte loads and stores of logits in any dtype, widened to the one that sums are kept in. Which thread takes which
// element depends on its place in the row alone, never on its address, so that a row has the same bits anywhere.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace v05::cuda {

__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ double widen(double x) { return x; }
__device__ __forceinline__ float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float widen(__half x) { return __half2float(x); }

template <class T, class Wide>
__device__ __forceinline__ T narrow(Wide x) {
  return T(x);
}
template <>
__device__ __forceinline__ __nv_bfloat16 narrow(float x) {
  return __float2bfloat16_rn(x);
}
template <>
__device__ __forceinline__ __half narrow(float x) {
  return __float2half_rn(x);
}

template <class T>
struct alignas(16) Vector {
  static constexpr int kSize = 16 / sizeof(T);
  T at[kSize];
};

__device__ __forceinline__ bool aligned(const void* address) {
  return (reinterpret_cast<uintptr_t>(address) & 15) == 0;
}

// Elements i to i + kSize of a row of n, `otherwise` past its end.
template <class T>
__device__ __forceinline__ Vector<T> load_vector(const T* __restrict__ row, int64_t i, int64_t n, bool whole,
                                                 T otherwise) {
  if (whole && i + Vector<T>::kSize <= n) return *reinterpret_cast<const Vector<T>*>(row + i);
  Vector<T> out;
#pragma unroll
  for (int j = 0; j < Vector<T>::kSize; ++j) out.at[j] = i + j < n ? row[i + j] : otherwise;
  return out;
}

template <class T>
__device__ __forceinline__ void store_vector(T* __restrict__ row, int64_t i, int64_t n, bool whole,
                                             const Vector<T>& values) {
  if (whole && i + Vector<T>::kSize <= n) {
    *reinterpret_cast<Vector<T>*>(row + i) = values;
    return;
  }
#pragma unroll
  for (int j = 0; j < Vector<T>::kSize; ++j)
    if (i + j < n) row[i + j] = values.at[j];
}

}  // namespace v05::cuda
