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

__host__ __device__ __forceinline__ bool aligned(const void* address) {
  return (reinterpret_cast<uintptr_t>(address) & 15) == 0;
}

// Whether a row of n begins at a multiple of 16 bytes and can be read in vectors to its end.
template <class T>
__device__ __forceinline__ bool in_vectors(const T* row, int64_t n) {
  return aligned(row) && n % Vector<T>::kSize == 0;
}

// Elements i to i + kSize of a row of n, where i < n; `otherwise` past its end. kWhole: the row is in vectors.
template <bool kWhole, class T>
__device__ __forceinline__ Vector<T> load_vector(const T* row, int64_t i, int64_t n, T otherwise) {
  if constexpr (kWhole) {
    return *reinterpret_cast<const Vector<T>*>(row + i);
  } else {
    Vector<T> out;
#pragma unroll
    for (int j = 0; j < Vector<T>::kSize; ++j) out.at[j] = i + j < n ? row[i + j] : otherwise;
    return out;
  }
}

template <class T>
__device__ __forceinline__ Vector<T> load_vector(const T* row, int64_t i, int64_t n, bool whole, T otherwise) {
  return whole ? load_vector<true>(row, i, n, otherwise) : load_vector<false>(row, i, n, otherwise);
}

template <bool kWhole, class T>
__device__ __forceinline__ void store_vector(T* row, int64_t i, int64_t n, const Vector<T>& values) {
  if constexpr (kWhole) {
    *reinterpret_cast<Vector<T>*>(row + i) = values;
  } else {
#pragma unroll
    for (int j = 0; j < Vector<T>::kSize; ++j)
      if (i + j < n) row[i + j] = values.at[j];
  }
}

template <class T>
__device__ __forceinline__ void store_vector(T* row, int64_t i, int64_t n, bool whole, const Vector<T>& values) {
  if (whole)
    store_vector<true>(row, i, n, values);
  else
    store_vector<false>(row, i, n, values);
}

// The largest element of some vectors, without regard to NaN. Two of half precision are compared at a time.
template <class Wide, class T, int kCount>
__device__ __forceinline__ Wide largest(const Vector<T> (&values)[kCount]) {
  Wide most = widen(values[0].at[0]);
#pragma unroll
  for (int u = 0; u < kCount; ++u)
#pragma unroll
    for (int j = 0; j < Vector<T>::kSize; ++j) most = fmax(most, widen(values[u].at[j]));
  return most;
}

template <class Pair, class T, int kCount>
__device__ __forceinline__ Pair largest_pair(const Vector<T> (&values)[kCount]) {
  Pair most = *reinterpret_cast<const Pair*>(values[0].at);
#pragma unroll
  for (int u = 0; u < kCount; ++u)
#pragma unroll
    for (int j = 0; j < Vector<T>::kSize; j += 2)
      most = __hmax2(most, *reinterpret_cast<const Pair*>(values[u].at + j));
  return most;
}

template <class Wide, int kCount>
__device__ __forceinline__ float largest(const Vector<__nv_bfloat16> (&values)[kCount]) {
  const __nv_bfloat162 most = largest_pair<__nv_bfloat162>(values);
  return fmaxf(__low2float(most), __high2float(most));
}

template <class Wide, int kCount>
__device__ __forceinline__ float largest(const Vector<__half> (&values)[kCount]) {
  const __half2 most = largest_pair<__half2>(values);
  return fmaxf(__low2float(most), __high2float(most));
}

// Every element, widened. A bfloat16 is the upper half of a float.
template <class Wide, class T>
struct Widened {
  Wide at[Vector<T>::kSize];

  __device__ __forceinline__ explicit Widened(const Vector<T>& values) {
#pragma unroll
    for (int j = 0; j < Vector<T>::kSize; ++j) at[j] = Wide(widen(values.at[j]));
  }
};

template <class Wide>
struct Widened<Wide, __nv_bfloat16> {
  float at[Vector<__nv_bfloat16>::kSize];

  __device__ __forceinline__ explicit Widened(const Vector<__nv_bfloat16>& values) {
    const uint32_t* pairs = reinterpret_cast<const uint32_t*>(values.at);
#pragma unroll
    for (int j = 0; j < Vector<__nv_bfloat16>::kSize; j += 2) {
      at[j] = __uint_as_float(pairs[j / 2] << 16);
      at[j + 1] = __uint_as_float(pairs[j / 2] & 0xffff0000u);
    }
  }
};

// A vector of wide values, rounded.
template <class T, class Wide>
__device__ __forceinline__ Vector<T> narrowed(const Wide (&values)[Vector<T>::kSize]) {
  Vector<T> out;
#pragma unroll
  for (int j = 0; j < Vector<T>::kSize; ++j) out.at[j] = narrow<T>(values[j]);
  return out;
}

}  // namespace v05::cuda
