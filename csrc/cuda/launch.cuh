// Launches of a grid: a plain one; one that begins while the one before it still works, and waits for its results only
// where it says so (on sm_90 and newer; elsewhere it begins after it); one whose blocks all run at once; and one whose
// blocks are a cluster (on sm_90 and newer).
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace v05::cuda {

constexpr unsigned kMostOfCluster = 8;  // blocks, on every GPU that has clusters

inline int64_t multiprocessors() {
  int device = 0, count = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
  return count ? count : 1;
}

template <class... Parameters, class... Arguments>
void launch_with(cudaLaunchAttribute attribute, bool wanted, void (*kernel)(Parameters...), dim3 blocks,
                 unsigned threads, cudaStream_t stream, const Arguments&... arguments) {
  cudaLaunchConfig_t config{};
  config.gridDim = blocks;
  config.blockDim = threads;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = wanted ? 1 : 0;
  cudaLaunchKernelEx(&config, kernel, arguments...);
}

template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), dim3 blocks, unsigned threads, cudaStream_t stream,
            const Arguments&... arguments) {
  launch_with({}, false, kernel, blocks, threads, stream, arguments...);
}

// Whether a kernel's code, and the device, are of sm_90 or newer.
template <class Kernel>
bool of_sm_90(Kernel kernel) {
  cudaFuncAttributes compiled{};
  cudaFuncGetAttributes(&compiled, kernel);
  return compiled.ptxVersion >= 90;
}

// Launches the second of two.
template <class... Parameters, class... Arguments>
void launch_next(void (*kernel)(Parameters...), unsigned blocks, unsigned threads, cudaStream_t stream,
                 const Arguments&... arguments) {
  cudaLaunchAttribute early{};
  early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  early.val.programmaticStreamSerializationAllowed = 1;
  launch_with(early, of_sm_90(kernel), kernel, blocks, threads, stream, arguments...);  // older cannot wait
}

// Launches blocks that wait for each other: no more than there are multiprocessors.
template <class... Parameters, class... Arguments>
void launch_at_once(void (*kernel)(Parameters...), unsigned blocks, unsigned threads, cudaStream_t stream,
                    const Arguments&... arguments) {
  cudaLaunchAttribute together{};
  together.id = cudaLaunchAttributeCooperative;
  together.val.cooperative = 1;
  launch_with(together, blocks > 1, kernel, blocks, threads, stream, arguments...);
}

// Launches blocks that are one cluster.
template <class... Parameters, class... Arguments>
void launch_cluster(void (*kernel)(Parameters...), unsigned blocks, unsigned threads, cudaStream_t stream,
                    const Arguments&... arguments) {
  cudaLaunchAttribute cluster{};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim.x = blocks;
  cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
  launch_with(cluster, true, kernel, blocks, threads, stream, arguments...);
}

}  // namespace v05::cuda
