// The sums of a policy loss: what a block leaves behind, and the launch that adds up what the blocks left.
#pragma once

#include "cuda/launch.cuh"
#include "cuda/ops.h"
#include "cuda/ptx.cuh"
#include "cuda/reduce.cuh"

namespace v05::cuda {

namespace {

constexpr int kThreads = 256, kWarps = kThreads / kWarp;
constexpr int kResident = 4;  // blocks at a time on one multiprocessor

template <class T>
constexpr int kLeast = sizeof(T) == 8 ? 2 : kResident;  // of these the registers are enough for

// Where sums go: the first field is the loss, the others are metrics; partial [kPolicySums, blocks] where there are
// several blocks that are not a cluster.
template <class T>
struct PolicyOutputs {
  T *loss, *metrics;
  double* partial;
  bool cluster;

  __device__ __forceinline__ void store(int field, double sum) const {
    *(field == kLoss ? loss : metrics + field - 1) = T(sum);
  }

  // The first that a kernel does.
  __device__ __forceinline__ void begin() const {
    allow_next_launch();
    if (cluster) arrive_in_cluster();
  }

  // Adds up the blocks of a cluster, whose sum of a field the thread of that number has.
  __device__ __forceinline__ void leave_to_first(double sum) const {
    __shared__ double of_block[kMostOfCluster][kPolicySums];
    wait_for_cluster();  // until all have begun
    if (threadIdx.x < kPolicySums) store_in_first_block(&of_block[blockIdx.x][threadIdx.x], sum);
    __syncwarp();
    arrive_in_cluster();
    if (blockIdx.x > 0) return;
    wait_for_cluster();
    if (threadIdx.x >= kPolicySums) return;
    double total = 0;
    for (unsigned block = 0; block < gridDim.x; ++block) total += of_block[block][threadIdx.x];
    store(threadIdx.x, total);
  }

  // Adds up the threads of a block, all of which call it.
  __device__ __forceinline__ void leave(const T (&sums)[kPolicySums]) const {
    double wide[kPolicySums];
#pragma unroll
    for (int field = 0; field < kPolicySums; ++field) wide[field] = sums[field];
    const double sum = block_sums<kThreads>(wide);
    if (cluster) return leave_to_first(sum);
    if (threadIdx.x >= kPolicySums) return;
    if (gridDim.x == 1)
      store(threadIdx.x, sum);
    else
      partial[threadIdx.x * int64_t(gridDim.x) + blockIdx.x] = sum;
  }
};

// Adds up what the blocks left, a warp a field.
template <class T>
__global__ void __launch_bounds__(kPolicySums* kWarp) finish_kernel(PolicyOutputs<T> out, int64_t blocks) {
  const int field = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  double total = 0;
  wait_for_last_launch();
  allow_next_launch();
#pragma unroll 8
  for (int64_t i = lane; i < blocks; i += kWarp) total += out.partial[field * blocks + i];
  total = warp_sum(total);
  if (lane == 0) out.store(field, total);
}

}  // namespace

}  // namespace v05::cuda
