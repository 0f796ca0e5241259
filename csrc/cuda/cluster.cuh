// A few blocks that run at once and write into each other's shared memory: on sm_90 and newer; elsewhere nothing here
// may be called.
#pragma once

#include <cuda_runtime.h>

namespace v05::cuda {

constexpr unsigned kMostOfCluster = 8;  // blocks, on every GPU that has clusters

// What the calling thread wrote before can be read by whoever waits for the arrival of all threads of the cluster.
__device__ __forceinline__ void arrive_in_cluster() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
#endif
}

__device__ __forceinline__ void wait_for_cluster() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}

// Writes where this variable of shared memory lies in the first block, which has to have begun.
__device__ __forceinline__ void store_in_first_block(double* shared, double value) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  unsigned there;
  const unsigned here = static_cast<unsigned>(__cvta_generic_to_shared(shared));
  asm volatile("mapa.shared::cluster.u32 %0, %1, 0;" : "=r"(there) : "r"(here));
  asm volatile("st.shared::cluster.f64 [%0], %1;" ::"r"(there), "d"(value) : "memory");
#endif
}

}  // namespace v05::cuda
