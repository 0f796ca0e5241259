// Kernels that are wrong, each in one way, and right ones: what the emulation has to tell apart.
#include <exception>

#include "cuda/launch.cuh"
#include "cuda/ptx.cuh"

namespace v05::cuda {

// Hands each thread the number of its mirror image in the block.
__global__ void mirror_kernel(bool waits, float* out) {
  __shared__ float of_thread[256];
  of_thread[threadIdx.x] = float(threadIdx.x);
  if (waits) __syncthreads();
  out[threadIdx.x] = of_thread[blockDim.x - 1 - threadIdx.x];
  if (waits) __syncthreads();
  of_thread[threadIdx.x] = -1;
}

// Writes what others may not have read yet.
__global__ void twice_kernel(bool waits, float* out) {
  __shared__ float of_thread[256];
  float sum = 0;
  for (int turn = 1; turn <= 2; ++turn) {
    if (waits) __syncthreads();
    of_thread[threadIdx.x] = float(turn);
    __syncthreads();
    sum += of_thread[blockDim.x - 1 - threadIdx.x];
  }
  out[threadIdx.x] = sum;
}

__global__ void half_wait_kernel(bool all, float* out) {
  if (all || threadIdx.x % 2 == 0) __syncthreads();
  if (!all) __shfl_sync(~0u, 1.0f, 0);
  out[threadIdx.x] = 1;
}

// Copies from `values`, which begins where it should or 4 bytes later.
__global__ void copy_kernel(bool waits, const float* values, float* out) {
  alignas(16) __shared__ float own[256][4];
  own[threadIdx.x][0] = 0;
  copy_async<16>(own[threadIdx.x], values + 4 * threadIdx.x);
  commit_copies();
  if (waits) wait_for_copies<0>();
  out[threadIdx.x] = own[threadIdx.x][0];
  wait_for_copies<0>();
}

// Adds up the blocks of a cluster in the first one.
__global__ void cluster_kernel(bool waits, float* out) {
  __shared__ double of_block[8];
  arrive_in_cluster();
  wait_for_cluster();
  if (threadIdx.x == 0) store_in_first_block(&of_block[blockIdx.x], double(blockIdx.x + 1));
  arrive_in_cluster();
  if (waits) wait_for_cluster();
  if (blockIdx.x || threadIdx.x) return;
  for (unsigned block = 0; block < gridDim.x; ++block) *out += float(of_block[block]);
}

// Waits for a word that nobody posts.
__global__ void patience_kernel(const Word* word) {
  while (read_word(word) == 0) {
  }
}

}  // namespace v05::cuda

// Runs a kernel by its number; returns what went wrong, or null.
extern "C" const char* run(int which, bool right, const float* values, float* out) {
  using namespace v05::cuda;
  static std::string error;
  try {
    if (which == 0) launch(mirror_kernel, 1, 256, nullptr, right, out);
    if (which == 1) launch(twice_kernel, 1, 256, nullptr, right, out);
    if (which == 2) launch(half_wait_kernel, 1, 256, nullptr, right, out);
    if (which == 3) launch(copy_kernel, 1, 256, nullptr, right, values, out);
    if (which == 4) launch_cluster(cluster_kernel, 8, 64, nullptr, right, out);
    if (which == 5) launch_at_once(patience_kernel, 2, 32, nullptr, reinterpret_cast<const Word*>(out));
    if (which == 6) launch(mirror_kernel, 1, right ? 1024 : 1025, nullptr, right, out);
  } catch (const std::exception& caught) {
    error = caught.what();
    return error.c_str();
  }
  return cudaGetLastError() == cudaSuccess ? nullptr : "refused";
}
