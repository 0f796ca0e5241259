// What the GPU does and C++ has no name for: every line of PTX in these kernels.
#pragma once

#include <cuda_runtime.h>

namespace v05::cuda {

// ---- arithmetic ----------------------------------------------------------------------------------------------------
// 2^x by the hardware, within 2^-22 of the value; 0 where that is below the normal numbers.
__device__ __forceinline__ float power_of_2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// The larger of two; NaN where one is.
__device__ __forceinline__ float larger_or_nan(float x, float other) {
  float y;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(y) : "f"(x), "f"(other));
  return y;
}

// ---- memory --------------------------------------------------------------------------------------------------------
// Brings the 128 bytes about an address into the cache.
__device__ __forceinline__ void prefetch(const void* address) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(address));
}

// Begins to copy 4, 8 or 16 bytes from global into shared memory; both addresses are multiples of that.
template <int kBytes>
__device__ __forceinline__ void copy_async(void* shared, const void* values) {
  const unsigned to = static_cast<unsigned>(__cvta_generic_to_shared(shared));
  if constexpr (kBytes == 16)
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(values) : "memory");
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(to), "l"(values), "n"(kBytes) : "memory");
}

// Ends a batch of the calling thread's copies, which may be empty.
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits for all of its batches but the last kPending.
template <int kPending>
__device__ __forceinline__ void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// Words that other blocks read, or write, at the same time.
using Word = unsigned long long;

__device__ __forceinline__ void post_word(Word* at, Word word) {
  asm volatile("st.relaxed.gpu.global.u64 [%0], %1;" ::"l"(at), "l"(word) : "memory");
}

__device__ __forceinline__ Word read_word(const Word* at) {
  Word word;
  asm volatile("ld.relaxed.gpu.global.u64 %0, [%1];" : "=l"(word) : "l"(at) : "memory");
  return word;
}

// ---- launches and clusters: on sm_90 and newer; elsewhere these do nothing -----------------------------------------
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
#define V05_SM_90(...) asm volatile(__VA_ARGS__)
#else
#define V05_SM_90(...)
#endif

// A launch that may overlap with the next one: every block has begun.
__device__ __forceinline__ void allow_next_launch() { V05_SM_90("griddepcontrol.launch_dependents;"); }

// In the next one: what the last one wrote can be read from here on.
__device__ __forceinline__ void wait_for_last_launch() { V05_SM_90("griddepcontrol.wait;" :: : "memory"); }

// What the calling thread wrote before can be read by whoever waits for the arrival of all threads of the cluster.
__device__ __forceinline__ void arrive_in_cluster() {
  V05_SM_90("barrier.cluster.arrive.release.aligned;" :: : "memory");
}
__device__ __forceinline__ void wait_for_cluster() { V05_SM_90("barrier.cluster.wait.acquire.aligned;" :: : "memory"); }

// Writes where this variable of shared memory lies in the first block of the cluster, which has to have begun.
__device__ __forceinline__ void store_in_first_block(double* shared, double value) {
  [[maybe_unused]] unsigned there;
  [[maybe_unused]] const unsigned here = static_cast<unsigned>(__cvta_generic_to_shared(shared));
  V05_SM_90("mapa.shared::cluster.u32 %0, %1, 0;" : "=r"(there) : "r"(here));
  V05_SM_90("st.shared::cluster.f64 [%0], %1;" ::"r"(there), "d"(value) : "memory");
}

#undef V05_SM_90

}  // namespace v05::cuda
