// What csrc/cuda uses of CUDA's runtime and language, on the processor: a kernel is a function, its threads are fibers.
#pragma once

#include <math.h>

#include <cstdint>
#include <cstdlib>
#include <exception>
#include <thread>
#include <utility>

#include "block.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static thread_local  // a block is run by one thread of the processor

struct uint3 {
  unsigned x, y, z;
};

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

inline thread_local uint3 threadIdx{}, blockIdx{};
inline thread_local dim3 blockDim{}, gridDim{};

// ---- errors, devices, kernels
// ----------------------------------------------------------------------------------------
enum cudaError_t { cudaSuccess, cudaErrorInvalidConfiguration, cudaErrorCooperativeLaunchTooLarge };
using cudaStream_t = struct CUstream_st*;

namespace emulated {
constexpr int kMultiprocessors = 3;
inline cudaError_t last_error = cudaSuccess;
}  // namespace emulated

inline cudaError_t cudaGetLastError() { return std::exchange(emulated::last_error, cudaSuccess); }
inline const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaErrorInvalidConfiguration ? "invalid configuration argument" : "too many blocks at once";
}

enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount };
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  return *value = emulated::kMultiprocessors, cudaSuccess;
}

struct cudaFuncAttributes {
  int ptxVersion;
};

// V05_EMULATED_ARCH: 90, or what it says.
template <class Kernel>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, Kernel) {
  const char* asked = std::getenv("V05_EMULATED_ARCH");
  return attributes->ptxVersion = asked ? std::atoi(asked) : 90, cudaSuccess;
}

// ---- launches ----------------------------------------------------------------------------------------------------
enum cudaLaunchAttributeID {
  cudaLaunchAttributeCooperative,
  cudaLaunchAttributeClusterDimension,
  cudaLaunchAttributeProgrammaticStreamSerialization
};

struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    int cooperative, programmaticStreamSerializationAllowed;
    uint3 clusterDim;
  } val;
};

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

namespace emulated {

using Kernel = std::function<void()>;

// Runs one block in the calling thread of the processor.
inline void run_block(const cudaLaunchConfig_t& config, unsigned index, const Kernel& kernel, Cluster* cluster) {
  gridDim = config.gridDim, blockDim = config.blockDim;
  blockIdx = {index % gridDim.x, index / gridDim.x, 0};
  Block& own = block();
  own.cluster = cluster;
  if (cluster && index == 0) cluster->first = &anchor;
  own.run(int(config.blockDim.x), kernel, [](int t) { threadIdx.x = unsigned(t); });
}

// Runs all blocks at once, each in a thread of its own.
inline void run_together(const cudaLaunchConfig_t& config, unsigned blocks, const Kernel& kernel, bool clustered) {
  Cluster cluster;
  cluster.expected = blocks * config.blockDim.x;
  std::vector<std::thread> threads;
  std::vector<std::exception_ptr> failed(blocks);
  for (unsigned index = 0; index < blocks; ++index)
    threads.emplace_back([&, index] {
      try {
        run_block(config, index, kernel, clustered ? &cluster : nullptr);
      } catch (...) {
        failed[index] = std::current_exception();
      }
    });
  for (std::thread& thread : threads) thread.join();
  for (const std::exception_ptr& error : failed)
    if (error) std::rethrow_exception(error);
}

inline cudaError_t launch(const cudaLaunchConfig_t& config, const Kernel& kernel) {
  const unsigned blocks = config.gridDim.x * config.gridDim.y, threads = config.blockDim.x;
  if (!blocks || !threads || threads > kMostThreads) return last_error = cudaErrorInvalidConfiguration;
  if (config.numAttrs) {
    const cudaLaunchAttribute& attribute = *config.attrs;
    const bool clustered = attribute.id == cudaLaunchAttributeClusterDimension;
    if (clustered && attribute.val.clusterDim.x != blocks) return last_error = cudaErrorInvalidConfiguration;
    if (clustered || attribute.id == cudaLaunchAttributeCooperative) {
      if (!clustered && blocks > kMultiprocessors) return last_error = cudaErrorCooperativeLaunchTooLarge;
      return run_together(config, blocks, kernel, clustered), cudaSuccess;
    }
  }
  static std::mt19937 random{2};
  std::vector<unsigned> order(blocks);
  std::iota(order.begin(), order.end(), 0u);
  std::shuffle(order.begin(), order.end(), random);
  for (const unsigned index : order) run_block(config, index, kernel, nullptr);
  return cudaSuccess;
}

}  // namespace emulated

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               const Arguments&... arguments) {
  return emulated::launch(*config, [&] { kernel(arguments...); });
}

// ---- what a thread can do
// --------------------------------------------------------------------------------------------
inline void __syncthreads() { emulated::block().wait(emulated::block().all); }
inline int __syncthreads_or(int says) { return emulated::block().any_of_all(says); }
inline void __syncwarp() { emulated::block().wait_for_warp(); }
inline unsigned __ballot_sync(unsigned, bool says) { return emulated::block().ballot(says); }
inline bool __any_sync(unsigned, bool says) { return emulated::block().ballot(says) != 0; }

template <class T>
T __shfl_sync(unsigned, T value, int from, int width = 32) {
  emulated::Block& block = emulated::block();
  return block.exchange(value, block.lane() / width * width + from % width);
}

template <class T>
T __shfl_xor_sync(unsigned, T value, int bits, int = 32) {
  emulated::Block& block = emulated::block();
  return block.exchange(value, block.lane() ^ bits);
}

template <class T>
T __shfl_down_sync(unsigned, T value, int step) {
  emulated::Block& block = emulated::block();
  return block.exchange(value, block.lane() + step < emulated::kWarp ? block.lane() + step : block.lane());
}

inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline int __ffs(unsigned bits) { return __builtin_ffs(int(bits)); }
inline float __fdividef(float x, float y) { return x / y; }
inline float __uint_as_float(unsigned bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
