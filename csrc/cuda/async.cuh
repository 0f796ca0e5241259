// Copies from global into shared memory that the copying thread does not wait for. It alone reads what it copied, so
// that its own wait is all that orders them.
#pragma once

#include <cuda_runtime.h>

#include "cuda/vector.cuh"

namespace v05::cuda {

// Copies 4, 8 or 16 bytes; both addresses are multiples of that.
template <int kBytes>
__device__ __forceinline__ void copy_async(void* shared, const void* values) {
  const unsigned to = static_cast<unsigned>(__cvta_generic_to_shared(shared));
  if constexpr (kBytes == 16)
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(values) : "memory");
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(to), "l"(values), "n"(kBytes) : "memory");
}

// Ends a batch of copies, which may be empty.
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits for all batches but the last kPending.
template <int kPending>
__device__ __forceinline__ void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

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
