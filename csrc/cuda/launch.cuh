// A launch that begins while the one before it still works, and waits for its results only where it says so: on sm_90
// and newer; elsewhere it begins after it.
#pragma once

#include <cuda_runtime.h>

namespace v05::cuda {

// In the first of the two: every block has begun, so the next launch may.
__device__ __forceinline__ void allow_next_launch() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}

// In the second: what the first wrote can be read from here on.
__device__ __forceinline__ void wait_for_last_launch() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Launches the second.
template <class... Parameters, class... Arguments>
void launch_next(void (*kernel)(Parameters...), unsigned blocks, unsigned threads, cudaStream_t stream,
                 const Arguments&... arguments) {
  cudaFuncAttributes compiled{};
  cudaFuncGetAttributes(&compiled, kernel);
  cudaLaunchAttribute early{};
  early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  early.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = blocks;
  config.blockDim = threads;
  config.stream = stream;
  config.attrs = &early;
  config.numAttrs = compiled.ptxVersion >= 90 ? 1 : 0;  // older code cannot wait
  cudaLaunchKernelEx(&config, kernel, arguments...);
}

}  // namespace v05::cuda
