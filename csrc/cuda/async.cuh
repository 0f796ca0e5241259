// Copies from global into shared memory that the copying thread does not wait for. It alone reads what it copied, so
// that its own wait is all that orders them.
#pragma once

#include "cuda/ptx.cuh"
#include "cuda/vector.cuh"

namespace v05::cuda {

// Copies as many of the first elements of a vector as there are, and zeros in place of the others.
template <class T>
__device__ __forceinline__ void copy_part(Vector<T>& to, const T* values, int64_t there) {
#pragma unroll
  for (int k = 0; k < Vector<T>::kSize; ++k)
    if (k < there)
      copy_async<sizeof(T)>(to.at + k, values + k);
    else
      to.at[k] = T(0);
}

}  // namespace v05::cuda
